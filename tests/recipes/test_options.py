import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from samplewise.recipes.options import OptionErrors, convert, describe, help_text, read_options


class Shape(enum.Enum):
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(frozen=True)
class Options:
    """What can be set.

    Attributes:
        epochs: how often.
    """

    epochs: int = 3
    methods: tuple[str, ...] = ("a", "b")
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    rate: float | None = None
    mode: Literal["x", "y"] = "x"
    data: Path | None = None
    label_noise: float = 0.0
    report: bool = False

    def validate(self) -> None:
        wrong = []
        if self.epochs < 1:
            wrong.append(f"Options(epochs={self.epochs}): must be at least 1")
        if not 0 <= self.label_noise < 1:
            wrong.append(f"Options(label_noise={self.label_noise}): must be in [0, 1)")
        if wrong:
            raise ValueError("\n".join(wrong))


@dataclass
class Needs:
    size: int
    name: str

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("Needs(size): must not be negative")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--epochs", "5"], {"epochs": 5}),
        (["--epochs=5", "--epochs", "6"], {"epochs": 6}),
        (["--methods", "a"], {"methods": ("a",)}),
        (["--methods", "a,c"], {"methods": ("a", "c")}),
        (["--methods", "a", "c"], {"methods": ("a", "c")}),
        (["--methods", "[a, c]"], {"methods": ("a", "c")}),
        (["--seeds", "4", "5"], {"seeds": [4, 5]}),
        (["--seeds="], {"seeds": []}),
        (["--rate", "1e-3"], {"rate": 1e-3}),
        (["--rate", "-1"], {"rate": -1.0}),
        (["--rate", "null"], {"rate": None}),
        (["--mode", "y"], {"mode": "y"}),
        (["--data", "a folder"], {"data": Path("a folder")}),
        (["--label-noise", "0.2"], {"label_noise": 0.2}),
        (["--report"], {"report": True}),
        (["--report", "--epochs", "5"], {"report": True, "epochs": 5}),
        (["--report", "false"], {"report": False}),
    ],
)
def test_command_line(argv, expected):
    assert read_options(Options, argv) == Options(**expected)


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("epochs: 5", {"epochs": 5}),
        ("rate: 1e-3", {"rate": 1e-3}),
        ("rate: null\nseeds: [3]", {"rate": None, "seeds": [3]}),
        ("methods: [a, c]\nlabel-noise: 0.5", {"methods": ("a", "c"), "label_noise": 0.5}),
        ("methods: a", {"methods": ("a",)}),
        ("report: yes\nmode: x\ndata: /tmp", {"report": True, "mode": "x", "data": Path("/tmp")}),
    ],
)
def test_yaml(tmp_path, yaml, expected):
    path = tmp_path / "a.yaml"
    path.write_text(yaml)
    assert read_options(Options, ["--config", str(path)]) == Options(**expected)


def test_the_command_line_wins_over_files_and_later_files_over_earlier(tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("epochs: 10\nmode: y\nrate: 1")
    second.write_text("epochs: 20\nrate: 2")
    found = read_options(Options, ["--rate", "3", "--config", str(first), f"--config={second}"])
    assert found == Options(epochs=20, mode="y", rate=3.0)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--epochs", "x"], "--epochs: 'x' is not a whole number"),
        (["--epochs", "2.5"], "--epochs: '2.5' is not a whole number"),
        (["--epochs", "null"], "--epochs: 'null' is not a whole number"),
        (["--epochs"], "--epochs: needs a value: a whole number"),
        (["--epochs", "1", "2"], "--epochs: takes one value, not 2 (1 2): a whole number"),
        (["--rate", "fast"], "--rate: 'fast' is not a number or null"),
        (["--rate"], "--rate: needs a value: a number or null"),
        (["--mode", "z"], "--mode: 'z' is not one of x, y"),
        (["--seeds", "1", "q"], "--seeds: ['1', 'q'] is not a list, each a whole number"),
        (["--report", "maybe"], "--report: 'maybe' is not true or false"),
        (["--epoch", "3"], "--epoch: no such option; did you mean --epochs?"),
        (["--zzz"], "--zzz: no such option"),
        (["stray"], "stray: stands alone; options are given as --name value"),
        (["--epochs", "0"], "Options(epochs=0): must be at least 1"),
        (["--config"], "--config: needs a YAML file"),
    ],
)
def test_one_mistake(argv, error):
    with pytest.raises(OptionErrors) as caught:
        read_options(Options, argv)
    assert caught.value.errors == [error]


@pytest.mark.parametrize(
    ("yaml", "error"),
    [
        ("epochs: x", "epochs (in FILE): 'x' is not a whole number"),
        ("epochs: true", "epochs (in FILE): True is not a whole number"),
        ("epochs:", "epochs (in FILE): needs a value: a whole number"),
        ("epochs: [1]", "epochs (in FILE): [1] is not a whole number"),
        ("data: 3", "data (in FILE): 3 is not a path or null"),
        ("mehtods: [a]", "mehtods (in FILE): no such option; did you mean methods?"),
        ("1: 2", "1 (in FILE): no such option"),
        ("- a\n- b", "--config FILE: must hold lines of the form `option: value`"),
    ],
)
def test_one_mistake_in_yaml(tmp_path, yaml, error):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml)
    with pytest.raises(OptionErrors) as caught:
        read_options(Options, ["--config", str(path)])
    assert caught.value.errors == [error.replace("FILE", str(path))]


def test_yaml_that_is_none(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("epochs: [1\nmode: x")
    with pytest.raises(OptionErrors, match=r"--config .*bad.yaml: is not YAML: .*line 2") as caught:
        read_options(Options, ["--config", str(path)])
    assert len(caught.value.errors) == 1


def test_all_mistakes_at_once(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("mode: z\nlabel_noise: 2\nnothing: 1")
    with pytest.raises(OptionErrors) as caught:
        read_options(Options, ["--epochs", "x", "--config", str(path), "--bogus", "1", "--seeds", "a"])
    assert [error.split(":")[0].split(" (")[0] for error in caught.value.errors] == [
        *("mode", "nothing", "--epochs", "--bogus", "--seeds", "Options(label_noise=2.0)")
    ]
    assert str(caught.value) == "\n".join(caught.value.errors)


def test_options_without_a_default():
    assert read_options(Needs, ["--size", "1", "--name", "123"]) == Needs(1, "123")
    with pytest.raises(OptionErrors) as caught:
        read_options(Needs, ["--size", "x", "--sise", "1"])
    assert caught.value.errors == [
        "--size: 'x' is not a whole number",
        "--sise: no such option; did you mean --size?",
        "--name: has no default, so it must be given",
    ]
    with pytest.raises(OptionErrors, match="must not be negative"):
        read_options(Needs, ["--size", "-1", "--name", "a"])


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or null"),
        (Literal["a", 1], "one of a, 1"),
        (tuple[int, float], "2 values (a whole number, a number)"),
        (tuple[str, ...], "a list, each text"),
        (list[Path] | None, "a list, each a path or null"),
        (Shape, "one of COSINE, LINEAR"),
        (dict[str, int], "dict"),
    ],
)
def test_describe(hint, words):
    assert describe(hint) == words


def test_convert_enum_and_pairs():
    assert convert(Shape, "LINEAR") is Shape.LINEAR
    assert convert(tuple[int, float], [1, 2]) == (1, 2.0)
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] is not 2 values"):
        convert(tuple[int, float], [1, 2, 3])


def test_help_keeps_lines_and_shows_defaults():
    page = help_text(Options, "samplewise run x", "First line.\n\n    a command")
    assert "\n    a command\n" in page
    assert "(type: int, default: 3)" in page
    assert "--seeds+" not in page

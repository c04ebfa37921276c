import importlib.metadata
import re
import sys

import pytest

import samplewise.recipes
from samplewise.recipes import cli

RECIPE = '''
"""Train a small thing in a minute.

    samplewise run smallthing --epochs 2
"""

from dataclasses import dataclass

from samplewise.recipes.assets import AssetError


@dataclass(frozen=True)
class SmallOptions:
    """What can be set.

    Attributes:
        epochs: how often each sample is seen.
        rate: the learning rate.
        fail: raise this.
    """

    epochs: int = 3
    rate: float = 0.1
    fail: str | None = None

    def validate(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"SmallOptions(epochs={self.epochs}): must be at least 1")


def run(options: SmallOptions) -> None:
    if options.fail:
        raise AssetError("no such data anywhere")
    print(f"ran {options.epochs} {options.rate}")
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe named smallthing, beside three modules that are none."""
    (tmp_path / "smallthing.py").write_text(RECIPE.lstrip())
    (tmp_path / "needy.py").write_text("import a_module_that_nobody_has\nclass NeedyOptions: ...\ndef run(_): ...\n")
    (tmp_path / "helper.py").write_text("def run(options): ...\n")
    (tmp_path / "settings.py").write_text("class SomeOptions: ...\n")
    monkeypatch.setattr(samplewise.recipes, "__path__", [*samplewise.recipes.__path__, str(tmp_path)])
    yield "smallthing"
    for name in ("smallthing", "needy"):
        sys.modules.pop(f"samplewise.recipes.{name}", None)


def test_recipes_are_listed_without_being_imported(recipe):
    found = cli.recipes()
    assert found[recipe] == "Train a small thing in a minute."
    assert "needy" in found
    assert not {"helper", "settings", "cli", "options", "assets", "doctor"} & set(found)
    assert f"samplewise.recipes.{recipe}" not in sys.modules


def test_run(recipe, capsys):
    assert cli.main(["run", recipe]) == 0
    assert capsys.readouterr().out == "ran 3 0.1\n"


def test_run_with_config_and_overrides(recipe, tmp_path, capsys):
    config = tmp_path / "my.yaml"
    config.write_text("epochs: 7\nrate: 1e-3\n")
    assert cli.main(["run", recipe, "--config", str(config), "--epochs", "5"]) == 0
    assert capsys.readouterr().out == "ran 5 0.001\n"


def test_all_mistakes_come_in_one_message(recipe, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text("epoch: 7\nepochs: 0\n")
    status = cli.main(["run", recipe, "--config", str(config), "--rate", "fast", "--config=missing.yaml"])
    assert status == 2
    error = capsys.readouterr().err
    assert error.splitlines() == [
        f"samplewise run {recipe}: 4 mistakes in the options",
        "  --config missing.yaml: cannot be read: No such file or directory",
        f"  epoch (in {config}): no such option; did you mean epochs?",
        "  --rate: 'fast' is not a number",
        "  SmallOptions(epochs=0): must be at least 1",
        f"`samplewise run {recipe} --help` lists the options.",
    ]


def test_unknown_recipe_suggests_the_nearest(recipe, capsys):
    assert cli.main(["run", "smallthin"]) == 2
    assert re.search(r"no recipe of that name; did you mean smallthing\? there are: .*needy", capsys.readouterr().err)


def test_missing_package_names_the_extra(recipe, capsys, monkeypatch):
    assert cli.main(["run", "needy"]) == 1
    error = capsys.readouterr().err
    assert "a_module_that_nobody_has" in error
    assert "pip install 'samplewise[recipes]'" in error
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(["run", recipe]) == 1
    assert "pip install 'samplewise[recipes]'" in capsys.readouterr().err


def test_missing_data_is_an_error_and_no_traceback(recipe, capsys):
    assert cli.main(["run", recipe, "--fail", "yes"]) == 1
    assert capsys.readouterr().err == f"samplewise run {recipe}: no such data anywhere\n"


def test_exactly_one_options_class(recipe, tmp_path):
    with (tmp_path / "smallthing.py").open("a") as file:
        file.write("\nclass MoreOptions: ...\n")
    with pytest.raises(TypeError, match=r"smallthing must define exactly one dataclass .* and defines 2"):
        cli.main(["run", recipe])


def test_help_pages(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([]) == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in ("plugins", "run", "doctor", "samplewise run prune --help"))
    assert cli.main(["run", "--help"]) == 0
    assert re.search(r"smallthing +Train a small thing in a minute", capsys.readouterr().out)
    assert cli.main(["run"]) == 2
    assert cli.main(["run", recipe, "--help"]) == 0
    page = capsys.readouterr().out
    assert "\n    samplewise run smallthing --epochs 2\n" in page, "the docstring's lines stay as they are"
    assert re.search(r"--epochs EPOCHS +how often each sample is seen\. \(type: int, default: 3\)", page)
    assert "--config FILE" in page


@pytest.mark.parametrize("argv", [["nothing"], ["plugins", "extra"], ["--nothing"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: samplewise" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"samplewise {importlib.metadata.version('samplewise')}"


def test_plugins_lists_all_with_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "what", "it", "does", "from"]
    assert {line.split()[0] for line in lines[2:]} >= {"uniform", "rs2", "infobatch", "seta"}
    assert all(re.fullmatch(r"\w+ +\S.* {2,}samplewise \S+", line) for line in lines[2:])


def test_plugins_shows_a_broken_one(tmp_path, monkeypatch):
    folder = tmp_path / "other-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[samplewise.plugins]\nodd = nowhere_at_all:Sampler\n")
    monkeypatch.syspath_prepend(tmp_path)
    table = cli.plugins_table(width=80)
    assert re.search(r"^odd +cannot be used: ModuleNotFoundError: No module +other 1.0$", table, re.MULTILINE)
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("name", sorted(cli.recipes()))
def test_every_recipe_has_readable_help_and_valid_defaults(name, capsys):
    from samplewise.recipes.options import read_options

    assert cli.recipes()[name], "the module's docstring says what the recipe does"
    assert cli.main(["run", name, "--help"]) == 0
    assert f"usage: samplewise run {name}" in capsys.readouterr().out
    module = sys.modules[f"samplewise.recipes.{name}"]
    read_options(cli._options_class(module), [])

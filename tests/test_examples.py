"""The examples run, and each one differs from its plain twin in three lines at most, imports aside."""

import difflib
import io
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name.removesuffix("_plain.py") for path in FOLDER.glob("*_plain.py"))

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{message}")
    for message in (
        "LeafSpec",
        "no `val_dataloader`",
        "smaller than the logging interval",
        "'set_vital'",
        "num_workers",
    )
]


def code(name):
    """An example's lines without its docstring, imports and what separates them."""
    source = re.sub(r'^""".*?"""\n', "", (FOLDER / f"{name}.py").read_text(), flags=re.DOTALL)
    return [line for line in source.splitlines() if line.strip() and not re.match(r"(from|import) ", line)]


def changed_lines(plain, changed):
    """How many lines of one text are not in the other, of the one that has more of them, stretch by stretch."""
    stretches = difflib.SequenceMatcher(None, plain, changed, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in stretches if kind != "equal")


def test_there_is_one_for_each_loop():
    assert NAMES == ["accelerate_loop", "hf_trainer", "lightning_loop", "torch_loop", "webdataset_stream"]


@pytest.mark.parametrize("name", NAMES)
def test_at_most_three_lines_are_changed(name):
    assert 2 <= changed_lines(code(f"{name}_plain"), code(name)) <= 3
    assert not any("samplewise" in line for line in code(f"{name}_plain"))


def run(name, folder, monkeypatch):
    """Run a shortened example; gives its names and what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(FOLDER)
    source = (FOLDER / f"{name}.py").read_text()
    for long, short in (("EPOCHS = 10", "EPOCHS = 3"), ("max_steps=470", "max_steps=40")):
        source = source.replace(long, short)
    names = {"__name__": "example"}
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(source, name, "exec"), names)
    return names, printed.getvalue()


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import digits

    monkeypatch.setattr(digits, "TRAINED_ON", 480)
    yield
    sys.modules.pop("digits")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, tmp_path, monkeypatch):
    names, printed = run(name, tmp_path, monkeypatch)
    assert re.search(r"accuracy 0\.\d{3}\n$", printed)
    sampler = names["sampler"] if "sampler" in names else names["loader"].sampler
    assert sampler.ledger.seen.all()
    assert sampler.epoch >= 2
    assert 480 < int(sampler.ledger.column("count").sum()) <= 3 * 480


@pytest.mark.parametrize("name", ["torch_loop", "webdataset_stream"])
def test_the_plain_twin_runs(name, tmp_path, monkeypatch):
    _, printed = run(f"{name}_plain", tmp_path, monkeypatch)
    assert re.search(r"accuracy 0\.\d{3}\n$", printed)

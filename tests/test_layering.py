"""The house's rules about files: who imports whom, who names a method, what the core needs, how long a file is."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("cuda_ext", "loaders", "plugins", "callbacks", "recipes")  # from the lowest to the highest
CORE_NEEDS = {"torch", "numpy", "typing_extensions", "samplewise"}
SOURCES = sorted(path for part in PARTS for path in (ROOT / part).glob("**/*.py"))
OTHERS = ("tests", "benchmarks", "examples")
ALL = SOURCES + sorted(path for folder in OTHERS for path in (ROOT / folder).glob("**/*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


def imported_modules(path):
    """Yield the dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports between parts are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_lower_part_imports_a_higher_one(path):
    own = PARTS.index(path.relative_to(ROOT).parts[0])
    for name in imported_modules(path):
        head, _, rest = name.partition(".")
        if head == "samplewise":
            assert PARTS.index(rest.partition(".")[0]) <= own, f"imports {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name in PARTS[:3]], ids=name_of)
def test_core_needs_torch_and_numpy_only(path):
    needed = {name.partition(".")[0] for name in imported_modules(path)}
    assert needed - set(sys.stdlib_module_names) <= CORE_NEEDS


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parent.name not in ("plugins", "recipes")], ids=name_of
)
def test_only_plugins_and_recipes_name_a_method(path):
    entries = importlib.metadata.distribution("samplewise").entry_points.select(group="samplewise.plugins")
    methods = "|".join(entry.attr for entry in entries)
    assert methods
    assert not re.findall(rf"\b(?:{methods})\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_syntax_is_that_of_the_oldest_python(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))

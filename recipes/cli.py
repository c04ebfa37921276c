"""The command line: `samplewise plugins`, `samplewise run RECIPE`, `samplewise doctor`.

A recipe is a module of `samplewise.recipes` that defines `run(options)` and exactly one dataclass whose name ends in
`Options`. It is listed without being imported, so what a recipe needs is asked for only when it runs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import samplewise.recipes
from samplewise.loaders.registry import registrations

OK, FAILED, USAGE = 0, 1, 2
_EXTRA = "pip install 'samplewise[recipes]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 (could not be done) or 2 (wrong usage).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["run"]:
        return run_command(argv[1:])
    parser = _parser()
    command = parser.parse_args(argv).command
    if command == "plugins":
        print(plugins_table())
    elif command == "doctor":
        from samplewise.recipes.doctor import report

        print(report())
    else:
        parser.print_help()
    return OK


def plugins_table(width: int | None = None) -> str:
    """The registered samplers: name, first line of the class's docstring, and the distribution it is from."""
    rows = []
    for row in registrations():
        text = row.error and f"cannot be used: {row.error}"
        rows.append((row.name, text or (inspect.getdoc(row.sampler) or row.target).partition("\n")[0], row.source))
    if not rows:
        return "no samplers are registered: install samplewise with pip, so that its entry points exist"
    return _table(("name", "what it does", "from"), rows, width or shutil.get_terminal_size().columns)


def recipes() -> dict[str, str]:
    """Name -> first docstring line of the recipes in this installation; nothing is imported."""
    found = {}
    for module in pkgutil.iter_modules(samplewise.recipes.__path__):
        spec = find_spec(f"{samplewise.recipes.__name__}.{module.name}")
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        runs = any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body)
        if runs and any(isinstance(node, ast.ClassDef) and node.name.endswith("Options") for node in tree.body):
            found[module.name] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def run_command(argv: Sequence[str]) -> int:
    """`samplewise run ...`: `argv` is the recipe's name and its options.

    A recipe module can end with `sys.exit(run_command(["its name", *sys.argv[1:]]))` under its `__main__` guard.
    """
    known = recipes()
    if not argv or argv[0] in ("-h", "--help"):
        print(_run_help(known))
        return OK if argv else USAGE
    name, options = argv[0], list(argv[1:])
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return _fail(
            f"samplewise run {name}: no recipe of that name; {hint}there are: {', '.join(known) or 'none'}", USAGE
        )
    try:
        importlib.import_module("jsonargparse")
        module = importlib.import_module(f"{samplewise.recipes.__name__}.{name}")
        return _run_recipe(name, module, options)
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "samplewise":
            raise
        reason = str(error) if "pip install" in str(error) else f"{error}. The recipes need more packages: {_EXTRA}"
        return _fail(f"samplewise run {name}: {reason}", FAILED)


def _run_recipe(name: str, module: ModuleType, argv: list[str]) -> int:
    from samplewise.recipes.assets import AssetError
    from samplewise.recipes.options import OptionErrors, help_text, read_options

    options_class = _options_class(module)
    prog = f"samplewise run {name}"
    if "-h" in argv or "--help" in argv:
        print(help_text(options_class, prog, module.__doc__))
        return OK
    try:
        options: object = read_options(options_class, argv)
    except OptionErrors as error:
        count = "1 mistake" if len(error.errors) == 1 else f"{len(error.errors)} mistakes"
        lines = "\n".join(f"  {line}" for line in error.errors)
        return _fail(f"{prog}: {count} in the options\n{lines}\n`{prog} --help` lists the options.", USAGE)
    try:
        module.run(options)
    except AssetError as error:
        return _fail(f"{prog}: {error}", FAILED)
    return OK


def _options_class(module: ModuleType) -> type:
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == module.__name__]
    found = [value for value in own if value.__name__.endswith("Options")]
    if len(found) != 1:
        raise TypeError(
            f"{module.__name__} must define exactly one dataclass ending in Options, and defines {len(found)}"
        )
    return found[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="samplewise",
        description="Decides what a model trains on next.",
        epilog="examples:\n  samplewise run prune --help\n  samplewise run prune --config my.yaml --epochs 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"samplewise {_version()}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    commands.add_parser("plugins", help="list the samplers that are installed, this package's and other packages'")
    commands.add_parser("run", help="run a recipe: samplewise run RECIPE [--option value ...]", add_help=False)
    commands.add_parser("doctor", help="show versions, extras, kernels and devices, and how to get what is missing")
    return parser


def _run_help(known: dict[str, str]) -> str:
    lines = _table(("recipe", "what it does"), list(known.items()), shutil.get_terminal_size().columns)
    return (
        "usage: samplewise run RECIPE [--config FILE] [--option value ...]\n\n"
        f"{lines}\n\n"
        "--config reads options from a YAML file (option: value); what the command line says wins over it.\n"
        "`samplewise run RECIPE --help` lists a recipe's options."
    )


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]], width: int) -> str:
    """Columns side by side; the second is folded so that lines fit into `width` characters where that is possible."""
    widths = [max(len(row[column]) for row in [titles, *rows]) for column in range(len(titles))]
    others = sum(widths) - widths[1] + 2 * (len(widths) - 1)
    widths[1] = min(widths[1], max(width - others, 30))
    return "\n".join(line for row in [titles, tuple("-" * w for w in widths), *rows] for line in _folded(row, widths))


def _folded(row: tuple[str, ...], widths: Sequence[int]) -> Iterator[str]:
    for number, part in enumerate(textwrap.wrap(row[1], widths[1]) or [""]):
        cells = [part if column == 1 else (cell if number == 0 else "") for column, cell in enumerate(row)]
        yield "  ".join(f"{cell:<{size}}" for cell, size in zip(cells, widths, strict=True)).rstrip()


def _version() -> str:
    try:
        return version("samplewise")
    except PackageNotFoundError:
        return "(not installed)"


def _fail(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

"""A recipe's options from YAML files and the command line, with every mistake reported in one message.

A recipe's options are one flat dataclass; `jsonargparse` knows its types and prints its help. It stops at the first
mistake, so each option is given to it alone here, and what is wrong is collected.
"""

from __future__ import annotations

import dataclasses
import re
import types
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

T = TypeVar("T")
COMMAND_LINE = "command line"
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}
_LISTS = (list, tuple, set, frozenset, Sequence)


class OptionErrors(ValueError):
    """All that is wrong with the given options; `errors` has one line for each."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


@dataclass(frozen=True)
class Given:
    """One option as the user gave it: a value of YAML, or the list of texts that followed `--key`."""

    key: str
    value: object
    where: str


def read_options(cls: type[T], argv: Sequence[str]) -> T:
    """Build the options dataclass `cls` from `argv`.

    `--config FILE`, any number of times, reads YAML; a later file wins over an earlier one, the command line over all.

    Args:
        cls: A dataclass. If it has a `validate()`, that is called; it raises ValueError with a line for each mistake.
        argv: Arguments such as `["--config", "fast.yaml", "--epochs", "3", "--methods", "uniform", "seta"]`.

    Raises:
        OptionErrors: Unknown options, values of a wrong type, unreadable files and broken rules, all of them together.
    """
    given, errors = _split(argv)
    hints = option_types(cls)
    values: dict[str, object] = {}
    for item in given:
        if item.key not in hints:
            errors.append(f"{_shown(item)}: no such option{_nearest(item, hints)}")
            continue
        try:
            hint = hints[item.key]
            values[item.key] = convert(hint, _text(hint, item.value) if item.where == COMMAND_LINE else item.value)
        except ValueError as error:
            errors.append(f"{_shown(item)}: {error}")
    missing = set(_required(cls)) - {item.key for item in given}
    errors += [f"--{name}: has no default, so it must be given" for name in sorted(missing)]
    options, broken = _build(cls, values)
    if options is None or errors or broken:
        raise OptionErrors([*errors, *broken])
    return options


def help_text(cls: type, prog: str, description: str | None) -> str:
    """The page that `samplewise run RECIPE --help` prints."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
        """Leaves the lines of the description as they are."""

    parser = ArgumentParser(prog=prog, description=description, allow_abbrev=False, formatter_class=Formatter)
    about = "YAML file of options; the command line wins over it"
    parser.add_argument("--config", metavar="FILE", action="append", help=about)
    parser.add_class_arguments(cls)
    return re.sub(r", --\w+\+ \S+", "", parser.format_help())  # jsonargparse's `--list+ ITEM`, which we do not read


def option_types(cls: type) -> dict[str, Any]:
    """Name -> type hint of the fields that a user can set."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def convert(hint: Any, value: object) -> object:
    """Turn YAML's value, or the command line's text, into what `hint` asks for.

    Raises:
        ValueError: It cannot be; the message names the value and the type.
    """
    from jsonargparse import ArgumentError

    if value is None and not _optional(hint):
        raise ValueError(f"needs a value: {describe(hint)}")
    if isinstance(value, str) and _is_list(hint) and not value.lstrip().startswith("["):
        value = [part.strip() for part in value.split(",") if part.strip()]
    shown = repr(value)  # the parser converts lists in place
    item = get_args(hint)[0] if get_origin(hint) is list else None
    known = get_args(item) if get_origin(item) is Literal else ()
    wrong = [part for part in value if part not in known] if known and isinstance(value, list) else []
    if wrong:
        raise ValueError(f"{wrong[0]!r} is not {describe(item)}; [] is an empty list")
    try:
        return _parser(hint).parse_object({"value": value}, defaults=False).value
    except (ArgumentError, TypeError, ValueError) as error:
        raise ValueError(f"{shown} is not {describe(hint)}") from error


def describe(hint: Any) -> str:
    """A type in words, for example `a whole number or null`, `one of adam, sgd`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _WORDS:
        return _WORDS[hint]
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple and Ellipsis not in arguments:
        return f"{len(arguments)} values ({', '.join(describe(argument) for argument in arguments)})"
    if origin in _LISTS:
        return f"a list, each {describe(arguments[0])}"
    if isinstance(hint, type) and hasattr(hint, "__members__"):
        return "one of " + ", ".join(hint.__members__)
    return getattr(hint, "__name__", str(hint))


def _split(argv: Sequence[str]) -> tuple[list[Given], list[str]]:
    files: list[Given] = []
    line: list[Given] = []
    errors: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--") or token == "--":
            errors.append(f"{token}: stands alone; options are given as --name value")
            continue
        name, equals, text = token[2:].partition("=")
        key = name.replace("-", "_")
        texts = [text] if equals else []
        while not equals and tokens and not tokens[0].startswith("--"):
            texts.append(tokens.pop(0))
        if key == "config":
            if not texts:
                errors.append("--config: needs a YAML file")
            for path in texts:
                _read_yaml(Path(path), files, errors)
        else:
            line.append(Given(key, texts, COMMAND_LINE))
    return files + line, errors


def _text(hint: Any, texts: Any) -> object:
    """What followed `--key`: a list of texts for a list, else one text; a switch (`--report`) may stand alone."""
    if not texts and hint is bool:
        return True
    if not texts:
        raise ValueError(f"needs a value: {describe(hint)}")
    if len(texts) == 1:
        return texts[0]
    if not _is_list(hint):
        raise ValueError(f"takes one value, not {len(texts)} ({' '.join(texts)}): {describe(hint)}")
    return texts


def _read_yaml(path: Path, given: list[Given], errors: list[str]) -> None:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        errors.append(f"--config {path}: cannot be read: {error.strerror or error}")
        return
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        errors.append(f"--config {path}: is not YAML: {' '.join(str(error).split())}")
        return
    if content is None:
        return
    if not isinstance(content, dict):
        errors.append(f"--config {path}: must hold lines of the form `option: value`")
        return
    given += [Given(str(key).replace("-", "_"), value, str(path)) for key, value in content.items()]


def _build(cls: type[T], values: dict[str, object]) -> tuple[T | None, list[str]]:
    """The options and the rules that they break; the options are None where one without a default is missing."""
    if any(name not in values for name in _required(cls)):
        return None, []
    try:
        options = cls(**values)
        validate = getattr(options, "validate", None)
        if validate is not None:
            validate()
    except (TypeError, ValueError) as error:
        return None, [line for line in str(error).splitlines() if line.strip()]
    return options, []


def _required(cls: Any) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.init and f.default is missing and f.default_factory is missing]


def _parser(hint: Any) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _is_list(hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_list(argument) for argument in get_args(hint))
    return (get_origin(hint) or hint) in _LISTS


def _optional(hint: Any) -> bool:
    return hint in (Any, None, type(None)) or type(None) in get_args(hint)


def _shown(item: Given) -> str:
    return f"--{item.key}" if item.where == COMMAND_LINE else f"{item.key} (in {item.where})"


def _nearest(item: Given, known: Iterable[str]) -> str:
    near = get_close_matches(item.key, list(known), n=1)
    return f"; did you mean {_shown(Given(near[0], None, item.where)).split()[0]}?" if near else ""

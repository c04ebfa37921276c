"""Checks of arguments, shared by all parts: an error names the argument, the rule and what was given."""

from __future__ import annotations

import importlib
import math
from operator import index
from typing import Any


def integer(owner: str, name: str, value: Any, low: int, high: int | None = None, *, what: str = "") -> int:
    """``value`` as an int, where it is one (numpy's and torch's count, a bool does not) in [low, high].

    Args:
        owner: class or function that the argument belongs to.
        name: the argument.
        value: what was given.
        low: smallest value allowed.
        high: largest value allowed, None for no limit.
        what: what the argument is, for the message.

    Raises:
        TypeError: no integer.
        ValueError: outside the range.
    """
    meaning = f"{name} is {what} and" if what else name
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{owner}({name}={value!r}): {meaning} must be an int.")
    if number < low or (high is not None and number > high):
        rule = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{owner}({name}={value!r}): {meaning} must be {rule}.")
    return number


def share(
    owner: str, name: str, value: Any, *, low: float = 0, high: float = 1, ends: str = "[]", what: str = ""
) -> float:
    """``value`` as a float, where it is a number in the interval from low to high.

    Args:
        owner: class or function that the argument belongs to.
        name: the argument.
        value: what was given.
        low: lower end.
        high: upper end.
        ends: ``"[]"``, ``"[)"``, ``"(]"`` or ``"()"``: which ends belong to the interval.
        what: what the argument is, for the message.

    Raises:
        TypeError: no number.
        ValueError: outside the interval, or NaN.
    """
    meaning = f"{name} is {what} and" if what else name
    rule = f"must be in {ends[0]}{low:g}, {high:g}{ends[1]}"
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number) and not isinstance(value, float):
        raise TypeError(f"{owner}({name}={value!r}): {meaning} must be a number; it {rule}.")
    if not low <= number <= high or (number == low and ends[0] == "(") or (number == high and ends[1] == ")"):
        raise ValueError(f"{owner}({name}={value!r}): {meaning} {rule}.")
    return number


def choice(owner: str, name: str, value: object, *choices: str) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        raise ValueError(f"{owner}({name}={value!r}): {name} must be one of {', '.join(map(repr, choices))}.")


def optional_import(owner: str, module: str, extra: str) -> Any:
    """A module that only an extra installs.

    Args:
        owner: class or function that needs it.
        module: its import name.
        extra: the extra that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{owner} needs {module}: pip install 'samplewise[{extra}]'", name=module) from error

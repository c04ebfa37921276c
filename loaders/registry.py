"""The samplers that are installed, found by entry point and never by name.

A distribution registers a sampler in the entry-point group `samplewise.plugins`; this package's own are registered in
the same way. A dotted path (`package.module:Class`) reaches a class that nobody registered.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from samplewise.loaders.sampler import PlannedSampler

GROUP = "samplewise.plugins"
_OWN = "samplewise"


@dataclass(frozen=True)
class Registration:
    """One row of the registry: a sampler, or the reason why it cannot be had.

    Attributes:
        name: The registered name, for example the one that `resolve` takes.
        target: Where the class is, as `package.module:Class`.
        source: The distribution that registered it, with its version.
        sampler: The class; None when it could not be loaded.
        error: Why it could not be loaded; None when it could.
    """

    name: str
    target: str
    source: str
    sampler: type[PlannedSampler] | None = None
    error: str | None = None


def registrations() -> list[Registration]:
    """All registered samplers, this package's own first, then by distribution and name.

    A plugin that fails to import, or that claims a name already taken, keeps its row and has `error` set: one broken
    distribution never hides the others.
    """
    rows: dict[str, Registration] = {}
    refused = []
    for entry in sorted(entry_points(group=GROUP), key=_order):
        row = _load(entry)
        if entry.name not in rows:
            rows[entry.name] = row
        elif (first := rows[entry.name]).target != row.target:
            error = f"the name {entry.name!r} is taken by {first.source}: use {row.target}"
            refused.append(Registration(row.name, row.target, row.source, None, error))
    return [*rows.values(), *refused]


def available_samplers() -> dict[str, type[PlannedSampler]]:
    """Registered name -> class, of the samplers that can be loaded (see `registrations` for the others)."""
    return {row.name: row.sampler for row in registrations() if row.sampler is not None}


def resolve(name: str) -> type[PlannedSampler]:
    """Find a sampler class by its registered name or by a dotted path.

    Args:
        name: A registered name, `package.module:Class` or `package.module.Class`.

    Raises:
        ValueError: Nothing of that name is registered (the message lists what is), or it cannot be imported.
        TypeError: The dotted path leads to something that is not a sampler class.
    """
    if not isinstance(name, str):
        raise TypeError(f"resolve(name={name!r}): name is a registered sampler's name or a dotted path to a class")
    rows = {row.name: row for row in reversed(registrations())}
    if name in rows:
        row = rows[name]
        if row.sampler is None:
            raise ValueError(f"resolve(name={name!r}): {row.target} of {row.source} cannot be loaded: {row.error}")
        return row.sampler
    module, _, attribute = name.rpartition(":") if ":" in name else name.rpartition(".")
    if not module or not attribute:
        near = get_close_matches(name.lower(), rows, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(sorted(rows)) or "none"
        raise ValueError(
            f"resolve(name={name!r}): no sampler of that name; {hint}registered: {known}; or give a dotted path"
        )
    try:
        found = _attribute(module, attribute)
    except Exception as error:
        raise ValueError(f"resolve(name={name!r}): cannot be imported: {_reason(error)}") from error
    if fault := _fault(found):
        raise TypeError(f"resolve(name={name!r}): {fault}")
    return cast("type[PlannedSampler]", found)


def _order(entry: EntryPoint) -> tuple[bool, str, str]:
    owner = entry.dist.name if entry.dist else ""
    return owner != _OWN, owner, entry.name


def _load(entry: EntryPoint) -> Registration:
    source = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"
    try:
        found = entry.load()
    except Exception as error:  # whatever a third party's import raises
        return Registration(entry.name, entry.value, source, None, _reason(error))
    if fault := _fault(found):
        return Registration(entry.name, entry.value, source, None, fault)
    return Registration(entry.name, entry.value, source, found)


def _attribute(module: str, attribute: str) -> object:
    found: object = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _fault(found: object) -> str | None:
    if not isinstance(found, type) or not issubclass(found, PlannedSampler):
        return f"{found!r} is not a subclass of {PlannedSampler.__module__}.{PlannedSampler.__qualname__}"
    if getattr(found.plan, "__isabstractmethod__", False):
        return f"{found.__qualname__} is abstract: it must define plan()"
    return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"

"""What a saved sampler must hold and agree on before anything is loaded from it."""

from __future__ import annotations

from typing import Any

VERSION = 1
_ENTRIES = {"size", "epoch", "cursor", "total", "segments", "ledger"}
_NEWER = {"arrange": None, "ranks": None, "begin": 0, "world": None, "sharded": False}  # the first states lack them


def checked_state(name: str, state: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """The state, complete and of this version.

    Args:
        name: the sampler's class, for the error.
        state: what was saved.
        identity: entries that must be equal in both.

    Raises:
        ValueError: it is damaged, of another version, or differs in ``identity``.
    """
    if state.get("version") != VERSION:
        raise ValueError(f"{name} state: version {state.get('version')} was saved, this release reads {VERSION}.")
    state = {**_NEWER, **state}
    if missing := {*_ENTRIES, *identity} - state.keys():
        raise ValueError(f"{name} state: it lacks {', '.join(sorted(missing))}; it is damaged, or no sampler's.")
    for key, own in identity.items():
        if state[key] != own:
            was = f"{name} state: it was saved with {key}={state[key]!r}, this one has {own!r}"
            raise ValueError(f"{was}; resume with the same {key}.")
    return state

"""The training-loop side: Lightning callbacks, the report and learning-rate schedules by budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samplewise.callbacks.budget import BudgetSchedule

if TYPE_CHECKING:
    from samplewise.callbacks.bits import SwitchBits
    from samplewise.callbacks.lightning import SamplingCallback
    from samplewise.callbacks.negatives import RefreshHardNegatives
    from samplewise.callbacks.report import SamplingReport
    from samplewise.callbacks.self_tokens import RefreshSelfTokens

__all__ = [
    "BudgetSchedule",
    "RefreshHardNegatives",
    "RefreshSelfTokens",
    "SamplingCallback",
    "SamplingReport",
    "SwitchBits",
]

_EXTRAS = {
    "RefreshHardNegatives": ("negatives", "lightning"),
    "RefreshSelfTokens": ("self_tokens", "lightning,hf"),
    "SamplingCallback": ("lightning", "lightning"),
    "SamplingReport": ("report", "lightning,report"),
    "SwitchBits": ("bits", "lightning"),
}


def __getattr__(name: str) -> Any:
    """Import what needs an extra when it is asked for."""
    if name not in _EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, extras = _EXTRAS[name]
    try:
        return getattr(import_module(f"{__name__}.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("samplewise"):
            raise
        raise ImportError(f"{name} needs {error.name}: pip install 'samplewise[{extras}]'") from error

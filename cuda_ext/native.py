"""Loads the native kernels, where they were built, and says why not, where they were not.

Building them: ``pip install --no-build-isolation .`` with torch and a C++ compiler there (setup.py). Set the
environment variable SAMPLEWISE_NATIVE to ``0`` to leave them out when samplewise is imported, so that the references
run, or to the path of another shared library to load that one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

SWITCH = "SAMPLEWISE_NATIVE"
BUILD = "pip install --no-build-isolation . (with torch and a C++ compiler there) builds them"


def load() -> str:
    """Load the kernels, and say in one line what was loaded or why nothing was; never raises but for a path given."""
    choice = os.environ.get(SWITCH, "auto")
    library = Path(choice) if os.sep in choice else Path(__file__).with_name("_native.so")
    if choice == "0":
        return f"not loaded: {SWITCH}=0"
    if not library.exists() and os.sep not in choice:
        return f"not built: {BUILD}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        if os.sep in choice:
            raise
        return f"{library} could not be loaded: {error}"
    return f"loaded: {library}"

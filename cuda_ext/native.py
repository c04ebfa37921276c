"""Loads the native kernels, where they were built, and says why not, where they were not.

``pip install --no-build-isolation .`` builds them, with torch and a C++ compiler there (setup.py). Set the environment
variable SAMPLEWISE_NATIVE to ``0`` to leave them out when samplewise is imported, so that the references run, or to the
path of another shared library to load that one alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

SWITCH = "SAMPLEWISE_NATIVE"


def load() -> dict[str, str]:
    """Load the kernels for each device; gives a line for each: what was loaded, or why nothing was.

    Raises:
        OSError: SAMPLEWISE_NATIVE names a library that cannot be loaded.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice == "0":
        return dict.fromkeys(("CPU", "CUDA"), f"not loaded: {SWITCH}=0")
    if os.sep in choice:
        torch.ops.load_library(choice)
        return dict.fromkeys(("CPU", "CUDA"), f"what {choice} holds ({SWITCH})")
    return {
        "CPU": _load("_cpu.so", "torch and a C++ compiler"),
        "CUDA": _load("_cuda.so", "torch, a C++ compiler and nvcc")
        if torch.version.cuda
        else "not loaded: this torch is built without CUDA",
    }


def _load(name: str, needs: str) -> str:
    library = Path(__file__).with_name(name)
    if not library.exists():
        return f"not built: pip install --no-build-isolation . builds them, with {needs} there"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"not loaded: {error}"
    return f"loaded: {library}"

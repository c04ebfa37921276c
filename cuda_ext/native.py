"""Loads the native kernels, where they were built, and says why not, where they were not.

``pip install --no-build-isolation .`` builds them, with torch and a C++ compiler there (setup.py). When samplewise is
imported, the environment variable SAMPLEWISE_NATIVE says which are loaded: ``auto`` or ``cuda`` all that were built,
``cpu`` those for the CPU, ``0`` none, so that the references run; the path of a shared library loads that one alone.
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
        ValueError: it is none of the above.
    """
    choice = os.environ.get(SWITCH, "auto")
    if choice == "0":
        return dict.fromkeys(("CPU", "CUDA"), f"not loaded: {SWITCH}=0")
    if os.sep in choice:
        torch.ops.load_library(choice)
        return dict.fromkeys(("CPU", "CUDA"), f"what {choice} holds ({SWITCH})")
    if choice not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"{SWITCH}={choice}: it must be auto, cpu, cuda or 0, or the path of a library with a '{os.sep}'."
        )
    if choice == "cpu":
        cuda = f"not loaded: {SWITCH}=cpu"
    elif not torch.version.cuda:
        cuda = "not loaded: this torch is built without CUDA"
    else:
        cuda = _load("_cuda.so", "torch, a C++ compiler and nvcc")
    return {"CPU": _load("_cpu.so", "torch and a C++ compiler"), "CUDA": cuda}


def _load(name: str, needs: str) -> str:
    library = Path(__file__).with_name(name)
    if not library.exists():
        return f"not built: pip install --no-build-isolation . builds them, with {needs} there; -v shows what fails"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"not loaded: {error}"
    return f"loaded: {library}"

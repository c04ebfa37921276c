"""What `samplewise doctor` prints: versions, extras, kernels, devices, worker processes and the cache folder."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch

import samplewise.cuda_ext.ops as ops
from samplewise.cuda_ext import NATIVE
from samplewise.recipes.assets import cache_folder

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(?:\[(?P<extras>[^\]]*)\])?\s*(?P<spec>[^;]*)(?:;.*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)
_DEVICES = ("CPU", "CUDA")


def report() -> str:
    """The whole page, one section a topic."""
    sections = {
        "Versions": versions(),
        "Extras": extras(),
        "Kernels": kernels(),
        "Devices": devices(),
        "Surroundings": surroundings(),
    }
    return "\n\n".join("\n".join([title, *_aligned(rows)]) for title, rows in sections.items())


def versions() -> list[tuple[str, str]]:
    """Python, this package, and what it always needs."""
    rows = [
        ("python", f"{platform.python_version()} ({sys.executable})"),
        ("samplewise", installed("samplewise") or "not installed"),
    ]
    rows += [(name, _state(name, spec)) for name, _, spec, extra in requirements() if extra is None]
    return rows


def extras() -> list[tuple[str, str]]:
    """Each extra: the versions that are there, or the line that installs it."""
    rows = []
    for extra in dict.fromkeys(extra for *_, extra in requirements() if extra is not None):
        needed = list(_needed(extra))
        missing = [name for name, spec in needed if not satisfied(name, spec)]
        if missing:
            rows.append((extra, f"missing {', '.join(missing)}: pip install 'samplewise[{extra}]'"))
        else:
            rows.append((extra, ", ".join(f"{name} {installed(name)}" for name, _ in needed)))
    return rows


def kernels() -> list[tuple[str, str]]:
    """What became of the kernels, then for each operator what serves it on each device, as the dispatcher has it."""
    prefix = f"{ops.NAMESPACE}::"
    names = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix))
    return [(f"{device} kernels", line) for device, line in NATIVE.items()] + [
        (name.removeprefix(prefix), ", ".join(f"{device}: {served_by(name, device)}" for device in _DEVICES))
        for name in names
    ]


def served_by(operator: str, device: str) -> str:
    """Who computes `operator` (`namespace::name`) on `device` (`CPU` or `CUDA`): native, reference or none."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(operator, device):
        return "native"
    return "reference (Python)" if torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, device) else "none"


def devices() -> list[tuple[str, str]]:
    """The CPU, and each GPU that torch sees."""
    rows = [("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [
            *rows,
            ("cuda", "none" if torch.backends.cuda.is_built() else "none (this torch is built without CUDA)"),
        ]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"))
    return rows


def surroundings() -> list[tuple[str, str]]:
    """How DataLoader starts its workers, and where downloads are kept."""
    folder = cache_folder()
    return [
        ("DataLoader workers", f"started by {multiprocessing.get_start_method()}"),
        ("cache folder", f"{folder} ({'exists' if folder.exists() else 'made when needed'}; SAMPLEWISE_CACHE sets it)"),
    ]


def requirements() -> list[tuple[str, list[str], str, str | None]]:
    """This package's requirements as (name, extras of it, version rule, the extra of ours that asks for it or None)."""
    try:
        lines = requires("samplewise") or []
    except PackageNotFoundError:
        return []
    found = []
    for line in lines:
        if match := _REQUIREMENT.match(line):
            wanted = [part.strip() for part in (match["extras"] or "").split(",") if part.strip()]
            found.append((match["name"], wanted, match["spec"].strip(), match["extra"]))
    return found


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def satisfied(name: str, spec: str) -> bool:
    """Whether a distribution is there and at least as new as a `>=` in `spec` asks for."""
    found = installed(name)
    lowest = re.search(r">=\s*([\d.]+)", spec)
    return found is not None and (lowest is None or _numbers(found) >= _numbers(lowest[1]))


def _needed(extra: str) -> Iterator[tuple[str, str]]:
    for name, inner, spec, asked_by in requirements():
        if asked_by == extra and name == "samplewise":
            for other in inner:
                yield from _needed(other)
        elif asked_by == extra:
            yield name, spec


def _state(name: str, spec: str) -> str:
    found = installed(name)
    if found is None:
        return f"not installed: pip install '{name}{spec}'"
    return found if satisfied(name, spec) else f"{found}, too old: pip install '{name}{spec}'"


def _numbers(text: str) -> tuple[int, ...]:
    numbers = [int(part) for part in re.match(r"[\d.]*", text)[0].split(".") if part]  # type: ignore[index]
    return tuple(numbers + [0] * (4 - len(numbers)))


def _aligned(rows: list[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows] or ["  none"]

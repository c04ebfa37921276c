"""That the kernels are there where they can be, and what is said where they are not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from samplewise.cuda_ext import NATIVE, native, ops

HERE = Path(native.__file__).parent
OPS = ("ledger_update", "permutation", "draw", "histogram", "sample_losses", "sample_losses_backward")
switched_off = pytest.mark.skipif(
    os.environ.get(native.SWITCH, "auto") not in ("auto", "cpu", "cuda"), reason=f"{native.SWITCH} is set"
)


def python(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@switched_off
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", OPS)
def test_the_cpu_kernels_are_loaded_where_a_compiler_is(name):
    assert NATIVE["CPU"].startswith("loaded: ")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.NAMESPACE}::{name}", "CPU")


@switched_off
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_cuda_kernels_are_compiled_where_nvcc_is_and_load_on_any_torch():
    """Even on a CPU build, which lacks the current stream's symbol: it is weak."""
    registered = "[torch._C._dispatch_has_kernel_for_dispatch_key('samplewise::' + name, 'CUDA') for name in OPS]"
    load = f"torch.ops.load_library({str(HERE / '_cuda.so')!r})"
    done = python(f"import torch, samplewise.cuda_ext; OPS = {OPS}; {load}; print(all({registered}))")
    assert done.stdout == "True\n", done.stderr


def test_a_library_that_does_not_load_is_named_and_the_references_run(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    (tmp_path / "_cpu.so").write_text("no library")
    monkeypatch.setenv(native.SWITCH, "auto")
    assert native.load()["CPU"].startswith("not loaded: ")
    (tmp_path / "_cpu.so").unlink()
    assert native.load()["CPU"].startswith("not built: pip install --no-build-isolation")


def test_the_switch():
    code = "from samplewise.cuda_ext import NATIVE, ops; print(NATIVE['CPU'], ops.permutation(3, 0, 0, 3).tolist())"
    assert python(code, SAMPLEWISE_NATIVE="0").stdout.startswith("not loaded: SAMPLEWISE_NATIVE=0 [")
    assert "SAMPLEWISE_NATIVE=off: it must be auto, cpu, cuda or 0" in python(code, SAMPLEWISE_NATIVE="off").stderr
    missing = python(code, SAMPLEWISE_NATIVE="/nowhere/kernels.so")
    assert "OSError" in missing.stderr
    assert "/nowhere/kernels.so" in missing.stderr

"""Builds the native kernels where torch and a compiler are, and a pure Python package where not.

SAMPLEWISE_NATIVE: auto (default) builds what it can; cpu insists on the CPU kernels, and builds no others; cuda insists
on both kinds; 0 builds none. CUDA kernels need nvcc on the path, but no CUDA build of torch: only its stable headers
are used, so that what is built here loads on torch 2.11 and all later ones, whatever the Python.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if (
    int(setuptools.__version__.split(".")[0]) < 77
):  # pyproject.toml says so, but --no-build-isolation takes what is there
    raise SystemExit("samplewise needs setuptools 77 or newer to be built: pip install 'setuptools>=77,<82'")
from setuptools.command.bdist_wheel import bdist_wheel

CHOICE = os.environ.get("SAMPLEWISE_NATIVE", "auto")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
TORCH = importlib.util.find_spec("torch")
TORCH = TORCH if TORCH and TORCH.origin else None  # not just a folder of that name
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU = ["-ffp-contract=off", "-fno-wrapv", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
CUDA = ["--fmad=false", "-DUSE_CUDA", "-Xcompiler=-fPIC", "-shared", "-cudart=static", "-lineinfo"]
CUDA += ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
LINK = ["-ltorch", "-ltorch_cpu"]
if sys.platform == "linux":
    LINK.insert(0, "--no-as-needed")  # so that the current CUDA stream's symbol is found, which is weak

if CHOICE not in ("auto", "cpu", "cuda", "0"):
    raise SystemExit(f"SAMPLEWISE_NATIVE={CHOICE}: when building it must be auto, cpu, cuda or 0")
if CHOICE in ("cpu", "cuda") and not TORCH:
    raise SystemExit(f"SAMPLEWISE_NATIVE={CHOICE}: torch is not there; install it first, then use --no-build-isolation")
if CHOICE == "cuda" and not NVCC:
    raise SystemExit("SAMPLEWISE_NATIVE=cuda: nvcc is not on the path; install the CUDA toolkit, or use auto or cpu")


def kernels(name, pattern, **options):
    """One plain shared library, not a Python module."""
    root = Path(TORCH.origin).parent
    folders = {"include_dirs": [f"{root}/include"], "library_dirs": [f"{root}/lib"]}
    sources = sorted(map(str, Path("cuda_ext/csrc").glob(pattern)))
    headers = sorted(map(str, Path("cuda_ext/csrc").glob("*.h")))
    return Extension(f"samplewise.cuda_ext.{name}", sources, depends=headers, **folders, **options)


class Build(build_ext):
    """The C++ compiler builds one library, nvcc the other."""

    def get_ext_filename(self, name):
        """Without the tag of a Python version."""
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension):
        """Compile and link."""
        if not extension.name.endswith("_cuda"):
            return super().build_extension(extension)
        target = self.get_ext_fullpath(extension.name)
        self.mkpath(os.path.dirname(target))
        folders = [f"-I{extension.include_dirs[0]}", f"-L{extension.library_dirs[0]}"]
        self.spawn([NVCC, *FLAGS, *CUDA, *folders, *extension.sources, "-o", target, "-Xlinker=" + ",".join(LINK)])


class Wheel(bdist_wheel):
    """One wheel for every Python."""

    def get_tag(self):
        """Of the platform only."""
        return ("py3", "none", super().get_tag()[2])


for stale in Path("build").glob("lib*/samplewise/cuda_ext/*.so"):  # which would go into the wheel
    stale.unlink()
extensions = []
if TORCH and CHOICE != "0":
    link = [f"-Wl,{flag}" if flag.startswith("--") else flag for flag in LINK]
    extensions = [
        kernels("_cpu", "*.cpp", extra_compile_args=FLAGS + CPU, extra_link_args=link, optional=CHOICE == "auto")
    ]
    if NVCC and CHOICE != "cpu":
        extensions.append(kernels("_cuda", "*.cu", optional=CHOICE == "auto"))
setup(ext_modules=extensions, cmdclass={"build_ext": Build, "bdist_wheel": Wheel})

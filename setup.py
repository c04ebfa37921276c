"""Builds the native kernels where torch and a compiler are, and a pure Python package where not.

SAMPLEWISE_NATIVE: auto (default) builds what it can; cpu, or cuda, insists on the CPU, or on both kinds of kernels; 0
builds none. CUDA kernels need nvcc on the path (or CUDA_HOME) and no CUDA build of torch: only its stable headers are
used, so that one library loads on torch 2.11 and all later ones.
"""

import os
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

CHOICE = os.environ.get("SAMPLEWISE_NATIVE", "auto")
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CUDA = [
    "--fmad=false",
    "-DUSE_CUDA",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
]
SOURCES = Path("cuda_ext/csrc")
try:
    import torch

    ROOT = Path(torch.__file__).parent
except ImportError:
    ROOT = None
NVCC = shutil.which("nvcc") or shutil.which(os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc"))


class BuildKernels(build_ext):
    """One plain shared library, no Python module: it is the same for every Python."""

    def get_ext_filename(self, name):
        return os.path.join(*name.split(".")) + ".so"

    def build_extension(self, extension):
        if CHOICE in ("auto", "cuda") and NVCC:
            for source in sorted(map(str, SOURCES.glob("*.cu"))):
                target = os.path.join(self.build_temp, Path(source).stem + ".cu.o")
                self.mkpath(self.build_temp)
                self.spawn([NVCC, *FLAGS, *CUDA, "-Xcompiler=-fPIC", f"-I{ROOT}/include", "-c", source, "-o", target])
                extension.extra_objects.append(target)
            extension.libraries.append("cudart_static")
            extension.library_dirs.append(str(Path(NVCC).resolve().parents[1] / "lib64"))
        super().build_extension(extension)


class Wheel(bdist_wheel):
    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


kernels = Extension(
    "samplewise.cuda_ext._native",
    sorted(map(str, SOURCES.glob("*.cpp"))),
    depends=sorted(map(str, SOURCES.glob("*.[hc]*"))),
    include_dirs=[f"{ROOT}/include"],
    library_dirs=[f"{ROOT}/lib"],
    extra_compile_args=[*FLAGS, "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"],
    extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"],
    optional=CHOICE == "auto",
)
if CHOICE == "cuda" and not NVCC:
    raise SystemExit("SAMPLEWISE_NATIVE=cuda: there is no nvcc on the path; install the CUDA toolkit, or use auto")
if CHOICE in ("cpu", "cuda") and ROOT is None:
    raise SystemExit(f"SAMPLEWISE_NATIVE={CHOICE}: torch cannot be imported; install it and use --no-build-isolation")
setup(
    ext_modules=[kernels] if ROOT and CHOICE != "0" else [], cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel}
)

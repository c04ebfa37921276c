import textwrap

import pytest

from samplewise.loaders.registry import GROUP, available_samplers, registrations, resolve
from samplewise.loaders.sampler import PlannedSampler
from samplewise.plugins import SeTa, Uniform

MODULE = """
import numpy as np
from samplewise.loaders import Plan, PlannedSampler

class Newest(PlannedSampler):
    '''The newest samples only.'''

    def plan(self, epoch, rng):
        return Plan(np.arange(self.size // 2, self.size))

class Outer:
    Inner = Newest

class Abstract(PlannedSampler):
    '''Without plan().'''

def function():
    '''Not a class.'''
"""


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A function that installs a distribution with the given entry points: `name = target` lines."""

    def install(*lines, name="third_party", version="2.1"):
        (tmp_path / "third_party_samplers.py").write_text(textwrap.dedent(MODULE))
        (tmp_path / "broken_samplers.py").write_text("import a_module_that_nobody_has\n")
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        (folder / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))

    monkeypatch.syspath_prepend(tmp_path)
    return install


def test_own_samplers_are_found():
    found = available_samplers()
    assert found["uniform"] is Uniform
    assert found["seta"] is SeTa
    assert set(found) >= {"uniform", "rs2", "infobatch", "seta"}
    assert all(issubclass(sampler, PlannedSampler) for sampler in found.values())
    assert all(row.error is None and row.source.startswith("samplewise ") for row in registrations())


def test_third_party_sampler_is_found(third_party):
    third_party("newest = third_party_samplers:Newest")
    (row,) = [row for row in registrations() if row.name == "newest"]
    assert (row.source, row.target, row.error) == ("third-party 2.1", "third_party_samplers:Newest", None)
    assert resolve("newest") is row.sampler is available_samplers()["newest"]
    assert list(resolve("newest")(4, shuffle=False)) == [2, 3]
    assert registrations()[-1] == row, "this package's own come first"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("broken_samplers:Anything", "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"),
        ("nowhere_at_all:Sampler", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("third_party_samplers:Missing", "has no attribute 'Missing'"),
        ("third_party_samplers:function", "is not a subclass of samplewise.loaders.sampler.PlannedSampler"),
        ("third_party_samplers:Outer", "is not a subclass of"),
        ("third_party_samplers:Abstract", "Abstract is abstract: it must define plan()"),
    ],
)
def test_broken_plugin_has_a_row_and_hides_nobody(third_party, target, reason):
    third_party(f"odd = {target}", "newest = third_party_samplers:Newest")
    (row,) = [row for row in registrations() if row.name == "odd"]
    assert row.sampler is None
    assert reason in row.error
    assert {"uniform", "newest"} <= set(available_samplers())
    assert "odd" not in available_samplers()
    with pytest.raises(ValueError, match=r"resolve\(name='odd'\): .* of third-party 2.1 cannot be loaded"):
        resolve("odd")


def test_a_name_is_not_taken_twice(third_party):
    third_party("uniform = third_party_samplers:Newest")
    rows = [row for row in registrations() if row.name == "uniform"]
    assert [row.sampler for row in rows] == [Uniform, None]
    assert rows[1].error.startswith("the name 'uniform' is taken by samplewise ")
    assert "third_party_samplers:Newest" in rows[1].error
    assert resolve("uniform") is Uniform
    assert resolve("third_party_samplers:Newest").__name__ == "Newest"


@pytest.mark.parametrize(
    "name", ["third_party_samplers:Newest", "third_party_samplers.Newest", "third_party_samplers:Outer.Inner"]
)
def test_dotted_path(third_party, name):
    third_party()
    assert resolve(name).__name__ == "Newest"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("Unifrom", ValueError, "no sampler of that name; did you mean 'uniform'.* registered: .*rs2.*uniform"),
        ("zzzz", ValueError, "no sampler of that name; registered: "),
        ("", ValueError, "no sampler of that name"),
        ("nowhere_at_all:Sampler", ValueError, "No module named 'nowhere_at_all'"),
        ("nowhere_at_all.Sampler", ValueError, "No module named 'nowhere_at_all'"),
        ("math:tau", TypeError, "is not a subclass of"),
        ("math.nothing", ValueError, "has no attribute 'nothing'"),
        (".Sampler", ValueError, "no sampler of that name"),
        ("math:", ValueError, "no sampler of that name"),
        ("samplewise.loaders:PlannedSampler", TypeError, "is abstract"),
        (Uniform, TypeError, "a registered sampler's name or a dotted path"),
    ],
)
def test_resolve_says_what_is_wrong(name, error, message):
    with pytest.raises(error, match=message) as caught:
        resolve(name)
    assert str(caught.value).startswith(f"resolve(name={name!r})")

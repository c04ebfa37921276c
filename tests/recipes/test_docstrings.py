"""Docstrings: which functions are taken, their code and their first sentences."""

import gc

import pytest

from samplewise.recipes.docstrings import CHARACTERS, Documented, documented, first_sentence, unique

MODULE = '''
"""A module of some words that is not a function."""
import functools

@functools.cache
def area(width, height=1):  # of a rectangle
    """Return the area
    of a rectangle. It is cached.

    More words.
    """

    # simple
    return width * height

class Shape(Base):
    """A class of shapes with words of its own."""

    @property
    async def äußere(self):
        r\'\'\'Give the outer "hull" of it!\'\'\'
        text = """
kept"""
        return text

    def sides(self): """Give the number of sides."""; return 3
    def corners(self):
        """Give the number of corners."""; return 3
    def abstract(self):
        """Give what subclasses know of."""
        raise NotImplementedError
    def stub(self) -> int:
        """Give what nobody knows of."""
        ...
    def bare(self):
        """Give nothing, with words only."""
    def _private(self):
        """Give what is nobody's business."""
        return 1
    def __len__(self):
        """Give the length of the shape."""
        return 1
    class Inner:
        def deep(self):
            """Give what lies deep inside."""
            def nested():
                """Give what lies deeper still."""
                return 2
            return nested()

class _Hidden:
    def inside(self):
        """Give what is in hiding here."""
        return 1

def test_area():
    """Give a test of the area."""
    assert area(1) == 1

def long(x):
    """Give the sum of very many."""
    return x + LONG

def short(x):
    """Too short."""
    return x
'''.replace("LONG", " + ".join(["1"] * CHARACTERS))
FUNCTIONS = {
    "Return the area of a rectangle.": "def area(width, height=1):  # of a rectangle\n"
    "    # simple\n    return width * height",
    "Give what lies deep inside.": "def deep(self):\n"
    '    def nested():\n        """Give what lies deeper still."""\n        return 2\n    return nested()',
}  # fmt: skip


def test_functions_of_a_module(tmp_path):
    (tmp_path / "shapes.py").write_text(MODULE, encoding="utf-8")
    found = documented(tmp_path, "package")
    assert {entry.sentence: entry.code for entry in found if "outer" not in entry.sentence} == FUNCTIONS
    assert {entry.module for entry in found} == {"package/shapes.py"}


def test_texts_in_a_body_keep_its_margin(tmp_path):
    """A text that begins at the margin keeps the function from moving there; it is left out."""
    (tmp_path / "shapes.py").write_text(MODULE.replace("\nkept", "\n        kept"), encoding="utf-8")
    found = {entry.sentence: entry.code for entry in documented(tmp_path, "package")}
    assert (
        found['Give the outer "hull" of it!'] == 'async def äußere(self):\n    text = """\n    kept"""\n    return text'
    )


def test_tests_and_what_is_no_python_are_left_out(tmp_path):
    code = 'def f(x):\n    """Return what it was given."""\n    return x\n'
    for name in ("a/tests/b.py", "a/test_b.py", "a/b_test.py", "conftest.py", "testing/b.py", "a/contest.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    (tmp_path / "template.py").write_text(code + "{{ here }} is = something\n")
    (tmp_path / "bytes.py").write_bytes(b'x = "\x00\xff"\n' + code.encode())
    assert [entry.module for entry in documented(tmp_path, "p")] == ["p/a/contest.py"]


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the sum of both.\n\n    More of it.", "Return the sum of both."),
        ("\n    Return the\n      sum of both. And more.", "Return the sum of both."),
        ("Return x.y of both (e.g. 1.5 m). More", "Return x.y of both (e.g. 1.5 m)."),
        ("Is it the sum of both? Yes.", "Is it the sum of both?"),
        ("Hours without zeros, i.e. Five. More", "Hours without zeros, i.e. Five."),
        ("Return the sum.", ""),  # too short
        ("Return " + "very " * 30 + "much.", ""),
        ("Return the sum of both", ""),  # no end
        ("Return the sum of both, which is::\n\n    1", ""),
        ("The sum\n=======\nReturn the sum of both.", ""),
        (".. deprecated:: 1.0 of this package.", ""),
        (":return: the sum of all the numbers.", ""),
        ("Return :func:`sum` of both numbers.", ""),
        ("", ""),
    ],
)
def test_first_sentences(docstring, sentence):
    assert first_sentence(docstring) == sentence


def test_twins_are_left_out():
    entries = [
        Documented("def f(): 1", "Return the one.", "a"),
        Documented("def g(): 1", "return  the One.", "b"),
        Documented("def f():\n  1", "Return the other.", "b"),
        Documented("def h(): 1", "Return the third.", "b"),
    ]
    assert unique(entries) == [entries[0], entries[3]]


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_said_of_others_code_and_collection_goes_on_as_before(tmp_path, recwarn, enabled):
    (tmp_path / "a.py").write_text('def f(x):\n    """Return the \\d of it."""\n    return x is 1\n')
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        assert len(documented(tmp_path, "p")) == 1
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert [str(warning.message) for warning in recwarn] == []

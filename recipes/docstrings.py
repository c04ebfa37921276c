"""Short functions and the first sentences of their docstrings, from the sources of a package, which is never run."""

import ast
import contextlib
import gc
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHARACTERS = 350
"""Longer functions are left out; without the docstring."""

WORDS = range(4, 26)
"""Of a sentence that is used."""

SENTENCE = re.compile(r".+?(?<![ie]\.[eg])[.!?](?=\s+[^a-z\s]|$)")
MARKUP = re.compile(r"^[^\w`'\"(*]|:\w+:|>>>|\.\. |--|==|~~|::|[^\x20-\x7e]")
TESTS = re.compile(r"^(tests?|testing|conftest|test_.*|.*_tests?)$")


@dataclass(frozen=True)
class Documented:
    """A function without decorators and docstring, the docstring's first sentence, its module (`package/file.py`)."""

    code: str
    sentence: str
    module: str

    @property
    def signature(self) -> str:
        """The function's first line, its arguments on it."""
        node = ast.parse(self.code).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
        return f"{start} {node.name}({ast.unparse(node.args)}):"


def documented(folder: Path, package: str) -> list[Documented]:
    """The short, documented, public functions and methods of all modules under `folder` but tests, in their order."""
    found: list[Documented] = []
    with _parsing():
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if not any(TESTS.match(name) for name in inside.with_suffix("").parts):
                text = path.read_text(encoding="utf-8", errors="replace")
                found += _of_module(text, f"{package}/{inside.as_posix()}")
    return found


def first_sentence(docstring: str) -> str:
    r"""It, on one line; "" where it is no plain sentence of `WORDS` words.

    >>> first_sentence("Return the degree\n    of a node, e.g. of `n`. Nodes are hashable.")
    'Return the degree of a node, e.g. of `n`.'
    >>> first_sentence("The degree.")
    ''
    """
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip())[0].split())
    match = SENTENCE.match(paragraph)
    sentence = match[0] if match else ""
    return sentence if len(sentence.split()) in WORDS and not MARKUP.search(sentence) else ""


def unique(entries: Iterable[Documented]) -> list[Documented]:
    """The first of those that share a sentence or their code."""
    kept, seen = [], set[str]()
    for entry in entries:
        marks = {" ".join(text.casefold().split()) for text in (entry.sentence, entry.code)}
        if seen.isdisjoint(marks):
            kept.append(entry)
            seen |= marks
    return kept


def _of_module(text: str, module: str) -> Iterator[Documented]:
    if '"""' not in text:
        return
    try:
        tree = ast.parse(text)
    except (SyntaxError, RecursionError, ValueError):  # a template, or a newer Python's
        return
    lines = text.split("\n")
    for node in _functions(tree.body):
        sentence = first_sentence(ast.get_docstring(node) or "")
        code = _code(node, lines) if sentence else ""
        if code:
            yield Documented(code, sentence, module)


def _functions(body: Sequence[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Of a module and its classes, none that is private or a test."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if node.name.startswith(("_", "test_", "Test")):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body)
        else:
            yield node


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> str:
    """The text of a function without decorators and docstring; "" where it is too long or does nothing."""
    docstring, *rest = node.body
    last = docstring.end_lineno or docstring.lineno
    if all(_does_nothing(statement) for statement in rest):
        return ""
    if rest[0].lineno == last or not lines[docstring.lineno - 1][: docstring.col_offset].isspace():
        return ""  # the docstring shares its line
    body = "\n".join(lines[last : node.end_lineno]).lstrip("\n")
    code = textwrap.dedent("\n".join([*lines[node.lineno - 1 : docstring.lineno - 1], body])).rstrip()
    return code if len(code) <= CHARACTERS and code.startswith(("def ", "async ")) else ""


def _does_nothing(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass | ast.Raise)


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    """No warnings of others' code, and no garbage collection: trees hold no cycles, and it takes as long as parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if enabled:
            gc.enable()

"""Mined negatives for other trainers and tools, and theirs for us: TREC run files and sentence-transformers columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from samplewise.cuda_ext.checks import choice, integer
from samplewise.loaders.negatives import check_positives
from samplewise.loaders.ragged import Ragged
from samplewise.plugins import candidates
from samplewise.plugins.candidates import Ids, Scores


def write_run(
    path: str | Path,
    ids: NDArray[Any],
    scores: NDArray[Any] | None = None,
    *,
    query_names: Sequence[str] | None = None,
    document_names: Sequence[str] | None = None,
    tag: str = "samplewise",
) -> None:
    """Write ranked lists as a TREC run file: ``query Q0 document rank score tag`` a line, ranks from 1.

    Args:
        path: the file.
        ids: int (Q, k) document rows, best first, -1 for none.
        scores: (Q, k), NaN where an entry is to be left out (as where a table is filled up); by default ``k -
            position``, so that readers, which sort by score, keep the order.
        query_names: Q names; by default the row numbers.
        document_names: the names of the documents; by default the row numbers.
        tag: the run's name.

    Raises:
        ValueError: shapes that do not fit, or a name or tag with white space.
    """
    ids = np.asarray(ids)
    values = (
        np.broadcast_to(ids.shape[1] - np.arange(ids.shape[1]), ids.shape) if scores is None else np.asarray(scores)
    )
    if ids.ndim != 2 or values.shape != ids.shape or (query_names is not None and len(query_names) != len(ids)):
        raise ValueError(
            f"write_run: ids {ids.shape}, scores {values.shape} and {query_names and len(query_names)} query_names do "
            f"not fit; ids and scores must be (Q, k), and there must be Q names."
        )
    if document_names is not None and ids.size and ids.max() >= len(document_names):
        raise ValueError(
            f"write_run: document {ids.max()} has no name; there are {len(document_names)} document_names."
        )
    for name in (tag, *(query_names or ()), *(document_names or ())):
        if len(str(name).split()) != 1:
            raise ValueError(f"write_run: {name!r} stands in a file of columns; it must be one word.")
    with open(path, "w", encoding="utf-8") as file:
        for row, (documents, line) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
            query = row if query_names is None else query_names[row]
            entries = zip(documents, line, strict=True)
            found = [(document, score) for document, score in entries if document >= 0 and score == score]
            for place, (document, score) in enumerate(found, 1):
                name = document if document_names is None else document_names[document]
                file.write(f"{query} Q0 {name} {place} {score:.9g} {tag}\n")


def read_run(
    path: str | Path, *, query_names: Sequence[str] | int, document_names: Sequence[str] | int
) -> tuple[Ids, Scores]:
    """Read a TREC run file, for the ``pools`` of a mining.

    Args:
        path: the file.
        query_names: the name of each of the Q queries, or Q where the file names row numbers.
        document_names: the same for the D documents.

    Returns:
        ids int64 (Q, k), highest score first, equal ones as in the file, -1 behind the last; scores float32 (Q, k), NaN
        there. k is the longest list.

    Raises:
        ValueError: a line that is not in the format, an unknown name, or a document that stands twice in a list.
    """
    queries, documents = _numbers(query_names), _numbers(document_names)
    lists: list[dict[int, float]] = [{} for _ in queries]
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                query, _, document, _, score, _ = line.split()
                row, column, value = queries[query], documents[document], float(score)
                if value != value:
                    raise ValueError("NaN")
            except KeyError as error:
                raise ValueError(f"{path}:{number}: {error} is no query or document of this collection.") from None
            except ValueError:
                raise ValueError(
                    f"{path}:{number}: not `query Q0 document rank score tag`: {line.strip()!r}."
                ) from None
            if column in lists[row]:
                raise ValueError(f"{path}:{number}: document {document} stands twice in the list of query {query}.")
            lists[row][column] = value
    width = max(1, max(map(len, lists), default=0))
    ids = np.full((len(lists), width), -1, dtype=np.int64)
    scores = np.full((len(lists), width), np.nan, dtype=np.float32)
    for row, found in enumerate(lists):
        ranked = sorted(found.items(), key=lambda item: -item[1])
        ids[row, : len(ranked)] = [document for document, _ in ranked]
        scores[row, : len(ranked)] = [score for _, score in ranked]
    return ids, scores


def _numbers(names: Sequence[str] | int) -> dict[str, int]:
    return {str(name): row for row, name in enumerate(range(names) if isinstance(names, int) else names)}


class Columns(NamedTuple):
    """A collection out of columns of texts.

    Attributes:
        queries: the Q different anchors.
        documents: the D different positives and negatives.
        positives: for each query the rows of its positives.
        negatives: int32 (Q, K), in the order of the columns; short rows are filled up with random documents.
        found: int32 (Q,), how many of a row were in the columns.
    """

    queries: list[str]
    documents: list[str]
    positives: Ragged
    negatives: NDArray[np.int32]
    found: NDArray[np.int32]


def to_columns(
    queries: Sequence[str],
    documents: Sequence[str],
    positives: Ragged | Sequence[Any],
    negatives: NDArray[Any],
    *,
    count: int = 1,
    form: str = "n-tuple",
) -> dict[str, list[str]]:
    """Mined negatives as the columns that the trainers of sentence-transformers read.

    ``datasets.Dataset.from_dict(to_columns(...))`` is a training set for its ``MultipleNegativesRankingLoss``.

    Args:
        queries: Q texts.
        documents: D texts.
        positives: for each query the rows of its relevant documents.
        negatives: int (Q, K), hardest first: ``table["negatives"]``.
        count: how many of them to take, the hardest ones, in [1, K].
        form: ``"n-tuple"``: a row for each query and positive, ``anchor, positive, negative_1, ...`` (``negative``
            where ``count`` is 1); ``"triplet"``: a row for each negative too, ``anchor, positive, negative``.
    """
    negatives = np.asarray(negatives)
    relevant = check_positives("to_columns", positives, len(queries), len(documents))
    if negatives.ndim != 2 or len(negatives) != len(queries):
        raise ValueError(f"to_columns(negatives={negatives.shape}): there must be a row a query, ({len(queries)}, K).")
    count = integer("to_columns", "count", count, 1, negatives.shape[1])
    if negatives.dtype.kind not in "iu" or not (negatives.min() >= 0 and negatives.max() < len(documents)):
        raise ValueError(
            f"to_columns(negatives={negatives.dtype}): negatives must be integers in [0, {len(documents)}), rows of "
            f"the documents; fill up short rows."
        )
    choice("to_columns", "form", form, "n-tuple", "triplet")
    rows, pairs = relevant.row_numbers(), relevant.values
    chosen = negatives[rows, :count]
    if form == "triplet":
        rows, pairs, chosen = np.repeat(rows, count), np.repeat(pairs, count), chosen.reshape(-1, 1)
    names = ["negative"] if chosen.shape[1] == 1 else [f"negative_{number + 1}" for number in range(count)]
    columns = {"anchor": [queries[row] for row in rows], "positive": [documents[document] for document in pairs]}
    for number, name in enumerate(names):
        columns[name] = [documents[document] for document in chosen[:, number]]
    return columns


def from_columns(columns: Mapping[str, Sequence[str]], *, seed: int = 0) -> Columns:
    """The other way round: texts in columns, whatever their names, in the order anchor, positive, negatives.

    Args:
        columns: a dict of lists or a ``datasets.Dataset``, of at least two columns.
        seed: key of the random documents that fill up short rows.

    Raises:
        ValueError: fewer than two columns, columns of different lengths, or none with negatives.
    """
    names = list(getattr(columns, "column_names", columns))
    texts = [list(columns[name]) for name in names]
    if len(names) < 3 or len({len(part) for part in texts}) != 1 or not texts[0]:
        sizes = ", ".join(f"{name} ({len(part)})" for name, part in zip(names, texts, strict=True))
        raise ValueError(f"from_columns: needs anchors, positives and negatives of one length; there are: {sizes}.")
    if wrong := [name for name, part in zip(names, texts, strict=True) if not all(isinstance(t, str) for t in part)]:
        raise ValueError(f"from_columns: column {wrong[0]!r} holds something else than texts; leave it out.")
    queries = {text: row for row, text in enumerate(dict.fromkeys(texts[0]))}
    documents = {text: row for row, text in enumerate(dict.fromkeys(text for part in texts[1:] for text in part))}
    positives: list[dict[int, None]] = [{} for _ in queries]
    lists: list[dict[int, None]] = [{} for _ in queries]
    for anchor, positive, *others in zip(*texts, strict=True):
        positives[queries[anchor]][documents[positive]] = None
        lists[queries[anchor]].update(dict.fromkeys(documents[other] for other in others))
    relevant = Ragged.from_lists([list(row) for row in positives])
    rows = [[d for d in row if d not in own] for row, own in zip(lists, positives, strict=True)]
    ids = np.full((len(rows), max(1, max(map(len, rows)))), -1, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    found = (ids >= 0).sum(1).astype(np.int32)
    candidates.pad(ids, relevant, len(documents), seed, np.arange(len(ids)))
    return Columns(list(queries), list(documents), relevant, ids.astype(np.int32), found)

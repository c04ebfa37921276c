"""Run files and columns: there and back, and what is refused."""

import datasets
import numpy as np
import pytest
import torch

from samplewise.loaders import Ragged
from samplewise.plugins import mine_hard_negatives
from samplewise.plugins.exchange import from_columns, read_run, to_columns, write_run

QUERIES = ["q0", "q1"]
DOCUMENTS = ["d0", "d1", "d2", "d3", "d4"]
IDS = np.array([[3, 1, -1], [0, 4, 2]])
SCORES = np.array([[2.5, 1.25, np.nan], [0.1, 0.1, -3]], dtype=np.float32)


def test_a_run_file_there_and_back(tmp_path):
    write_run(tmp_path / "run", IDS, SCORES, query_names=QUERIES, document_names=DOCUMENTS, tag="mine")
    lines = (tmp_path / "run").read_text().splitlines()
    assert lines[:2] == ["q0 Q0 d3 1 2.5 mine", "q0 Q0 d1 2 1.25 mine"]
    ids, scores = read_run(tmp_path / "run", query_names=QUERIES, document_names=DOCUMENTS)
    np.testing.assert_array_equal(ids, IDS)
    np.testing.assert_array_equal(scores, SCORES)


def test_row_numbers_and_ranks_where_nothing_else_is_given(tmp_path):
    write_run(tmp_path / "run", IDS)
    ids, scores = read_run(tmp_path / "run", query_names=2, document_names=5)
    np.testing.assert_array_equal(ids, IDS)
    np.testing.assert_array_equal(scores, [[3, 2, np.nan], [3, 2, 1]])


@pytest.mark.filterwarnings("ignore:.*negatives are random")
def test_random_filling_of_a_table_is_left_out(tmp_path):
    table = mine_hard_negatives(torch.arange(4.0)[:, None], torch.ones(1, 1), [[3]], top_k=4, min_score=1.0)
    write_run(tmp_path / "run", table["negatives"], table["scores"])
    assert (tmp_path / "run").read_text().split("\n") == ["0 Q0 2 1 2 samplewise", "0 Q0 1 2 1 samplewise", ""]


def test_queries_without_a_line_and_unsorted_files(tmp_path):
    (tmp_path / "run").write_text("q1 Q0 d0 1 1.0 t\n\nq1\tQ0\td3\t2\t5e0\tt\n")
    ids, scores = read_run(tmp_path / "run", query_names=QUERIES, document_names=DOCUMENTS)
    assert ids.tolist() == [[-1, -1], [3, 0]]
    assert scores[1].tolist() == [5.0, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q0 Q0 d9 1 1.0 t", "run:1: 'd9' is no query or document"),
        ("q0 Q0 d1 1 1.0 t\nq7 Q0 d1 1 1.0 t", "run:2: 'q7'"),
        ("q0 Q0 d1 1 1.0", "run:1: not `query Q0 document rank score tag`"),
        ("q0 Q0 d1 1 high t", "run:1: not `query"),
        ("q0 Q0 d1 1 nan t", "run:1: not `query"),
        ("q0 Q0 d1 1 1.0 t\nq0 Q0 d1 2 0.5 t", "run:2: document d1 stands twice in the list of query q0"),
    ],
)
def test_bad_run_files(tmp_path, text, message):
    (tmp_path / "run").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / "run", query_names=QUERIES, document_names=DOCUMENTS)


@pytest.mark.parametrize(
    "options",
    [
        {"document_names": ["d0"]},
        {"scores": SCORES[:1]},
        {"query_names": ["q0"]},
        {"query_names": ["q 0", "q1"]},
        {"tag": "two words"},
    ],
)
def test_bad_arguments_of_write_run(tmp_path, options):
    with pytest.raises(ValueError, match="write_run"):
        write_run(tmp_path / "run", IDS, **options)


NEGATIVES = np.array([[3, 4], [4, 0]], dtype=np.int32)
POSITIVES = [[0, 1], [2]]


def test_columns_one_row_a_pair():
    assert to_columns(QUERIES, DOCUMENTS, POSITIVES, NEGATIVES, count=2) == {
        "anchor": ["q0", "q0", "q1"],
        "positive": ["d0", "d1", "d2"],
        "negative_1": ["d3", "d3", "d4"],
        "negative_2": ["d4", "d4", "d0"],
    }
    assert list(to_columns(QUERIES, DOCUMENTS, POSITIVES, NEGATIVES)) == ["anchor", "positive", "negative"]


def test_triplets():
    assert to_columns(QUERIES, DOCUMENTS, Ragged.from_lists([[1], [2]]), NEGATIVES, count=2, form="triplet") == {
        "anchor": ["q0", "q0", "q1", "q1"],
        "positive": ["d1", "d1", "d2", "d2"],
        "negative": ["d3", "d4", "d4", "d0"],
    }


@pytest.mark.parametrize("form", ["n-tuple", "triplet"])
def test_columns_there_and_back(form):
    columns = to_columns(QUERIES, DOCUMENTS, POSITIVES, NEGATIVES, count=2, form=form)
    back = from_columns(datasets.Dataset.from_dict(columns))
    assert back.queries == QUERIES
    names = [[back.documents[d] for d in row] for row in back.positives.padded(0)]
    assert names[0] == ["d0", "d1"]
    assert names[1][0] == "d2"
    assert [[back.documents[d] for d in row] for row in back.negatives] == [["d3", "d4"], ["d4", "d0"]]
    assert back.found.tolist() == [2, 2]


def test_short_rows_are_filled_up_and_positives_are_never_negatives():
    columns = {"a": ["x", "x", "y"], "b": ["p", "q", "p"], "c": ["q", "r", "r"], "d": ["s", "s", "q"]}
    back = from_columns(columns)
    rows = [{back.documents[d] for d in row} for row in back.negatives]
    assert rows[0] == {"s", "r"}  # q is a positive of x in another row
    assert rows[1] == {"r", "q"}
    only = from_columns({"a": ["x", "y"], "b": ["p", "q"], "c": ["q", "q"]})
    assert only.found.tolist() == [1, 0]
    assert [only.documents[d] for d in only.negatives[1]] == ["p"]


@pytest.mark.parametrize(
    "columns", [{"a": ["x"], "b": ["y"]}, {"a": ["x"], "b": ["y"], "c": []}, {"a": [], "b": [], "c": []}]
)
def test_bad_columns(columns):
    with pytest.raises(ValueError, match="from_columns: needs anchors, positives and negatives"):
        from_columns(columns)


def test_columns_of_something_else():
    with pytest.raises(ValueError, match="column 'label' holds something else than texts"):
        from_columns({"a": ["x"], "b": ["y"], "label": [1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 3}, r"count must be in \[1, 2\]"),
        ({"form": "pairs"}, "'n-tuple', 'triplet'"),
        ({"negatives": NEGATIVES[:1]}, r"\(2, K\)"),
        ({"positives": [[0], []]}, "to_columns"),
        ({"negatives": np.array([[3, -1], [4, 0]])}, r"must be integers in \[0, 5\)"),
        ({"negatives": np.array([[3, 5], [4, 0]])}, r"must be integers in \[0, 5\)"),
        ({"negatives": np.ones((2, 2))}, r"negatives=float64\): negatives must be integers"),
    ],
)
def test_bad_arguments_of_to_columns(options, message):
    call = {"queries": QUERIES, "documents": DOCUMENTS, "positives": POSITIVES, "negatives": NEGATIVES, **options}
    with pytest.raises(ValueError, match=message):
        to_columns(**call)

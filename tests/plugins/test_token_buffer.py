"""TokenBuffer: reading samples, rows that come back as they were written, and what stays on disk."""

import os
import pickle

import numpy as np
import pytest
import torch
from token_support import BOS, DATA, END, SPECIAL, TOKENIZER, item, make_data, others, targets_of, write

from samplewise.loaders import Table, with_ids
from samplewise.loaders.ragged import Ragged
from samplewise.plugins import SelfTokenMixer, TokenBuffer
from samplewise.plugins.token_buffer import digests, read_sample

TOKENS, LABELS = [5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda values: np.array(values, np.int32)])
def test_samples_of_any_kind_of_integers(kind):
    sample = read_sample({"input_ids": kind(TOKENS), "labels": kind(LABELS), "text": "x"}, "here")
    for found, expected in (
        (sample.tokens, TOKENS), (sample.targets, [7, 8, 9]), (sample.places, [2, 3, 4]), (sample.starts, [0])
    ):  # fmt: skip
        assert found.tolist() == expected
        assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("positions", "labels", "starts"),
    [
        ([0, 1, 2, 3, 4], [-100, -100, 7, 8, 9], [0]),
        ([0, 1, 0, 1, 2], [-100, 6, -100, 8, 9], [0, 2]),
        ([1, 2, 3, 0, 1], [-100, -100, 7, -100, 9], [0, 3]),  # the middle of a document, and a whole one
        ([0, 1, 2], [-100, -100, 7, 8, 9], [0]),  # of something else
        (None, [-100, 6, -100, -100, -100], [0]),
        ([0, 1, 2, 3, 4], [-100] * 5, [0]),
    ],
)
def test_documents_of_a_row(positions, labels, starts):
    sample = read_sample({"input_ids": TOKENS, "labels": labels, "position_ids": positions}, "here")
    assert sample.starts.tolist() == starts


def test_samples_of_models_with_an_encoder():
    sample = read_sample({"input_ids": [1, 2], "labels": [3, 4, 5, -100]}, "here", seq2seq=True)
    assert [part.tolist() for part in (sample.tokens, sample.targets, sample.places)] == [[1, 2], [3, 4, 5], [0, 1, 2]]
    assert len(read_sample({"input_ids": [], "labels": []}, "here").targets) == 0


@pytest.mark.parametrize(
    ("item", "error", "match"),
    [
        ([1, 2], TypeError, "here: a mapping with input_ids and labels is needed, not list"),
        ((TOKENS, LABELS), TypeError, "not tuple"),
        ("text", TypeError, "not str"),
        ({"input_ids": TOKENS}, ValueError, r"it has no 'labels' \(labels are the response's tokens, and -100 on"),
        ({"labels": LABELS}, ValueError, "it has no 'input_ids'"),
        ({"input_ids": TOKENS, "labels": TOKENS}, ValueError, "a document's first token, .*: mask the prompt"),
        ({"input_ids": TOKENS, "labels": [-100, 7, 8, 9, -100]}, ValueError, "labels that are not shifted"),
        ({"input_ids": TOKENS, "labels": LABELS[:-1]}, ValueError, "5 input_ids and 4 labels"),
        ({"input_ids": [1.0, 2.0], "labels": [-100, 2]}, TypeError, r"input_ids must be integers \(T,\), not float64"),
        ({"input_ids": [1, 2], "labels": torch.tensor([-100.0, 2.0])}, TypeError, "labels must be integers"),
        ({"input_ids": [[1, 2]], "labels": [[-100, 2]]}, TypeError, r"\(1, 2\)"),
        ({"input_ids": [True, False], "labels": [-100, 0]}, TypeError, "not bool"),
        ({"input_ids": TOKENS, "labels": LABELS, "position_ids": [0, 1, 0, 1, 2]}, ValueError, "first token"),
    ],
)
def test_samples_that_are_not_understood(item, error, match):
    with pytest.raises(error, match=match):
        read_sample(item, "here")


def test_digests_tell_tokens_places_and_lengths():
    rows = [[], [1], [2], [1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [1, 2]]
    ragged = Ragged.from_lists(rows)
    found = digests(ragged.values, ragged.offsets)
    assert found[0] == 0
    assert found[3] == found[7]
    assert len(set(found.tolist())) == len(rows) - 1
    alone = [digests(np.array(row, np.int64), np.array([0, len(row)]))[0] for row in rows]
    assert found.tolist() == alone  # nothing of the other rows is in them


# --- rows -------------------------------------------------------------------------------------------------------------

LENGTHS = [0, 1, 7, 0, 8, 9, 16, 3, 0, 5]  # rows begin at bits 0, 0, 1, 0, 0, 0, 1, 1, 4, 4 of a byte
ROWS = [item([1], range(2, 2 + length)) for length in LENGTHS]


def fresh(path, data=ROWS, **given):
    return TokenBuffer(path, data, TOKENIZER, **given)


def random_rows(seed, lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2**31, length) for length in lengths], [rng.random(length) < 0.5 for length in lengths]


def held(buffer, ids=None, kind="tokens"):
    """Tokens, replaced and versions, row by row."""
    ids = np.arange(buffer.size) if ids is None else np.asarray(ids)
    rows = buffer.take(ids, kind)
    cut = np.cumsum(rows.tokens.lengths)[:-1]
    parts = (np.split(rows.tokens.values, cut), np.split(rows.replaced, cut), rows.versions)
    return [tuple(np.asarray(part[row]).tolist() for part in parts) for row in range(len(ids))]


def expected(tokens, replaced, version):
    return [(t.tolist(), r.tolist(), version) for t, r in zip(tokens, replaced, strict=True)]


def test_rows_come_back_in_any_order(tmp_path):
    buffer = fresh(tmp_path)
    tokens, replaced = random_rows(0, LENGTHS)
    write(buffer, tokens, replaced)
    rows = expected(tokens, replaced, 1)
    for ids in (range(10), [9, 2, 0, 6], [4], [3, 0], [6, 6]):
        assert held(buffer, list(ids)) == [rows[row] for row in ids]
    assert buffer.take(np.zeros(0, np.int64)).tokens.values.shape == (0,)
    taken = buffer.take(np.arange(10))
    assert (taken.tokens.values.dtype, taken.replaced.dtype, taken.digests.dtype) == (np.int32, np.bool_, np.uint64)
    ragged = Ragged.from_lists([one["labels"][1:] for one in ROWS])
    np.testing.assert_array_equal(taken.digests, digests(ragged.values, ragged.offsets))
    assert taken.meta["rollout"] == "parallel"


def test_bits_of_neighbours_in_a_byte_are_left_alone(tmp_path):
    buffer = fresh(tmp_path)
    ones = [np.ones(length, bool) for length in LENGTHS]
    write(buffer, random_rows(0, LENGTHS)[0], ones)
    for row, length in enumerate(LENGTHS):
        before = held(buffer)
        for flags in (None, [np.zeros(length, bool)], [np.arange(length) % 2 == 0], [np.ones(length, bool)]):
            write(buffer, [np.arange(length)], flags, ids=[row])
            now = held(buffer)
            assert now[row][1] == (np.zeros(length, bool) if flags is None else flags[0]).tolist()
            assert now[:row] + now[row + 1 :] == before[:row] + before[row + 1 :]


def test_what_is_not_written_stays(tmp_path):
    buffer = fresh(tmp_path)
    targets = targets_of(ROWS)
    tokens, replaced = random_rows(1, LENGTHS)
    some = [2, 5, 9]
    write(buffer, [tokens[row] for row in some], [replaced[row] for row in some], ids=some)
    rows = expected(targets, [np.zeros(length, bool) for length in LENGTHS], 0)  # the references, at first
    for row in some:
        rows[row] = (tokens[row].tolist(), replaced[row].tolist(), 1)
    assert held(buffer) == rows
    tokens, replaced = random_rows(2, LENGTHS)
    write(buffer, [tokens[row] for row in (5, 6)], [replaced[row] for row in (5, 6)], ids=[5, 6])
    for row in (5, 6):
        rows[row] = (tokens[row].tolist(), replaced[row].tolist(), 2)
    assert held(buffer) == rows
    assert buffer.version == 2


def test_rows_may_be_shorter_than_they_can_be(tmp_path):
    buffer, reference = fresh(tmp_path), np.arange(10).astype(np.uint64)
    for lengths in ([0, 3, 6] * 3 + [6], [6, 0, 1] * 3 + [2]):
        tokens, replaced = random_rows(3, lengths)
        with buffer.writing(np.full(10, 6), reference, {"kind": "attempts"}) as writer:
            writer.put(np.arange(10), Ragged.from_lists(tokens), np.concatenate(replaced))
        assert held(buffer, kind="attempts") == expected(tokens, replaced, buffer.version)
    with pytest.raises(ValueError, match="it holds attempts, not tokens"):
        buffer.take(np.array([0]))


def test_other_capacities_are_refused(tmp_path):
    buffer = fresh(tmp_path)
    with buffer.writing(np.full(10, 6), np.zeros(10, np.uint64), {}):
        pass
    capacities = np.full(10, 6)
    capacities[4] = 7
    with pytest.raises(ValueError, match="row 4 holds 6 tokens, 7 are asked for; delete the folder"), \
            buffer.writing(capacities, np.zeros(10, np.uint64), {}):  # fmt: skip
        pass
    assert buffer.version == 1


def test_an_error_while_writing_leaves_the_version_before(tmp_path):
    buffer = fresh(tmp_path)
    write(buffer, *random_rows(0, LENGTHS))
    before = held(buffer)

    def failing():
        with buffer.writing(np.array(LENGTHS), np.zeros(10, np.uint64), {}) as writer:
            writer.put(np.array([2]), Ragged.from_lists([[1] * 7]))
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert (buffer.version, held(buffer)) == (1, before)
    assert len(os.listdir(tmp_path)) == 2  # the version, and the file that names it


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_disk_is_bounded(tmp_path, keep):
    buffer = fresh(tmp_path, keep=keep)
    sizes = []
    for version in range(6):
        write(buffer, *random_rows(version, LENGTHS))
        folders = [path for path in tmp_path.iterdir() if path.is_dir()]
        assert len(folders) == min(version + 1, keep)
        sizes.append(sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
    assert sizes[-1] == sizes[keep - 1]
    one = sum(path.stat().st_size for path in folders[0].iterdir())
    assert sum(LENGTHS) * 4 < one < 4000
    assert buffer.version == 6


def test_ids_outside_the_data(tmp_path):
    buffer = fresh(tmp_path)
    with pytest.raises(RuntimeError, match="nothing has been written yet"):
        buffer.take(np.array([0]))
    write(buffer, *random_rows(0, LENGTHS))
    for ids in ([10], [-1], [0, 3, 11], [2**40]):
        with pytest.raises(IndexError, match=r"ids are rows in \[0, 10\), not"):
            buffer.take(np.array(ids))


def test_pickled_copies_read_new_versions_and_have_no_data(tmp_path):
    buffer = fresh(tmp_path)
    write(buffer, *random_rows(0, LENGTHS))
    held(buffer)
    text = pickle.dumps(buffer)
    assert len(text) < 3000  # neither the data nor the arrays
    copied = pickle.loads(text)
    assert (copied.data, copied.size, copied.version) == (None, 10, 1)
    assert held(copied) == held(buffer)
    write(buffer, *random_rows(1, LENGTHS))
    assert held(copied) == held(buffer)


def test_a_buffer_that_is_made_again_goes_on(tmp_path):
    write(fresh(tmp_path), *random_rows(0, LENGTHS))
    again = fresh(tmp_path)
    assert held(again)[6][0] == random_rows(0, LENGTHS)[0][6].tolist()
    write(again, *random_rows(1, LENGTHS))
    assert again.version == 2
    assert repr(again) == f"TokenBuffer({str(tmp_path)!r})"


# --- data, folders and tokenizers -------------------------------------------------------------------------------------


def test_folders_of_other_things(tmp_path):
    with Table(tmp_path / "table").writing({"negatives": ((10, 2), np.int32)}):
        pass
    with pytest.raises(ValueError, match="the folder is another table's, of negatives"):
        fresh(tmp_path / "table").take(np.array([0]))
    table = Table(tmp_path / "short")
    names = ("tokens", "replaced", "offsets", "lengths", "digests", "versions")
    with table.writing({name: ((4,), np.int32) for name in names}):
        pass
    with pytest.raises(ValueError, match="it has 3 rows, the data 10"):
        fresh(tmp_path / "short").take(np.array([0]))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="the folder holds no table, but notes"):
        fresh(tmp_path / "files")
    write(fresh(tmp_path / "tokens"), *random_rows(0, LENGTHS))
    with pytest.raises(ValueError, match="fingerprint"):
        fresh(tmp_path / "tokens", make_data())


def test_data_may_be_lists_tensors_or_arrays(tmp_path):
    write(fresh(tmp_path), *random_rows(0, LENGTHS))
    for kind in (torch.Tensor.tolist, torch.Tensor.numpy):
        fresh(tmp_path, [{name: kind(values) for name, values in one.items()} for one in ROWS])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"data": []}, ValueError, r"len\(data\)"),
        ({"data": iter(ROWS)}, TypeError, "a map-style data set is needed"),
        ({"data": "text"}, TypeError, "a map-style data set"),
        ({"data": {0: ROWS[0]}}, TypeError, "a map-style data set"),
        ({"data": [(1, 2)]}, TypeError, r"TokenBuffer\(data\), sample 0: a mapping"),
        ({"data": [{"input_ids": [1, 2]}]}, ValueError, "it has no 'labels'"),
        ({"data": [{"input_ids": [1.5], "labels": [-100]}]}, TypeError, "input_ids must be integers"),
        ({"tokenizer": "gpt2"}, TypeError, r"TokenBuffer\(tokenizer=str\): a tokenizer of transformers"),
        ({"keep": 0}, ValueError, "keep"),
    ],
)
def test_wrong_arguments(tmp_path, given, error, match):
    with pytest.raises(error, match=match):
        TokenBuffer(**{"path": tmp_path, "data": ROWS, "tokenizer": TOKENIZER, **given})
    assert os.listdir(tmp_path) == []


class Plain:
    """A tokenizer without any special token."""

    all_special_ids: tuple[int, ...] = ()

    def __len__(self):
        return 256

    def convert_ids_to_tokens(self, ids):
        return [chr(number) for number in ids]


class Unfinished(Plain):
    """It begins texts, but neither pads nor ends them."""

    all_special_ids = (3,)


@pytest.mark.parametrize(("tokenizer", "special"), [(Plain(), []), (Unfinished(), [3]), (TOKENIZER, [BOS, END])])
def test_special_tokens(tmp_path, tokenizer, special):
    buffer = TokenBuffer(tmp_path, DATA, tokenizer)
    assert buffer.special.tolist() == special
    assert buffer.special.dtype == np.int64
    targets = targets_of()
    write(buffer, others(targets))
    batch = SelfTokenMixer(buffer, beta=1)([with_ids(DATA)[0]])
    np.testing.assert_array_equal(
        batch["input_ids"][0, -len(targets[0]) :].numpy(),
        np.where(np.isin(targets[0], SPECIAL), targets[0], (targets[0] + 1) % 256),
    )


def test_special_tokens_that_were_added_later_count(tmp_path):
    from language_support import byte_tokenizer

    tokenizer = byte_tokenizer(None)
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.add_tokens(["plain"])
    assert TokenBuffer(tmp_path, DATA, tokenizer).special.tolist() == [BOS, END, 258]

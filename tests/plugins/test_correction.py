"""CorrectionDataset: which samples are corrections, and exactly what is in one."""

import math

import numpy as np
import pytest
import torch
from language_support import byte_tokenizer
from token_support import BOS, END, TOKENIZER, encoded, item, padded, random_states, tolerance
from torch.utils.data import DataLoader

from samplewise.loaders import collate_with_ids, with_ids
from samplewise.loaders.ragged import Ragged
from samplewise.plugins import CorrectionDataset, TokenBuffer, Uniform, correction_connector
from samplewise.plugins.correction import REQUEST, is_reference
from samplewise.plugins.token_buffer import digests, read_sample
from samplewise.recipes.responses import pad_left

CONNECTOR = [60, 61]
DATA = [
    item([1, 2, 3], [20, 21, END]),  # an attempt that is wrong
    item([4], [30, 31, 32, END]),  # that is right, but does not end
    item([5, 6], [40]),  # not generated yet
    item([7, 8], [50, 51, END]),  # an empty attempt
    item([9], [70, 71, 72]),  # one that is longer
]
ATTEMPTS = [[90, 91], [30, 31, 32], [], [], [70, 71, 72, 73, 74, 75]]
EDITED = {
    0: ([1, 2, 3, 90, 91, 60, 61, 20, 21, END], [-100] * 7 + [20, 21, END]),
    3: ([7, 8, 60, 61, 50, 51, END], [-100] * 4 + [50, 51, END]),
    4: ([9, 70, 71, 72, 73, 74, 75, 60, 61, 70, 71, 72], [-100] * 9 + [70, 71, 72]),
}
KEPT = {1: ([4, 30, 31, 32, 60, 61, 30, 31, 32, END], [-100] * 6 + [30, 31, 32, END])}


def attempts_of(folder, data=DATA, attempts=ATTEMPTS, unwritten=(2,), *, seq2seq=False, most=8):
    buffer = TokenBuffer(folder, data, TOKENIZER)
    targets = Ragged.from_lists([read_sample(one, "", seq2seq=seq2seq).targets for one in data])
    reference = digests(targets.values, targets.offsets)
    rows = np.array([row for row in range(len(data)) if row not in unwritten])
    meta = {"kind": "attempts", "seq2seq": seq2seq}
    with buffer.writing(np.full(len(data), most), reference, meta) as writer:
        writer.put(rows, Ragged.from_lists([attempts[row] for row in rows]))
    return buffer


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    return attempts_of(tmp_path_factory.mktemp("attempts") / "buffer")


def text(one):
    return one["input_ids"].tolist(), one["labels"].tolist()


@pytest.mark.parametrize("equal", ["skip", "keep"])
def test_tokens_and_labels_of_corrections(buffer, equal):
    expected = {row: text(one) for row, one in enumerate(DATA)} | EDITED | (KEPT if equal == "keep" else {})
    corrections = CorrectionDataset(buffer, CONNECTOR, correct_share=1, equal=equal)
    assert len(corrections) == 5
    assert {row: text(corrections[row]) for row in range(5)} == expected
    assert [text(one) for one in corrections.__getitems__([4, 0, 4])] == [expected[4], expected[0], expected[4]]
    for row in range(5):
        one = corrections[row]
        assert (one["input_ids"].dtype, one["labels"].dtype) == (torch.int64, torch.int64)
    assert [text(one) for one in DATA] == [text(one) for one in buffer.data]


def test_without_corrections_samples_are_as_they_are(buffer):
    corrections = CorrectionDataset(buffer, CONNECTOR, correct_share=0, equal="keep")
    assert [corrections[row] for row in range(5)] == DATA  # the very same tensors


@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
def test_the_share_of_corrections(tmp_path, gamma):
    count = 2000
    data = [item([1], [2, 3])] * count
    buffer = attempts_of(tmp_path, data, [[9]] * count, ())
    drawn = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        corrections = CorrectionDataset(buffer, CONNECTOR, correct_share=gamma, seed=seed)
        corrections.set_epoch(epoch)
        drawn.append(np.array([len(one["labels"]) == 6 for one in corrections.__getitems__(list(range(count)))]))
        assert abs(drawn[-1].mean() - gamma) < tolerance(gamma, count)
        for row in (0, 7, 1999):  # whatever else is in the batch
            assert (len(corrections[row]["labels"]) == 6) == drawn[-1][row]
    assert (drawn[0] == drawn[3]).all()
    for left, right in ((0, 1), (0, 2), (1, 2)):
        both = (drawn[left] & drawn[right]).mean()
        assert abs(both - gamma**2) < tolerance(gamma**2, count)  # independent
    less = CorrectionDataset(buffer, CONNECTOR, correct_share=gamma / 2).__getitems__(list(range(count)))
    assert not (np.array([len(one["labels"]) == 6 for one in less]) & ~drawn[0]).any()


@pytest.mark.parametrize(
    ("row", "max_length", "expected"),
    [
        (4, 12, EDITED[4]),
        (4, 11, ([9, 70, 71, 72, 73, 74, 60, 61, 70, 71, 72], [-100] * 8 + [70, 71, 72])),
        (4, 7, ([9, 70, 60, 61, 70, 71, 72], [-100] * 4 + [70, 71, 72])),
        (4, 6, text(DATA[4])),  # nothing would be left of the attempt
        (4, 2, text(DATA[4])),  # which is not cut
        (0, 9, ([1, 2, 3, 90, 60, 61, 20, 21, END], [-100] * 6 + [20, 21, END])),
        (0, 8, text(DATA[0])),
        (3, 100, EDITED[3]),  # an empty one is whole
    ],
)
def test_the_attempt_is_cut_first(buffer, row, max_length, expected):
    corrections = CorrectionDataset(buffer, CONNECTOR, correct_share=1, max_length=max_length)
    assert text(corrections[row]) == expected


def test_other_columns(tmp_path):
    data = [
        {**one, "attention_mask": torch.ones_like(one["labels"]), "position_ids": torch.arange(len(one["labels"])),
         "token_type_ids": torch.zeros_like(one["labels"]), "weight": 0.5}
        for one in DATA
    ]  # fmt: skip
    corrections = CorrectionDataset(attempts_of(tmp_path, data), CONNECTOR, correct_share=1)
    made = corrections[0]
    assert set(made) == set(corrections[1]) == set(data[0])
    assert made["attention_mask"].tolist() == [1] * 10
    assert made["position_ids"].tolist() == list(range(10))
    assert made["token_type_ids"].tolist() == [0] * 10
    assert made["weight"] == 0.5


def test_a_column_for_each_token_would_be_of_other_tokens(tmp_path):
    data = [{**one, "loss_mask": torch.ones_like(one["labels"])} for one in DATA]
    with pytest.raises(ValueError, match="its column 'loss_mask' has a value for each token"):
        CorrectionDataset(attempts_of(tmp_path, data), CONNECTOR, correct_share=1)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_data_set_is_left_out(tmp_path, side):
    data = [padded(one, 20, side) for one in DATA]
    corrections = CorrectionDataset(attempts_of(tmp_path, data), CONNECTOR, correct_share=1, max_length=14)
    for row in (0, 4):
        assert text(corrections[row]) == EDITED[row]
        assert corrections[row]["attention_mask"].tolist() == [1] * len(EDITED[row][0])


def test_data_of_lists_stay_lists(tmp_path):
    data = [{name: values.tolist() for name, values in one.items()} for one in DATA]
    data[0]["attention_mask"] = [1, 1, 1, 1, 1, 1]
    corrections = CorrectionDataset(attempts_of(tmp_path, data), CONNECTOR, correct_share=1)
    made = corrections[0]
    assert (made["input_ids"], made["labels"]) == EDITED[0]
    assert made["attention_mask"] == [1] * 10
    assert all(type(token) is int for name in made for token in made[name])
    assert corrections[2] == data[2]


def test_models_with_an_encoder_read_the_attempt_there(tmp_path):
    data = [
        {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels)}
        for tokens, labels in (([1, 2, END], [20, 21, END]), ([3, 4], [30, END]), ([END], [40, END]))
    ]
    buffer = attempts_of(tmp_path, data, [[90, 91], [92], [93]], (), seq2seq=True)
    corrections = CorrectionDataset(buffer, CONNECTOR, correct_share=1)
    assert [text(one) for one in corrections.__getitems__([0, 1, 2])] == [
        ([1, 2, 90, 91, 60, 61, END], [20, 21, END]), ([3, 4, 92, 60, 61], [30, END]), ([93, 60, 61, END], [40, END])
    ]  # fmt: skip
    short = CorrectionDataset(buffer, CONNECTOR, correct_share=1, max_length=6)
    assert [len(short[row]["input_ids"]) for row in range(3)] == [6, 5, 4]
    loader = DataLoader(with_ids(corrections), batch_size=3, collate_fn=collate_with_ids(encoded))
    assert next(iter(loader))["decoder_input_ids"][0].tolist() == [END, 20, 21]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loaders_with_workers(tmp_path, method):
    buffer, sampler = attempts_of(tmp_path), Uniform(5, seed=1)
    corrections = CorrectionDataset(buffer, CONNECTOR, correct_share=0.6, sampler=sampler)
    given = {"batch_size": 2, "sampler": sampler, "collate_fn": collate_with_ids(pad_left)}
    here = DataLoader(with_ids(corrections), **given)
    away = DataLoader(
        with_ids(corrections), num_workers=2, persistent_workers=True, multiprocessing_context=method, **given
    )
    seen = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        corrections.set_epoch(9)  # does nothing
        assert corrections.epoch == epoch
        attempts_of(tmp_path, attempts=[[100 + epoch] * len(one) for one in ATTEMPTS])
        expected, found = list(here), list(away)
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        ids = [row for batch in expected for row in batch["sample_id"].tolist()]
        assert sorted(ids) == list(range(5))
        tokens = torch.cat([batch["input_ids"].ravel() for batch in expected])
        seen.update(tokens[(tokens >= 100) & (tokens < 110)].tolist())
    assert seen == {100, 101, 102}


def test_no_generator_is_used(buffer):
    states = random_states()
    CorrectionDataset(buffer, CONNECTOR).__getitems__([0, 1, 2, 3, 4])
    assert random_states() == states


# --- the connector ----------------------------------------------------------------------------------------------------


def test_the_connector_of_a_chat_template():
    tokenizer = byte_tokenizer()
    for given, request in (((), REQUEST), (("Again.",), "Again.")):
        tokens = correction_connector(tokenizer, *given)
        assert tokens.dtype == np.int64
        assert tokenizer.decode(tokens) == (
            f"<|im_end|>\n<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert (tokens[0], (tokens == BOS).sum(), (tokens == END).sum()) == (END, 2, 2)


def test_the_connector_without_a_template():
    tokens = correction_connector(TOKENIZER, "Again.")
    assert TOKENIZER.decode(tokens) == "\nAgain.\n"
    assert TOKENIZER.decode(correction_connector(TOKENIZER)) == f"\n{REQUEST}\n"


def test_a_template_that_drops_answers():
    tokenizer = byte_tokenizer("{% for message in messages[-1:] %}{{ message['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="its chat template does not write earlier answers"):
        correction_connector(tokenizer)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"attempts": "folder"}, TypeError, "a TokenBuffer is needed"),
        ({"connector": "again"}, TypeError, "token ids .C,. are needed: correction_connector"),
        ({"connector": [1.5]}, TypeError, "token ids"),
        ({"connector": [[1, 2]]}, TypeError, "token ids"),
        ({"connector": 3}, TypeError, "token ids"),
        ({"correct_share": 1.1}, ValueError, "correct_share is the share of corrections"),
        ({"correct_share": math.nan}, ValueError, "correct_share"),
        ({"correct_share": None}, TypeError, "correct_share"),
        ({"equal": "drop"}, ValueError, "equal must be one of 'skip', 'keep'"),
        ({"max_length": 0}, ValueError, "max_length"),
        ({"max_length": 2.5}, TypeError, "max_length"),
        ({"seed": -1}, ValueError, "seed"),
        ({"sampler": Uniform(4)}, ValueError, "the sampler plans for 4 samples, but there are 5 samples"),
        ({"sampler": [0]}, TypeError, "a PlannedSampler is needed"),
    ],
)
def test_wrong_arguments(buffer, given, error, match):
    with pytest.raises(error, match=match):
        CorrectionDataset(**{"attempts": buffer, "connector": CONNECTOR, **given})


def test_a_connector_may_be_empty(buffer):
    made = CorrectionDataset(buffer, [], correct_share=1)[0]
    assert made["input_ids"].tolist() == [1, 2, 3, 90, 91, 20, 21, END]


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (0.5, TypeError)])
def test_wrong_epochs(buffer, epoch, error):
    with pytest.raises(error, match=r"CorrectionDataset.set_epoch"):
        CorrectionDataset(buffer, CONNECTOR).set_epoch(epoch)


def test_a_buffer_without_data_or_attempts(tmp_path):
    import pickle

    empty = TokenBuffer(tmp_path, DATA, TOKENIZER)
    with pytest.raises(RuntimeError, match="there are no attempts; call refresh_attempts"):
        CorrectionDataset(empty, CONNECTOR)[0]
    with pytest.raises(ValueError, match="the buffer has lost its data set"):
        CorrectionDataset(pickle.loads(pickle.dumps(empty)), CONNECTOR)
    with pytest.raises(IndexError, match="rows in"):
        CorrectionDataset(attempts_of(tmp_path), CONNECTOR)[5]


def test_data_that_have_changed(tmp_path):
    data = [dict(one) for one in DATA]
    corrections = CorrectionDataset(attempts_of(tmp_path, data), CONNECTOR, correct_share=1)
    assert text(corrections[4]) == EDITED[4]
    data[4] = item([9], [70, 71, 77])
    with pytest.raises(ValueError, match="sample 4: its response is not the one that the attempt was written for"):
        corrections.__getitems__([0, 4])
    data[4] = {"input_ids": torch.tensor([9, 70]), "labels": torch.tensor([9, 70])}
    with pytest.raises(ValueError, match="CorrectionDataset: sample 4: its labels hold a document's first token"):
        corrections[4]


@pytest.mark.parametrize(
    ("attempt", "targets", "equal"),
    [
        ([1, 2], [1, 2, END], True),
        ([1, 2, END], [1, 2], True),
        ([1, 2], [1, 2, 3], False),
        ([1, 2, 3], [1, 2], False),
        ([2, 1], [1, 2], False),
        ([], [END], True),
        ([], [1, END], False),
    ],
)
def test_special_tokens_are_no_difference(attempt, targets, equal):
    assert is_reference(np.array(attempt), np.array(targets), np.array([BOS, END])) == equal

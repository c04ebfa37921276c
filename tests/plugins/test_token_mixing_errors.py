"""What SelfTokenMixer refuses, and that it says what is wrong."""

import math

import numpy as np
import pytest
import torch
from language_support import byte_tokenizer
from token_support import DATA, IDS, TOKENIZER, encoded, item, make_data, others, packed, pad_right, targets_of, write

from samplewise.loaders import with_ids
from samplewise.plugins import BetaSchedule, SelfTokenMixer, TokenBuffer, Uniform
from samplewise.recipes.responses import pad_left

ITEMS = [with_ids(DATA)[row] for row in (0, 1, 2)]
FIRST = {**pad_left(DATA[:3]), "sample_id": torch.arange(3)}


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    made = TokenBuffer(tmp_path_factory.mktemp("tokens") / "buffer", DATA, TOKENIZER)
    write(made, others(targets_of()))
    return made


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"beta": 1.5}, ValueError, r"SelfTokenMixer\(beta=1.5\): beta is the probability that a token is replaced"),
        ({"beta": -0.1}, ValueError, "beta"),
        ({"beta": math.nan}, ValueError, "beta"),
        ({"beta": None}, TypeError, "beta"),
        ({"beta": "0.5"}, TypeError, "beta"),
        ({"after_error": "mask"}, ValueError, "after_error must be one of 'gold', 'mask_next', 'mask_replaced'"),
        ({"clean_share": 1.2}, ValueError, "clean_share"),
        ({"clean_share": math.nan}, ValueError, "clean_share"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"collate": 3}, TypeError, "collate"),
        ({"sampler": Uniform(11)}, ValueError, "the sampler plans for 11 samples, but there are 12 samples"),
        ({"sampler": [0, 1]}, TypeError, "a PlannedSampler is needed"),
        ({"buffer": "folder"}, TypeError, "a TokenBuffer is needed"),
    ],
)
def test_wrong_arguments(buffer, given, error, match):
    with pytest.raises(error, match=match):
        SelfTokenMixer(**{"buffer": buffer, "beta": 0.5, **given})


@pytest.mark.parametrize(
    ("beta", "error"), [(1.01, ValueError), (-1, ValueError), (math.nan, ValueError), ("half", TypeError)]
)
def test_functions_that_give_no_probability(buffer, beta, error):
    mixer = SelfTokenMixer(buffer, beta=lambda epoch: beta if epoch else 0.0, collate=pad_left)
    mixer(ITEMS)
    mixer.set_epoch(1)
    with pytest.raises(error, match="the probability that a token is replaced, of epoch 1,"):
        mixer(ITEMS)


@pytest.mark.parametrize(("epoch", "error"), [(-1, ValueError), (0.5, TypeError), (True, TypeError)])
def test_wrong_epochs(buffer, epoch, error):
    with pytest.raises(error, match="set_epoch"):
        SelfTokenMixer(buffer, beta=0.5).set_epoch(epoch)


def edited(**changed):
    return {name: values for name, values in {**FIRST, **changed}.items() if values is not None}


@pytest.mark.parametrize(
    ("batch", "error", "match"),
    [
        (edited(sample_id=None), TypeError, "with input_ids, labels and 'sample_id'"),
        (edited(labels=None), TypeError, "with input_ids, labels and 'sample_id'"),
        (edited(input_ids=None), (TypeError, ValueError), "input_ids"),
        ((torch.arange(3), FIRST["input_ids"]), TypeError, "not tuple"),
        (edited(labels=FIRST["labels"][:, 1:]), ValueError, "labels .* and input_ids"),
        (edited(labels=FIRST["labels"].tolist()), ValueError, "not labels list"),
        (edited(labels=FIRST["labels"][0], input_ids=FIRST["input_ids"][0]), ValueError, r"must have .*\(B, T\)"),
        (edited(labels=FIRST["labels"].roll(-1, 1)), ValueError, "labels must not be shifted"),
        (edited(sample_id=torch.tensor([0, 1, 12])), IndexError, "rows in .0, 12., not .0, 1, 12."),
        (edited(sample_id=torch.tensor([0, 1, -1])), IndexError, "rows in"),
        (edited(sample_id=torch.tensor([0, 2, 1])), ValueError, "sample 2 has 11 response tokens in the batch and"),
        (edited(sample_id=torch.tensor([0, 1])), ValueError, "a batch of 2 samples has 3 rows and"),
    ],
)
def test_wrong_batches(buffer, batch, error, match):
    with pytest.raises(error, match=match):
        SelfTokenMixer(buffer, beta=0.5).mix(batch)


@pytest.mark.parametrize("after_error", ["gold", "mask_next", "mask_replaced"])
def test_a_batch_that_is_mixed_twice(buffer, after_error):
    mixer = SelfTokenMixer(buffer, beta=0.5, collate=pad_left, after_error=after_error)
    with pytest.raises(ValueError, match=r"mixed once only|response tokens in the batch"):
        mixer.mix(mixer(ITEMS))


def test_items_without_ids(buffer):
    with pytest.raises(KeyError, match="wrap the data set"):
        SelfTokenMixer(buffer, beta=0.5, collate=pad_left)(DATA[:2])
    tuples = [(row, (one["input_ids"][:2], 1)) for row, one in enumerate(DATA[:2])]
    with pytest.raises(TypeError, match="not tuple; items must be mappings"):
        SelfTokenMixer(buffer, beta=0.5)(tuples)


def packed_without(items):
    return {name: values for name, values in packed(items).items() if name != "position_ids"}


def test_packed_rows_need_positions(buffer):
    with pytest.raises(ValueError, match="a batch of 3 samples has 1 rows and 0 documents; a packed batch needs"):
        SelfTokenMixer(buffer, beta=0.5, collate=packed_without)(ITEMS)


def longer(items):
    return pad_right([item(one["input_ids"][:2].tolist(), one["input_ids"][2:].tolist(), [], [65]) for one in items])


def shorter(items):
    return pad_right([{name: values[:-2] for name, values in one.items()} for one in items])


@pytest.mark.parametrize("collate", [longer, shorter])
def test_collates_that_append_or_cut(buffer, collate):
    with pytest.raises(
        ValueError, match=r"sample 0 has \d+ response tokens in the batch and 4 in the buffer. The collate"
    ):
        SelfTokenMixer(buffer, beta=0.5, collate=collate)(ITEMS)


def changed_data():
    """One token of a late response is another; all lengths are as before."""
    data = [dict(one) for one in DATA]
    for name in ("input_ids", "labels"):
        data[10][name] = data[10][name].clone()
        data[10][name][-2] = (data[10][name][-2] + 1) % 256
    return data


def test_other_data_of_the_same_lengths(buffer):
    mixer = SelfTokenMixer(buffer, beta=0.5, collate=pad_left)
    data = with_ids(changed_data())
    mixer([data[row] for row in IDS if row != 10])
    with pytest.raises(ValueError, match="the response of sample 10 is not the one that the buffer was written for"):
        mixer([data[row] for row in IDS])


def test_data_in_another_order(tmp_path):
    data = [item([1], [2 + row, 3, 4]) for row in range(6)]
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    write(buffer, [[9, 9, 9]] * 6)
    turned = with_ids(data[::-1])
    with pytest.raises(ValueError, match=r"the response of sample 0 is not the one .* in another order"):
        SelfTokenMixer(buffer, beta=0, collate=pad_left)([turned[row] for row in range(6)])


def test_folders_of_other_data_or_of_another_tokenizer(buffer):
    more = byte_tokenizer(None)
    more.add_tokens(["<|tool|>"], special_tokens=True)
    other = byte_tokenizer(None)
    other.add_tokens(["plain"])
    for data, tokenizer in (
        (make_data(seed=1), TOKENIZER), (DATA[::-1], TOKENIZER), (changed_data(), TOKENIZER), (DATA[:-1], TOKENIZER),
        (DATA, more), (DATA, other),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="fingerprint"):
            TokenBuffer(buffer.table.path, data, tokenizer)
    TokenBuffer(buffer.table.path, make_data(), byte_tokenizer(None))  # the same, made anew


def test_an_empty_buffer_is_enough_while_nothing_is_replaced(tmp_path):
    mixer = SelfTokenMixer(TokenBuffer(tmp_path, DATA, TOKENIZER), beta=BetaSchedule(0.5, epochs=3), collate=pad_left)
    batch = mixer(ITEMS)
    assert all(torch.equal(batch[name], FIRST[name]) for name in FIRST)
    mixer.set_epoch(1)
    with pytest.raises(RuntimeError, match="the buffer is empty; call refresh_self_tokens"):
        mixer(ITEMS)


def test_a_model_with_an_encoder_needs_its_decoder_inputs(tmp_path):
    data = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([4, 5])} for _ in range(2)]
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    write(buffer, [[6, 7]] * 2, seq2seq=True)
    items = [with_ids(data)[row] for row in range(2)]
    with pytest.raises(ValueError, match="DataCollatorForSeq2Seq"):
        SelfTokenMixer(buffer, beta=1)(items)
    assert SelfTokenMixer(buffer, beta=1, collate=encoded)(items)["decoder_input_ids"][0, 1] == 6


def test_a_buffer_of_attempts_is_no_buffer_of_tokens(buffer, tmp_path):
    attempts = TokenBuffer(tmp_path, DATA, TOKENIZER)
    digests = np.asarray(buffer.table["digests"])
    with attempts.writing(np.full(len(DATA), 20), digests, {"seq2seq": False, "kind": "attempts"}):
        pass
    with pytest.raises(ValueError, match="it holds attempts, not tokens: a SelfTokenMixer has tokens"):
        SelfTokenMixer(attempts, beta=1, collate=pad_left)(ITEMS)

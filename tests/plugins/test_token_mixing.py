"""SelfTokenMixer: exactly what is put where, in padded, packed and encoder-decoder batches."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from token_support import (
    BOS,
    DATA,
    END,
    IDS,
    TOKENIZER,
    encoded,
    item,
    others,
    packed,
    pad_right,
    random_states,
    seq2seq_data,
    targets_of,
    write,
)
from torch.utils.data import DataLoader

from samplewise.loaders import with_ids
from samplewise.plugins import BetaSchedule, SelfTokenMixer, TokenBuffer, Uniform
from samplewise.plugins.self_tokens import draw_replaced
from samplewise.plugins.token_buffer import IGNORED
from samplewise.recipes.responses import pad_left

TARGETS = targets_of()
SHARED = with_ids(DATA)
MODES = ("gold", "mask_next", "mask_replaced")


OTHERS = others(TARGETS)


@pytest.fixture(scope="module")
def buffer(tmp_path_factory):
    """All own tokens are wrong but every third, which is right."""
    made = TokenBuffer(tmp_path_factory.mktemp("tokens") / "buffer", DATA, TOKENIZER)
    own = [np.where(np.arange(len(row)) % 3 == 2, row, wrong) for row, wrong in zip(TARGETS, OTHERS, strict=True)]
    stored = [np.arange(len(row)) % 2 == 0 for row in TARGETS]
    write(made, own, stored)
    made.own, made.stored = own, stored
    return made


def flags_of(ids, lengths, **given):
    flags = draw_replaced(np.asarray(ids), np.asarray(lengths), **{"seed": 0, "epoch": 0, **given})
    return np.split(flags, np.cumsum(lengths)[:-1])


def by_hand(one, own, flags, after_error="gold"):
    """Inputs and labels of one sample, place by place."""
    inputs, labels = one["input_ids"].tolist(), one["labels"].tolist()
    places = [place for place, label in enumerate(labels) if label != IGNORED]
    targets = list(labels)
    for place, token, flag in zip(places, own, flags, strict=True):
        if flag and token != targets[place]:
            inputs[place] = int(token)
            if after_error == "mask_replaced":
                labels[place] = IGNORED
            if after_error == "mask_next" and place + 1 in places:
                labels[place + 1] = IGNORED
    return inputs, labels


def unpadded(batch, items):
    """Inputs and labels of each sample, wherever they are in the batch."""
    rows = []
    if "attention_mask" in batch:
        for row, mask in enumerate(batch["attention_mask"].bool()):
            rows.append((batch["input_ids"][row][mask].tolist(), batch["labels"][row][mask].tolist()))
    elif len(batch["labels"]) == len(items):
        for row, one in enumerate(items):
            rows.append(tuple(batch[name][row, : len(one["labels"])].tolist() for name in ("input_ids", "labels")))
    else:
        begin = 0
        for one in items:
            end = begin + len(one["labels"])
            rows.append(tuple(batch[name][0, begin:end].tolist() for name in ("input_ids", "labels")))
            begin = end
    return rows


@pytest.mark.parametrize(
    ("after_error", "labels"),
    [
        ("gold", [[-100, -100, 20, 21, 22, END], [-100, 5, 6, -100, -100, 7, 8]]),
        ("mask_next", [[-100, -100, 20, -100, 22, -100], [-100, 5, -100, -100, -100, 7, -100]]),
        ("mask_replaced", [[-100, -100, -100, 21, -100, END], [-100] * 7]),
    ],
)
def test_two_samples_by_hand(tmp_path, after_error, labels):
    data = [item([10, 11], [20, 21, 22, END]), item([1], [5, 6], [2, 3], [7, 8])]
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    write(buffer, [[30, 21, 32, END], [15, 16, 17, 18]])
    mixer = SelfTokenMixer(buffer, beta=1, collate=pad_left, after_error=after_error)
    batch = mixer([with_ids(data)[row] for row in (0, 1)])
    assert batch["input_ids"].tolist() == [[0, 10, 11, 30, 21, 32, END], [1, 15, 16, 2, 3, 17, 18]]
    assert batch["labels"].tolist() == [[-100, *labels[0]], labels[1]]
    assert batch["sample_id"].tolist() == [0, 1]
    assert batch["attention_mask"].tolist() == [[0] + [1] * 6, [1] * 7]


@pytest.mark.parametrize("collate", [pad_left, pad_right, packed])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("after_error", MODES)
def test_each_layout_has_the_same_tokens_per_sample(buffer, collate, beta, after_error):
    mixer = SelfTokenMixer(buffer, beta=beta, collate=collate, after_error=after_error, seed=3)
    for ids in ([0, 1, 2, 3], [11, 5, 7], [5], list(IDS)):
        items = [DATA[row] for row in ids]
        flags = flags_of(ids, [len(TARGETS[row]) for row in ids], beta=beta, seed=3)
        expected = [
            by_hand(DATA[row], buffer.own[row], flag, after_error) for row, flag in zip(ids, flags, strict=True)
        ]
        batch = mixer([SHARED[row] for row in ids])
        assert unpadded(batch, items) == expected
        plain = collate(items)
        padding = plain["labels"] == IGNORED  # prompts and padding, whatever it is
        assert torch.equal(batch["input_ids"][padding], plain["input_ids"][padding])
        special = torch.isin(plain["input_ids"], torch.tensor([BOS, END]))
        assert torch.equal(torch.isin(batch["input_ids"], torch.tensor([BOS, END])), special)
        assert set(batch) == {*plain, "sample_id"}


def rows_of_two(items):
    halves = [packed(items[:2]), packed(items[2:])]
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def test_several_rows_of_several_samples(tmp_path):
    data = [item([1, 2], [3] * length) for length in (5, 3, 2, 6)]
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    own = [[10 + row] * length for row, length in enumerate((5, 3, 2, 6))]
    write(buffer, own)
    batch = SelfTokenMixer(buffer, beta=1, collate=rows_of_two)([with_ids(data)[row] for row in range(4)])
    assert batch["input_ids"].tolist() == [
        [1, 2, *own[0], 1, 2, *own[1]], [1, 2, *own[2], 1, 2, *own[3]]
    ]  # fmt: skip


@pytest.mark.parametrize("span", [2, 5])
def test_spans_are_those_of_the_version(tmp_path, span):
    buffer = TokenBuffer(tmp_path, DATA, TOKENIZER)
    write(buffer, OTHERS, span=span)
    batch = SelfTokenMixer(buffer, beta=0.5, collate=packed)([SHARED[row] for row in IDS])
    flags = flags_of(IDS, [len(row) for row in TARGETS], beta=0.5, span=span)
    assert unpadded(batch, DATA) == [by_hand(*one) for one in zip(DATA, OTHERS, flags, strict=True)]


@pytest.mark.parametrize("after_error", MODES)
def test_a_decoder_is_fed_the_tokens_one_place_later(tmp_path, after_error):
    data = seq2seq_data([row for row in DATA if (row["labels"] != IGNORED).any()])
    targets = targets_of(data)
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    own = others(targets)
    write(buffer, own, seq2seq=True)
    mixer = SelfTokenMixer(buffer, beta=0.5, collate=encoded, after_error=after_error)
    ids = [4, 0, 2, 9]
    batch, plain = mixer([with_ids(data)[row] for row in ids]), encoded([data[row] for row in ids])
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    for row, flags in enumerate(flags_of(ids, [len(targets[row]) for row in ids], beta=0.5)):
        inputs, labels = plain["decoder_input_ids"][row].tolist(), plain["labels"][row].tolist()
        for place, (token, flag) in enumerate(zip(own[ids[row]].tolist(), flags, strict=True)):
            wrong = flag and token != targets[ids[row]][place]
            if wrong and place + 1 < len(inputs):
                inputs[place + 1] = token
            if wrong and after_error == "mask_replaced":
                labels[place] = IGNORED
            if wrong and after_error == "mask_next" and place + 1 < len(flags):
                labels[place + 1] = IGNORED
        assert batch["decoder_input_ids"][row].tolist() == inputs
        assert batch["labels"][row].tolist() == labels


def test_errors_do_not_reach_the_next_row(tmp_path):
    data = [{"input_ids": torch.tensor([1, END]), "labels": torch.tensor([2 + row, 9])} for row in range(3)]
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    write(buffer, [[2 + row, 10] for row in range(3)], seq2seq=True)  # all of the last tokens are wrong
    mixer = SelfTokenMixer(buffer, beta=1, collate=encoded, after_error="mask_next")
    batch = mixer([with_ids(data)[row] for row in range(3)])
    assert batch["labels"].tolist() == [[2, 9], [3, 9], [4, 9]]  # full rows, which are adjacent in memory
    assert batch["decoder_input_ids"].tolist() == [[END, 2], [END, 3], [END, 4]]  # the last token is no input


def transposed(items):  # as what pad_sequence(...).T gives is laid out
    batch = pad_right(items)
    return {name: values.T.contiguous().T for name, values in batch.items()}


def test_batches_that_are_not_contiguous(buffer):
    items = [SHARED[row] for row in IDS]
    expected = SelfTokenMixer(buffer, beta=0.5, collate=pad_right, after_error="mask_next")(items)
    mixed = SelfTokenMixer(buffer, beta=0.5, collate=transposed, after_error="mask_next")(items)
    assert all(torch.equal(mixed[name], expected[name]) for name in expected)


def test_what_was_replaced_when_it_was_generated(buffer):
    items = [SHARED[row] for row in IDS]
    mixer = SelfTokenMixer(buffer, beta=1, collate=packed, redraw=False)
    expected = [by_hand(*one) for one in zip(DATA, buffer.own, buffer.stored, strict=True)]
    for epoch in range(2):
        mixer.set_epoch(epoch)
        assert unpadded(mixer(items), DATA) == expected


def test_clean_sequences(buffer):
    items = [SHARED[row] for row in IDS]
    mixer = SelfTokenMixer(buffer, beta=1, collate=packed, clean_share=0.5)
    flags = flags_of(IDS, [len(row) for row in TARGETS], beta=1, clean_share=0.5)
    clean = [not flag.any() for flag in flags]
    assert 0 < sum(clean) < len(DATA)
    rows = unpadded(mixer(items), DATA)
    assert rows == [by_hand(*one) for one in zip(DATA, buffer.own, flags, strict=True)]


def test_seeds_and_epochs_change_the_mix_and_the_sampler_leads(buffer):
    items = [SHARED[row] for row in IDS]
    seen = set()
    for seed in (0, 1):
        sampler = Uniform(len(DATA))
        beta = BetaSchedule(0.5, epochs=4, shape="constant")
        mixer = SelfTokenMixer(buffer, beta=beta, collate=pad_left, seed=seed, sampler=sampler)
        free = SelfTokenMixer(buffer, beta=beta, collate=pad_left, seed=seed)
        for epoch in (0, 3):
            sampler.set_epoch(epoch)
            mixer.set_epoch(7)  # does nothing
            free.set_epoch(epoch)
            assert mixer.epoch == free.epoch == epoch
            assert torch.equal(mixer(items)["input_ids"], free(items)["input_ids"])
            seen.add(mixer(items)["input_ids"].numpy().tobytes())
    assert len(seen) == 4


def test_beta_follows_the_epoch(buffer):
    mixer = SelfTokenMixer(buffer, beta=BetaSchedule(1, epochs=3), collate=packed)
    items = [SHARED[row] for row in IDS]
    changed = []
    for epoch in range(3):
        mixer.set_epoch(epoch)
        assert mixer.beta(epoch) == epoch / 2
        changed.append(int((mixer(items)["input_ids"] != packed(DATA)["input_ids"]).sum()))
    wrong = sum(int((own != row).sum()) for own, row in zip(buffer.own, TARGETS, strict=True))
    assert changed[0] == 0 < changed[1] < changed[2] == wrong


def test_nothing_given_is_changed_and_no_generator_is_used(buffer):
    kept = copy.deepcopy(DATA)
    plain = {**pad_left([DATA[row] for row in IDS]), "sample_id": torch.from_numpy(IDS)}
    before, states = copy.deepcopy(plain), random_states()
    mixer = SelfTokenMixer(buffer, beta=1, after_error="mask_replaced")
    mixed = mixer.mix(plain)
    assert not torch.equal(mixed["input_ids"], plain["input_ids"])
    assert set(plain) == set(before)
    assert all(torch.equal(plain[name], before[name]) for name in plain)
    SelfTokenMixer(buffer, beta=0.5, collate=lambda items: pad_left(items[:1]))([SHARED[0]])
    assert all(torch.equal(one[name], old[name]) for one, old in zip(DATA, kept, strict=True) for name in one)
    assert random_states() == states


def test_the_default_collate_and_a_batch_of_one(buffer):
    batch = SelfTokenMixer(buffer, beta=1)([SHARED[2]])  # the item's own tensors, with a dimension before
    flags = [True] * len(TARGETS[2])
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == tuple(
        [part] for part in by_hand(DATA[2], buffer.own[2], flags)
    )


def test_batches_without_ids(buffer):
    items = [SHARED[row] for row in (1, 2)]
    with_them, without = (SelfTokenMixer(buffer, beta=1, collate=pad_left, keep_ids=keep) for keep in (True, False))
    batch = without(items)
    assert "sample_id" not in batch
    assert torch.equal(batch["input_ids"], with_them(items)["input_ids"])


def test_pickled_mixers_mix_the_same_and_have_no_data(buffer):
    mixer = SelfTokenMixer(buffer, beta=BetaSchedule(0.5, epochs=1), collate=pad_left, seed=4, clean_share=0.1)
    mixer.set_epoch(2)
    copied = pickle.loads(pickle.dumps(mixer))
    assert copied.buffer.data is None
    assert copied.epoch == 2
    items = [SHARED[row] for row in IDS]
    assert torch.equal(copied(items)["input_ids"], mixer(items)["input_ids"])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_persistent_workers_see_new_versions_and_epochs(tmp_path, method):
    buffer = TokenBuffer(tmp_path, DATA, TOKENIZER)
    sampler = Uniform(len(DATA), seed=2)
    mixer = SelfTokenMixer(buffer, beta=0.6, collate=pad_left, after_error="mask_next", sampler=sampler)
    given = {"batch_size": 5, "sampler": sampler, "collate_fn": mixer}
    here = DataLoader(SHARED, **given)
    away = DataLoader(SHARED, num_workers=2, persistent_workers=True, multiprocessing_context=method, **given)
    seen = set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        write(buffer, others(TARGETS, 1 + epoch))
        expected, found = list(here), list(away)
        assert len(expected) == len(found) == 3
        for one, other in zip(expected, found, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        wrong = expected[0]["input_ids"] != pad_left([DATA[row] for row in expected[0]["sample_id"]])["input_ids"]
        assert wrong.any()
        seen.add(expected[0]["input_ids"].numpy().tobytes())
    assert len(seen) == 3


def test_a_batch_is_of_one_version_while_versions_are_written(tmp_path):
    """Each version puts one token everywhere; what is read meanwhile must be one token a batch."""
    data = [item([1], [200] * 40) for _ in range(64)]
    buffer = TokenBuffer(tmp_path, data, TOKENIZER)
    write(buffer, [[100] * 40] * 64)
    mixer = SelfTokenMixer(pickle.loads(pickle.dumps(buffer)), beta=0.5)
    items = [with_ids(data)[row] for row in range(64)]
    stop = threading.Event()

    def writer():
        for version in range(40):
            write(buffer, [[101 + version] * 40] * 64)
        stop.set()

    thread = threading.Thread(target=writer)
    thread.start()
    seen = []
    while not stop.is_set():
        batch = mixer(items)["input_ids"]
        own = torch.unique(batch[(batch != 200) & (batch != 1)]).tolist()
        assert len(own) == 1
        seen.append(own[0])
    thread.join()
    assert len(set(seen)) > 3
    assert seen == sorted(seen)

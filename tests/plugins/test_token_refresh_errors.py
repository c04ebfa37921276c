"""What goes wrong in a refresh leaves the version before, on one and on two ranks; attempts for corrections."""

import math
import os
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from token_support import BOS, DATA, END, TOKENIZER, disturbed, item, llama, random_states

from samplewise.cuda_ext import Ledger
from samplewise.plugins import (
    BetaSchedule,
    CorrectionDataset,
    SelfTokenMixer,
    TokenBuffer,
    refresh_attempts,
    refresh_self_tokens,
)
from samplewise.plugins.token_refresh import token_drift
from support import run_ranks

SINGLE = [one for row, one in enumerate(DATA) if row not in (3, 5)]  # with one response each
SIZE = len(SINGLE)


class Breakable:
    """A data set of which some rows stop working, or change."""

    def __init__(self, data):
        self.data, self.broken, self.changed = data, (), ()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, row):
        if row in self.broken:
            raise OSError(f"row {row} cannot be read")
        if row in self.changed:
            return item([1], [2, 3])
        return self.data[row]


def mixer_of(folder, data=DATA, **given):
    return SelfTokenMixer(TokenBuffer(folder, data, TOKENIZER), **{"beta": 0.5, **given})


def corrections_of(folder, data=SINGLE, **given):
    return CorrectionDataset(TokenBuffer(folder, data, TOKENIZER), [10], **given)


def contents(buffer, kind="tokens"):
    rows = buffer.take(np.arange(buffer.size), kind)
    names = ("digests", "versions", "replaced")
    return [
        rows.tokens.values.tolist(),
        rows.tokens.offsets.tolist(),
        *(getattr(rows, name).tolist() for name in names),
    ]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"rollout": "greedy"}, ValueError, "rollout must be one of 'parallel', 'sequential', 'span'"),
        ({"passes": 0}, ValueError, "passes"),
        ({"passes": 2, "rollout": "sequential"}, ValueError, "passes are of the parallel rollout"),
        ({"passes": 2, "rollout": "span"}, ValueError, "passes are of the parallel rollout"),
        ({"span": 0}, ValueError, "span"),
        ({"generate": {"use_cache": True}}, ValueError, "does not generate; give rollout='sequential'"),
        ({"generate": {"num_beams": 2}, "rollout": "sequential"}, ValueError, "'num_beams': ....*: own tokens are the"),
        ({"generate": {"max_time": 1.0}, "rollout": "span"}, ValueError, "leave out what ends generation or bends it"),
        ({"generate": {"do_sample": True}, "rollout": "sequential"}, ValueError, "'do_sample': ....*: that is decided"),
        ({"generate": {"temperature": 1.0}, "rollout": "sequential"}, ValueError, "temperature=0.8 draws tokens"),
        ({"generate": {"max_new_tokens": 3}, "rollout": "span"}, ValueError, "max_new_tokens"),
        ({"temprature": 1.0}, TypeError, r"temprature=...\): there are temperature, batch_size, ledger"),
        ({"temperature": -1}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 2.0}, TypeError, "batch_size"),
        ({"budget": 0}, ValueError, "budget"),
        ({"ledger": [1.0]}, TypeError, "a Ledger is needed"),
        ({"ledger": Ledger(11)}, ValueError, "it has 11 samples, the data 12"),
        ({"epoch": -1}, ValueError, "epoch"),
        ({"mixer": "mixer"}, TypeError, "a SelfTokenMixer is needed"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model=Linear: a language model of transformers is needed"),
        ({"model": torch.nn.Sequential(llama())}, TypeError, "model=Sequential"),
        ({"model": "gpt2"}, TypeError, "model=str"),
    ],
)
def test_wrong_options(tmp_path, given, error, match):
    mixer = mixer_of(tmp_path)
    with pytest.raises(error, match=match):
        refresh_self_tokens(**{"model": llama(), "mixer": mixer, "progress": False, **given})
    assert (mixer.buffer.version, os.listdir(tmp_path)) == (0, [])


@pytest.mark.parametrize("given", [{"samples": 0}, {"batch_size": 0}])
def test_wrong_options_of_drift(tmp_path, given):
    with pytest.raises(ValueError, match="token_drift"):
        token_drift(llama(), mixer_of(tmp_path), **given)


def poisoned():
    model = llama()
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    return model


@pytest.mark.parametrize("rollout", ["parallel", "sequential"])
def test_a_refresh_that_fails_leaves_the_version_before(tmp_path, rollout):
    data = Breakable(DATA)
    mixer = mixer_of(tmp_path, data)
    refresh_self_tokens(llama(), mixer, rollout=rollout, progress=False)
    before, files, states = contents(mixer.buffer), sorted(os.listdir(tmp_path)), random_states()

    def same():
        assert mixer.buffer.version == 1
        assert contents(mixer.buffer) == before
        assert sorted(os.listdir(tmp_path)) == files
        assert random_states() == states

    model = poisoned().train()
    seen = disturbed(model)
    with pytest.raises(ValueError, match="the model's logits are NaN or infinite; nothing was written"):
        refresh_self_tokens(model, mixer, rollout=rollout, progress=False)
    assert all(module.training for module in model.modules())
    assert seen == [True] * len(seen) != []
    same()
    data.broken = (11,)
    with pytest.raises(OSError, match="row 11 cannot be read"):
        refresh_self_tokens(llama(1), mixer, rollout=rollout, progress=False, batch_size=1)
    same()
    data.broken, data.changed = (), (7,)
    with pytest.raises(ValueError, match="the response of sample 7 is not the one that the buffer was made for; the"):
        refresh_self_tokens(llama(1), mixer, rollout=rollout, progress=False)
    same()
    data.changed = ()
    refresh_self_tokens(llama(1), mixer, rollout=rollout, progress=False)
    assert mixer.buffer.version == 2


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([item([1, 2], []), item([3], [])], "refresh_self_tokens: no sample has a response"),
        ([item([1], [2]), {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}], "sample 1: its labels"),
    ],
)
def test_data_that_are_not_understood(tmp_path, data, match):
    with pytest.raises(ValueError, match=match):
        refresh_self_tokens(llama(), mixer_of(tmp_path, data), progress=False)
    assert os.listdir(tmp_path) == []


def test_a_copy_without_data(tmp_path):
    import pickle

    mixer = pickle.loads(pickle.dumps(mixer_of(tmp_path)))
    with pytest.raises(ValueError, match="this buffer is a copy without its data"):
        refresh_self_tokens(llama(), mixer, progress=False)


def test_one_folder_is_not_for_tokens_and_for_attempts(tmp_path):
    refresh_self_tokens(llama(), mixer_of(tmp_path / "tokens", SINGLE), progress=False)
    with pytest.raises(ValueError, match="it holds tokens, not attempts"):
        refresh_attempts(llama(), corrections_of(tmp_path / "tokens"), max_new_tokens=4, progress=False)
    refresh_attempts(llama(), corrections_of(tmp_path / "attempts"), max_new_tokens=4, progress=False)
    with pytest.raises(ValueError, match="it holds attempts, not tokens"):
        token_drift(llama(), mixer_of(tmp_path / "attempts", SINGLE))
    with pytest.raises(ValueError, match="it holds attempts, not tokens"):
        refresh_self_tokens(llama(), mixer_of(tmp_path / "attempts", SINGLE), progress=False)


def test_prompt_tuning_is_refused(tmp_path):
    import peft

    tuned = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="use another adapter, such as LoRA"):
        refresh_self_tokens(tuned, mixer_of(tmp_path), progress=False)


def test_another_refresh_for_the_first_epoch_is_told(tmp_path):
    mixer = SelfTokenMixer(mixer_of(tmp_path).buffer, beta=BetaSchedule(0.5, epochs=3))
    refresh_self_tokens(llama(), mixer, progress=False)
    with pytest.warns(UserWarning, match=r"call mixer.set_epoch\(epoch\)"):
        refresh_self_tokens(llama(), mixer, progress=False)
    mixer.set_epoch(1)
    refresh_self_tokens(llama(), mixer, progress=False)


# --- attempts ---------------------------------------------------------------------------------------------------------


def generated(model, one, most, **given):
    prompt = one["input_ids"][one["labels"] == -100][None]
    given = {"max_new_tokens": most, "do_sample": False, "eos_token_id": END, "pad_token_id": END, **given}
    row = model.generate(prompt, attention_mask=torch.ones_like(prompt), **given)[0, prompt.shape[1] :].tolist()
    row = row[: row.index(END)] if END in row else row
    while row and row[0] == BOS:
        row = row[1:]
    return row[: row.index(BOS)] if BOS in row else row


@pytest.mark.parametrize("given", [{}, {"num_beams": 3}, {"repetition_penalty": 3.0}])
def test_attempts_are_what_generate_writes(tmp_path, given):
    corrections = corrections_of(tmp_path)
    most, model = 16, llama().train()
    states, seen = random_states(), disturbed(model)
    figures = refresh_attempts(model, corrections, max_new_tokens=most, batch_size=4, generate=given, progress=False)
    assert all(module.training for module in model.modules())
    assert seen == [True] * len(seen) != []
    assert random_states() == states
    expected = [generated(llama(), one, most, **given) for one in SINGLE]
    rows = corrections.buffer.take(np.arange(SIZE), "attempts")
    for row, answer in enumerate(expected):
        np.testing.assert_array_equal(rows.tokens[row], answer)
    lengths = [len(answer) for answer in expected]
    assert len(set(lengths)) > 1 or given
    assert figures["tokens"] == sum(lengths)
    assert figures["unfinished"] == lengths.count(most) / SIZE
    assert figures["agreement"] == 0
    assert figures["refreshed"] == 1
    assert math.isnan(figures["changed"])
    assert rows.versions.tolist() == [1] * SIZE
    assert refresh_attempts(llama(), corrections, max_new_tokens=most, generate=given, progress=False)["changed"] == 0


def test_attempts_that_are_the_reference(tmp_path):
    data = []
    for row in range(4):
        answer = generated(llama(), item([40 + row, 3], [0]), 6)
        data.append(item([40 + row, 3], [*answer, 257] if row != 1 else [9, *answer]))
    corrections = corrections_of(tmp_path, data)
    assert refresh_attempts(llama(), corrections, max_new_tokens=6, progress=False)["agreement"] == 0.75


def test_attempts_are_drawn_by_seed_and_epoch(tmp_path):
    found = []
    for name, given, epoch in (("a", {}, 0), ("b", {}, 0), ("c", {"seed": 1}, 0), ("d", {}, 1)):
        corrections = corrections_of(tmp_path / name, **given)
        refresh_attempts(
            llama(), corrections, max_new_tokens=5, temperature=1.0, epoch=epoch, batch_size=3 + epoch, progress=False
        )
        found.append(contents(corrections.buffer, "attempts")[0])
    assert found[0] == found[1]
    assert len({str(tokens) for tokens in found}) == 3


def test_a_budget_counts_the_most_of_each_attempt(tmp_path):
    corrections, ledger = corrections_of(tmp_path), Ledger(SIZE)
    ledger.update(torch.tensor([2, 8]), torch.tensor([1.0, 2.0]))
    figures = refresh_attempts(
        llama(), corrections, max_new_tokens=5, budget=11, ledger=ledger, epoch=3, progress=False
    )
    assert corrections.buffer.take(np.arange(SIZE), "attempts").versions.nonzero()[0].tolist() == [2, 8]
    assert figures["refreshed"] == 2 / SIZE


class Endless:
    all_special_ids = ()

    def __len__(self):
        return 256

    def convert_ids_to_tokens(self, ids):
        return [str(number) for number in ids]


def test_what_attempts_refuse(tmp_path):
    model = llama()
    with pytest.raises(TypeError, match="a CorrectionDataset is needed"):
        refresh_attempts(model, mixer_of(tmp_path / "mixer"))
    with pytest.raises(ValueError, match="max_new_tokens"):
        refresh_attempts(model, corrections_of(tmp_path / "none"), max_new_tokens=0)
    with pytest.raises(ValueError, match="refresh_attempts: sample 5 must have one response, in one piece"):
        refresh_attempts(model, corrections_of(tmp_path / "turns", DATA), max_new_tokens=3, progress=False)
    endless = CorrectionDataset(TokenBuffer(tmp_path / "endless", SINGLE, Endless()), [10])
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no end-of-text token, so that no attempt ends; set its eos_token"):
        refresh_attempts(model, endless, progress=False)
    model = llama()
    corrections = corrections_of(tmp_path / "more")
    refresh_attempts(model, corrections, max_new_tokens=3, progress=False)
    with pytest.raises(ValueError, match=r"temperature=1\): beams are searched without one"):
        refresh_attempts(model, corrections, max_new_tokens=3, temperature=1.0, generate={"num_beams": 2})
    with pytest.raises(ValueError, match=r"refresh_attempts\(max_new_tokens=4\): the buffer's rows hold 3 tokens"):
        refresh_attempts(model, corrections, max_new_tokens=4, progress=False)


# --- two ranks --------------------------------------------------------------------------------------------------------

STEPS = (
    (0, {"batch_size": 2}), (1, {"rollout": "sequential", "budget": 30}), (1, {"budget": 8, "temperature": 0.8}),
    (2, {"rollout": "span", "span": 2}),
)  # fmt: skip


def refresh_on(rank, folder, world=1):
    """Buffers and figures after each step; with two ranks errors, too."""
    data, found = Breakable(DATA), []
    mixer = mixer_of(folder / "tokens", data)
    ledger = Ledger(len(DATA))
    ledger.update(torch.arange(12)[rank::world], torch.arange(12.0)[rank::world])
    ledger.sync()
    for epoch, (seed, given) in enumerate(STEPS):
        model = llama(seed)
        if world > 1 and epoch:
            model = torch.nn.parallel.DistributedDataParallel(model)
        figures = refresh_self_tokens(model, mixer, epoch=epoch, ledger=ledger, progress=False, **given)
        del figures["seconds"]
        found.append((contents(mixer.buffer), figures, mixer.buffer.version))
    corrections = corrections_of(folder / "attempts")
    figures = refresh_attempts(llama(), corrections, max_new_tokens=6, batch_size=2, progress=False)
    del figures["seconds"]
    found.append((contents(corrections.buffer, "attempts"), figures, 1))
    errors = []
    if world > 1:
        for model, broken in ((poisoned() if rank else llama(), ()), (llama(), (1,) if rank else ()), (poisoned(), ())):
            data.broken = broken
            try:
                refresh_self_tokens(model, mixer, progress=False)
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
            assert contents(mixer.buffer) == found[-2][0]
    return found, errors, token_drift(llama(2), mixer)


def test_two_ranks_write_what_one_writes(tmp_path):
    alone, _, drift = refresh_on(0, tmp_path / "alone")
    assert alone[1][0][1] == alone[0][0][1]
    assert sum(1 for version in alone[2][0][3] if version == 3) == 1  # one sample: nothing to do for the second rank
    both = run_ranks(2, refresh_on, tmp_path / "two", 2)
    for found, _, drifted in both:
        for (rows, figures, version), (expected, others, number) in zip(found, alone, strict=True):
            assert rows == expected
            assert figures == pytest.approx(others, nan_ok=True)
            assert version == number
        assert drifted == drift == 0
    (first, second) = (errors for _, errors, _ in both)
    assert len(first) == len(second) == 3
    assert first[0].startswith("RuntimeError: rank 1: ValueError: the model's logits are NaN")
    assert second[0].startswith("ValueError: the model's logits are NaN")
    assert first[1].startswith("RuntimeError: rank 1: OSError: row 1 cannot be read")
    assert second[1] == "OSError: row 1 cannot be read"
    assert first[2].startswith("ValueError: the model's logits are NaN")
    assert second[2] == first[2]


@contextmanager
def full(writing, moment, *given):
    """A disk on which a version cannot be begun, or not be finished."""
    if moment == "begin":
        raise OSError("the disk is full")
    with writing(*given) as writer:
        yield writer
        raise OSError("the disk is full")


def on_a_full_disk(rank, folder):
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=15), dist.group.WORLD)  # instead of half an hour
    mixer, found = mixer_of(folder / "tokens"), []
    for moment in ("begin", "end"):
        if rank == 0:  # which writes
            mixer.buffer.writing = partial(full, TokenBuffer(folder / "tokens", DATA, TOKENIZER).writing, moment)
        try:
            refresh_self_tokens(llama(), mixer, progress=False)
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found, mixer.buffer.version


def test_a_disk_that_is_full_is_told_to_both_ranks(tmp_path):
    # bug: what goes wrong in opening or publishing the version is raised on rank 0 only; the other one waits for it
    (first, _), (second, version) = run_ranks(2, on_a_full_disk, tmp_path)
    assert first == ["OSError: the disk is full"] * 2
    assert second == ["RuntimeError: rank 0: OSError: the disk is full"] * 2
    assert version == 0

"""Refreshing a buffer: what is written, what is counted, who is first, and what stays after a failure."""

import math

import numpy as np
import pytest
import torch
from token_support import (
    DATA,
    END,
    SPECIAL,
    TOKENIZER,
    disturbed,
    item,
    llama,
    padded,
    random_states,
    seq2seq_data,
    t5,
    targets_of,
    teacher_forced,
    write,
)

from samplewise.cuda_ext import Ledger
from samplewise.loaders import with_ids
from samplewise.plugins import SelfTokenMixer, TokenBuffer, refresh_self_tokens
from samplewise.plugins.self_tokens import draw_replaced
from samplewise.plugins.token_buffer import read_sample
from samplewise.plugins.token_refresh import token_drift
from samplewise.plugins.token_rollouts import allowed
from samplewise.plugins.token_writing import refresh_order
from samplewise.recipes.responses import pad_left

ROLLOUTS = ({"rollout": "parallel"}, {"rollout": "parallel", "passes": 3}, {"rollout": "sequential"},
            {"rollout": "span", "span": 3})  # fmt: skip


def learnt():
    """Samples of which the model writes some tokens itself: its own answers, each with another token in it."""
    rng, data = np.random.default_rng(4), []
    for row in range(10):
        prompt = rng.integers(0, 256, 3).tolist()
        tokens = list(prompt)
        for _ in range(4 + row % 3):
            tokens.append(int(teacher_forced(llama(), [*tokens, 0])[-1]))
        tokens[4 + row % 3] = (tokens[4 + row % 3] + 7) % 256
        data.append(item(prompt, [*tokens[3:], END]))
    data[6] = item([4, 5], [])
    first, own = next(
        pair for pair in ((n, teacher_forced(llama(), [n, 7, 0])[-1]) for n in range(256)) if pair[1] > 255
    )
    data[8] = item([first, 7], [int(own), 3, END])  # it writes this special token itself, which is no agreement
    return data


LEARNT = learnt()


def mixer_of(folder, data=LEARNT, **given):
    return SelfTokenMixer(
        TokenBuffer(folder, data, TOKENIZER), **{"beta": 0.5, "collate": pad_left, "seed": 3, **given}
    )


def refresh(model, mixer, **given):
    return refresh_self_tokens(model, mixer, progress=False, **given)


def rows_of(mixer):
    """Tokens, replaced and versions of all rows, and what each version was written with: its beta and its epoch."""
    rows = mixer.buffer.take(np.arange(mixer.buffer.size))
    cut = np.cumsum(rows.tokens.lengths)[:-1]
    return (
        [part.tolist() for part in np.split(rows.tokens.values, cut)],
        [part.tolist() for part in np.split(rows.replaced, cut)],
        rows.versions.tolist(), {int(k): (v["beta"], v["epoch"]) for k, v in rows.meta["settings"].items()},
    )  # fmt: skip


def written_by(model, data=LEARNT):
    """Targets, own tokens and what is stored of each sample, from a forward of one text at a time."""
    rows = []
    for one in data:
        sample = read_sample(one, "")
        own = teacher_forced(model, sample.tokens)[sample.places - 1]
        rows.append(
            (sample.targets, own, np.where(allowed(sample.targets, own, SPECIAL), own, sample.targets).tolist())
        )
    return rows


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_and_rows_by_hand(tmp_path):
    mixer = mixer_of(tmp_path)
    mixer.set_epoch(2)
    lengths = np.array([len(row) for row in targets_of(LEARNT)])
    total, before = int(lengths.sum()), None
    for version, (model, beta_epoch) in enumerate([(llama(), 2), (llama(1), 5)], 1):
        figures = refresh(model, mixer, epoch=beta_epoch, batch_size=3)
        flags = np.split(
            draw_replaced(np.arange(10), lengths, beta=0.5, seed=3, epoch=beta_epoch), np.cumsum(lengths)[:-1]
        )
        written = written_by(model)
        tokens, replaced, versions, settings = rows_of(mixer)
        assert tokens == [stored for _, _, stored in written]
        assert replaced == [flag.tolist() for flag in flags]
        there = [int(row != 6) for row in range(10)]
        assert versions == [version * one for one in there]
        assert settings[version] == (0.5, beta_epoch)
        plain = equal = other = changed = 0
        for row, (targets, own, stored) in enumerate(written):
            for place, target in enumerate(targets.tolist()):
                plain += target not in SPECIAL
                equal += target not in SPECIAL and own[place] == target
                other += bool(flags[row][place]) and stored[place] != target
                changed += before is not None and before[row][place] != stored[place]
        assert other > 0
        assert figures == {
            "agreement": equal / plain, "replaced": other / total, "refreshed": 1.0, "tokens": float(total),
            "changed": pytest.approx(changed / total if before else math.nan, nan_ok=True),
            "seconds": figures["seconds"],
        }  # fmt: skip
        assert figures["seconds"] > 0
        if version == 1:
            assert 0.3 < figures["agreement"] < 0.9
        else:
            assert 0 < changed < total
        before = tokens
    meta = mixer.buffer.table.snapshot().meta
    assert {name: meta[name] for name in meta if name != "settings"} == {
        "rollout": "parallel", "passes": 1, "span": 1, "temperature": 0.0, "seed": 3, "epoch": 5, "beta": 0.5,
        "seq2seq": False, "kind": "tokens",
    }  # fmt: skip


def test_the_same_model_again_changes_nothing(tmp_path):
    mixer = mixer_of(tmp_path)
    for given in ROLLOUTS:
        refresh(llama(), mixer, **given)
        tokens = rows_of(mixer)[0]
        assert refresh(llama(), mixer, **given, batch_size=2)["changed"] == 0
        assert rows_of(mixer)[0] == tokens


def test_rollouts_differ_and_spans_are_replaced_together(tmp_path):
    mixer, seen = mixer_of(tmp_path, DATA, beta=0.7), []
    for given in ROLLOUTS:
        refresh(llama(), mixer, **given)
        tokens, replaced = rows_of(mixer)[:2]
        seen.append(tokens)
        span = given.get("span", 1)
        assert mixer.buffer.table.snapshot().meta["span"] == span
        lengths = np.array([len(row) for row in tokens])
        flags = draw_replaced(np.arange(12), lengths, beta=0.7, seed=3, epoch=0, span=span)
        assert np.concatenate(replaced).tolist() == flags.tolist()
        batch = mixer([with_ids(DATA)[row] for row in range(12)])
        changed = batch["input_ids"] != pad_left(DATA)["input_ids"]
        own = np.concatenate(tokens)
        wrong = flags & (own != np.concatenate(targets_of()))
        assert batch["input_ids"][changed].tolist() == own[wrong].tolist()
    assert len({str(tokens) for tokens in seen}) == len(ROLLOUTS)


def test_special_tokens_are_neither_replaced_nor_put_in(tmp_path):
    mixer = mixer_of(tmp_path, DATA, beta=1)
    for given in ({}, {"rollout": "sequential"}, {"temperature": 1.0}):
        refresh(llama(), mixer, **given)
        own, targets = np.concatenate(rows_of(mixer)[0]), np.concatenate(targets_of())
        special = np.isin(targets, SPECIAL)
        np.testing.assert_array_equal(np.isin(own, SPECIAL), special)
        np.testing.assert_array_equal(own[special], targets[special])
        assert (own != targets).mean() > 0.5
    assert np.isin(np.concatenate([own for _, own, _ in written_by(llama(), DATA)]), SPECIAL).any()


def test_a_temperature_draws_by_seed_and_epoch(tmp_path):
    found = []
    for name, seed, epoch in (("a", 0, 0), ("b", 0, 0), ("c", 1, 0), ("d", 0, 1)):
        mixer = mixer_of(tmp_path / name, seed=seed)
        refresh(llama(), mixer, temperature=1.0, epoch=epoch)
        found.append(rows_of(mixer)[0])
    assert found[0] == found[1]
    assert found[0] != found[2]
    assert found[0] != found[3]
    assert found[2] != found[3]


@pytest.mark.parametrize("given", [{}, {"passes": 2}, {"rollout": "sequential"}])
def test_models_with_an_encoder(tmp_path, given):
    mixer = mixer_of(tmp_path, seq2seq_data())
    refresh(t5(), mixer, **given)
    assert mixer.buffer.table.snapshot().meta["seq2seq"] is True
    assert token_drift(t5(), mixer) == 0
    assert (np.concatenate(rows_of(mixer)[0]) != np.concatenate(targets_of())).mean() > 0.5
    with pytest.raises(ValueError, match=r"refresh_self_tokens\(model\): the buffer was written by a model of another"):
        refresh(llama(), mixer)


def packed_row(*documents):
    tokens, labels = (torch.cat([one[name] for one in documents]) for name in ("input_ids", "labels"))
    positions = torch.cat([torch.arange(len(one["labels"])) for one in documents])
    return {"input_ids": tokens, "labels": labels, "position_ids": positions}


@pytest.mark.parametrize("given", ROLLOUTS[:3])
def test_documents_of_a_row_have_contexts_of_their_own(tmp_path, given):
    data = [packed_row(*DATA[:3]), packed_row(DATA[3], DATA[4]), packed_row(DATA[8])]
    mixer, alone = mixer_of(tmp_path / "rows", data, beta=1), mixer_of(tmp_path / "alone", DATA, beta=1)
    refresh(llama(), mixer, **given)
    refresh(llama(), alone, **given)
    found = rows_of(alone)[0]
    assert rows_of(mixer)[0] == [[*found[0], *found[1], *found[2]], found[4], found[8]]
    unaware = mixer_of(tmp_path / "one", [{**data[0], "position_ids": None}], beta=1)
    refresh(llama(), unaware, **given)
    assert rows_of(unaware)[0][0] != rows_of(mixer)[0][0]


# --- order and budget -------------------------------------------------------------------------------------------------

NAN = math.nan


@pytest.mark.parametrize(
    ("lengths", "versions", "losses", "budget", "order"),
    [
        ([2, 2, 2], [1, 1, 1], [1, 3, 2], None, [1, 2, 0]),
        ([2, 2, 2, 2], [4, 4, 1, 4], [NAN, 1, NAN, 5], None, [3, 1, 2, 0]),  # without a loss last, the oldest first
        ([2, 2, 2], [3, 0, 2], None, None, [1, 2, 0]),
        ([2, 2, 2], [3, 0, 2], [1, 1, 1], None, [1, 2, 0]),
        ([2, 2, 2], [0, 3, 9], [1, 2, 3], None, [2, 1, 0]),  # the loss counts before the age
        ([0, 1, 0, 2], [0, 0, 0, 0], [9, 1, 8, 2], None, [3, 1]),
        ([3, 3, 3], [1, 1, 1], [1, 2, 3], 9, [2, 1, 0]),
        ([3, 3, 3], [1, 1, 1], [1, 2, 3], 8, [2, 1]),
        ([3, 3, 3], [1, 1, 1], [1, 2, 3], 3, [2]),
        ([1, 5, 2], [1, 1, 1], [1, 2, 3], 4, [2]),  # it ends there: the last one would fit
        ([1, 5, 2], [1, 1, 1], [math.inf, 2, -1], None, [0, 1, 2]),
        ([0, 0], [0, 0], None, 1, []),
    ],
)
def test_who_is_first(lengths, versions, losses, budget, order):
    arrays = np.array(lengths), np.array(versions), None if losses is None else np.array(losses, np.float32)
    for seed in range(5):
        assert refresh_order(*arrays, budget=budget, rng=np.random.default_rng(seed)).tolist() == order


def test_chance_decides_among_equals():
    rng = np.random.default_rng(0)
    orders = [tuple(refresh_order(np.ones(3), np.zeros(3), None, budget=2, rng=rng).tolist()) for _ in range(600)]
    counts = np.array([orders.count(order) for order in sorted(set(orders))])
    assert len(counts) == 6
    assert abs(counts - 100).max() < 5 * math.sqrt(600 * 5 / 36)


def test_a_budget_that_is_too_small():
    with pytest.raises(ValueError, match="budget=2: the first sample that is due, 1, takes 3 tokens; give more"):
        refresh_order(np.array([1, 3]), np.zeros(2), np.array([0, 1.0]), budget=2, rng=np.random.default_rng(0))


def test_the_highest_losses_are_refreshed_and_the_others_stay(tmp_path):
    mixer = mixer_of(tmp_path)
    refresh(llama(), mixer)
    before = rows_of(mixer)
    lengths = [len(row) for row in before[0]]
    ledger = Ledger(10)
    ledger.update(torch.tensor([1, 4, 7, 2, 6]), torch.tensor([0.5, 3.0, 2.0, 1.0, 99.0]))  # 6 has no response
    budget = lengths[4] + lengths[7] + lengths[2] + lengths[1] - 1
    figures = refresh(llama(1), mixer, ledger=ledger, budget=budget, epoch=4)
    due = [2, 4, 7]
    after, written = rows_of(mixer), written_by(llama(1))
    for row in range(10):
        if row in due:
            assert (after[0][row], after[2][row]) == (written[row][2], 2)
        else:
            assert [part[row] for part in after[:3]] == [part[row] for part in before[:3]]
    assert after[3] == {1: (0.5, 0), 2: (0.5, 4)}
    count = sum(lengths[row] for row in due)
    changed = sum(a != b for row in due for a, b in zip(after[0][row], before[0][row], strict=True))
    assert (figures["tokens"], figures["refreshed"]) == (count, count / sum(lengths))
    assert figures["changed"] == changed / count


def test_budgets_go_round_without_a_ledger(tmp_path):
    mixer = mixer_of(tmp_path)
    longest = max(len(row) for row in targets_of(LEARNT))
    refresh(llama(), mixer, budget=2 * longest)
    tokens, _, versions, _ = rows_of(mixer)
    for row, (targets, _, stored) in enumerate(written_by(llama())):
        assert tokens[row] == (stored if versions[row] else targets.tolist())
    assert 2 <= sum(versions) < 9
    for _ in range(5):
        refresh(llama(), mixer, budget=2 * longest)
    versions = [version for row, version in enumerate(rows_of(mixer)[2]) if row != 6]
    assert min(versions) > 0  # all were refreshed, the oldest first
    with pytest.raises(ValueError, match="budget=1: the first sample that is due"):
        refresh(llama(), mixer, budget=1)


# --- drift ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [*ROLLOUTS, {"temperature": 0.9}, {"rollout": "sequential", "temperature": 0.9}])
def test_drift(tmp_path, given):
    mixer = mixer_of(tmp_path, DATA)
    refresh(llama(), mixer, **given, epoch=3)
    mixer.set_epoch(8)
    assert token_drift(llama(), mixer) == 0
    assert token_drift(llama(), mixer, samples=3, batch_size=1) == 0
    moved = llama()
    with torch.no_grad():
        moved.lm_head.weight[::2] *= 1.2
    assert 0 < token_drift(moved, mixer) < token_drift(llama(1), mixer) <= 1


def test_drift_is_exact(tmp_path):
    mixer = mixer_of(tmp_path)
    refresh(llama(), mixer)
    now, then = written_by(llama(1)), written_by(llama())
    for samples, rows in ((64, [0, 1, 2, 3, 4, 5, 7, 8, 9]), (2, [0, 9]), (1, [0])):
        pairs = [(a, b) for row in rows for a, b in zip(now[row][2], then[row][2], strict=True)]
        assert token_drift(llama(1), mixer, samples=samples) == sum(a != b for a, b in pairs) / len(pairs)


def test_drift_of_nothing(tmp_path):
    mixer = mixer_of(tmp_path)
    with pytest.raises(RuntimeError, match="nothing has been written yet"):
        token_drift(llama(), mixer)
    write(mixer.buffer, [], ids=np.zeros(0, np.int64))
    assert math.isnan(token_drift(llama(), mixer))


def test_drift_of_rows_that_were_generated_in_other_ways(tmp_path):
    mixer = mixer_of(tmp_path)
    refresh(llama(), mixer)
    refresh(llama(), mixer, rollout="sequential", temperature=2.0, budget=12, epoch=1)
    assert token_drift(llama(), mixer) == 0


def test_nothing_of_the_model_or_the_generators_is_changed(tmp_path):
    model = llama()
    model.train()
    model.model.layers[0].eval()
    modes, weights = [module.training for module in model.modules()], str(model.state_dict())
    states, mixer, seen = random_states(), mixer_of(tmp_path), disturbed(model)
    for given in (*ROLLOUTS, {"temperature": 1.0}):
        refresh(model, mixer, **given)
        forwards = len(seen)
        token_drift(model, mixer)
        assert len(seen) > forwards > 0
    assert all(seen)
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert str(model.state_dict()) == weights
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rollout", ["parallel", "sequential"])
def test_padding_of_the_data_set_changes_nothing(tmp_path, side, rollout):
    rows = []
    for name, data in (("plain", DATA), ("padded", [padded(one, 40, side) for one in DATA])):
        mixer = SelfTokenMixer(TokenBuffer(tmp_path / name, data, TOKENIZER), beta=0.5)
        refresh_self_tokens(llama(), mixer, rollout=rollout, progress=False)
        rows.append(mixer.buffer.take(np.arange(len(data))))
    np.testing.assert_array_equal(rows[0].tokens.values, rows[1].tokens.values)

import copy
import io

import numpy as np
import pytest
import torch

from samplewise.cuda_ext import Ledger
from support import run_ranks

FLOATS = ("loss_last", "loss_ema", "loss_mean", "loss_m2")


def naive(size, entries, ema=0.9):
    """The record by its definition, in plain Python: {id: (last, ema, mean, m2, count, last_step)}."""
    rows = {}
    f = np.float32
    for i, loss, step in entries:
        loss = f(loss)
        if not np.isfinite(loss):
            continue
        _, average, mean, m2, count, _ = rows.get(i, (f(0), f(0), f(0), f(0), 0, -1))
        count += 1
        delta = f(loss - mean)
        mean = f(mean + f(delta / f(count)))
        m2 = f(m2 + f(delta * f(loss - mean)))
        average = loss if count == 1 else f(average + f(f(1 - ema) * f(loss - average)))
        rows[i] = (loss, average, mean, m2, count, step)
    return rows


def assert_same(ledger, rows):
    for index, name in enumerate((*FLOATS, "count", "last_step")):
        got = ledger.column(name)
        for i in range(ledger.size):
            if i in rows:
                assert got[i].item() == rows[i][index], (name, i)
            else:
                assert {"count": 0, "last_step": -1}.get(name) == got[i].item() or torch.isnan(got[i]), (name, i)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 2],
        [5, 5, 5, 5],
        [0, 1, 0, 2, 0, 1],
        [],
        [9],
        list(np.random.default_rng(0).integers(0, 10, 200)),
    ],
    ids=["unique", "one id", "mixed", "empty", "single", "heavy duplicates"],
)
def test_records_follow_their_definition_in_batch_order(ids):
    ledger, entries = Ledger(10, ema=0.8), []
    rng = np.random.default_rng(1)
    for step in range(3):
        losses = rng.lognormal(size=len(ids)).astype(np.float32)
        ledger.update(torch.tensor(ids, dtype=torch.int64), torch.from_numpy(losses))
        entries += [(int(i), loss, step) for i, loss in zip(ids, losses, strict=True)]
    assert_same(ledger, naive(10, entries, ema=0.8))


def test_welford_gives_mean_and_variance():
    losses = np.random.default_rng(2).normal(3, 2, 50).astype(np.float32)
    ledger = Ledger(1)
    for loss in losses:
        ledger.update(torch.tensor([0]), torch.tensor([loss]))
    assert ledger.column("loss_mean").item() == pytest.approx(losses.mean(), rel=1e-6)
    assert ledger.column("loss_m2").item() / 50 == pytest.approx(losses.var(), rel=1e-5)


def test_a_record_is_32_bytes():
    assert Ledger(7).records.shape == (7, 8)
    assert Ledger(7).records.element_size() * 8 == 32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int16, torch.int32, torch.int64, torch.uint8])
def test_any_precision_and_any_integer(dtype, index):
    ledger = Ledger(20)
    losses = torch.tensor([0.5, 1.25, 2.0], dtype=dtype)
    ledger.update(torch.tensor([1, 3, 17], dtype=index), losses)
    assert ledger.column("loss_last")[[1, 3, 17]].tolist() == [0.5, 1.25, 2.0]


def test_t2_ids_beyond_float_precision_keep_their_rows():
    size = 2**24 + 8
    ledger = Ledger(size)
    ids = torch.tensor([2**24, 2**24 + 1, 2**24 + 2, 2**24 + 7, 257, 2049])
    ledger.update(ids, torch.arange(6, dtype=torch.bfloat16))
    assert ledger.column("loss_last")[ids].tolist() == [0, 1, 2, 3, 4, 5]
    assert int(ledger.seen.sum()) == 6


def test_t20_losses_that_are_not_finite_are_counted_and_never_stored():
    ledger = Ledger(5)
    ledger.update(torch.arange(5), torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 1e30]))
    assert ledger.rejected == 4
    assert ledger.seen.tolist() == [True, False, False, False, False]
    ledger.update(torch.tensor([0, 0]), torch.tensor([torch.nan, 3.0]))
    assert ledger.column("count")[0] == 2
    assert np.nanmean(ledger.column("loss_mean").numpy()) == 2.0
    ledger.update(torch.tensor([1]), torch.tensor([1e300], dtype=torch.float64))  # overflows float32
    assert ledger.rejected == 6
    assert not ledger.seen[1]


def test_t21_unseen_is_nan_whatever_the_losses_are():
    ledger = Ledger(3)
    ledger.update(torch.tensor([1]), torch.tensor([0.0]))
    assert ledger.column("loss_last")[1] == 0.0
    assert torch.isnan(ledger.column("loss_last")[[0, 2]]).all()
    assert ledger.column("last_step").tolist() == [-1, 0, -1]
    assert ledger.column("count").tolist() == [0, 1, 0]


def test_scores_keep_the_last_finite_one():
    ledger = Ledger(3)
    ledger.update(torch.tensor([0, 1]), torch.ones(2))
    assert torch.isnan(ledger.column("score")).all()
    ledger.update(torch.tensor([0, 1]), torch.ones(2), scores=torch.tensor([2.0, torch.nan]))
    assert ledger.column("score")[0] == 2.0
    assert torch.isnan(ledger.column("score")[1])
    ledger.update(torch.tensor([0]), torch.ones(1))
    assert ledger.column("score")[0] == 2.0


def test_weights():
    ledger = Ledger(4)
    ledger.set_weights(torch.tensor([1, 2]), torch.tensor([2.0, 0.5]))
    assert ledger.weights(torch.tensor([2, 0, 1], dtype=torch.int32)).tolist() == [0.5, 1, 2]
    ledger.set_weights(torch.tensor([0]), torch.tensor([1.0]))
    assert ledger.column("weight")[0] == 1
    assert ledger.column("weight")[1:].tolist() == [0, 0, 0]  # not in the plan
    ledger.set_weights(torch.tensor([3, 1]), torch.tensor([0.0, 4.0]))
    assert ledger.weights(torch.tensor([3, 1, 0])).tolist() == pytest.approx([0, 4, 1])
    ledger.clear_weights()
    assert ledger.column("weight").tolist() == [0, 0, 0, 0]


def test_without_weights_all_weigh_1():
    ledger = Ledger(4)
    assert ledger.weights(torch.tensor([2, 0])).tolist() == [1, 1]
    ledger.set_weights(torch.tensor([2]), torch.tensor([3.0]))
    ledger.clear_weights()
    assert ledger.weights(torch.tensor([2, 0])).tolist() == [1, 1]


def test_grow_keeps_the_old_and_adds_unseen():
    ledger = Ledger(2)
    ledger.update(torch.tensor([1]), torch.tensor([3.0]))
    ledger.grow(4)
    assert ledger.size == 4
    assert ledger.seen.tolist() == [False, True, False, False]
    assert ledger.column("loss_last")[1] == 3.0
    ledger.update(torch.tensor([3]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="never shrinks"):
        ledger.grow(3)


def test_columns_are_copies():
    ledger = Ledger(2)
    ledger.update(torch.tensor([0]), torch.tensor([3.0]))
    ledger.column("loss_last")[0] = 9
    assert ledger.column("loss_last")[0] == 3


def test_update_leaves_its_arguments_alone():
    ids, losses = torch.tensor([2, 2, 0]), torch.tensor([1.0, 2.0, 3.0])
    before = ids.clone(), losses.clone()
    Ledger(3).update(ids, losses)
    assert torch.equal(ids, before[0])
    assert torch.equal(losses, before[1])


def test_non_contiguous_arguments():
    ids, losses = torch.arange(10)[::3], torch.arange(20.0).reshape(10, 2)[::3, 1]
    ledger = Ledger(10)
    ledger.update(ids, losses)
    assert ledger.column("loss_last")[[0, 3, 6, 9]].tolist() == [1, 7, 13, 19]


def test_state_round_trip_is_bit_exact():
    ledger = Ledger(6, fingerprint="a")
    ledger.update(torch.tensor([0, 5, 5]), torch.tensor([0.1, 0.7, torch.nan]))
    file = io.BytesIO()
    torch.save(ledger.state_dict(), file)
    file.seek(0)
    other = Ledger(6, fingerprint="a")
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.records.view(torch.int32), ledger.records.view(torch.int32))
    assert other.rejected == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ledger(7), "data set of 6 samples, this one has 7"),
        (lambda: Ledger(6, fingerprint="b"), "fingerprint"),
    ],
)
def test_the_state_of_another_data_set_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make().load_state_dict(Ledger(6, fingerprint="a").state_dict())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("counters"), "it lacks counters"),
        (lambda state: state.update(records=state["records"][:1]), r"records are torch.float32 \(1, 8\)"),
        (lambda state: state.update(records=state["records"].bfloat16()), "records are torch.bfloat16"),
        (lambda state: state.update(counters=state["counters"][:1]), r"counters are torch.int64 \(1,\)"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_is_changed(damage, message):
    ledger = Ledger(6)
    ledger.update(torch.tensor([1]), torch.ones(1))
    before, state = ledger.records.clone(), Ledger(6).state_dict()
    damage(state)
    with pytest.raises(ValueError, match=message):
        ledger.load_state_dict(state)
    assert torch.equal(ledger.records.view(torch.int32), before.view(torch.int32))


def test_a_ledger_made_or_grown_in_inference_mode_can_be_used_outside():
    with torch.inference_mode():
        ledger = Ledger(2)
        ledger.grow(5)
    ledger.update(torch.tensor([4]), torch.ones(1))
    ledger.clear_weights()
    ledger.load_state_dict(copy.deepcopy(ledger.state_dict()))
    assert ledger.seen.tolist() == [False] * 4 + [True]


def test_a_state_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version 99"):
        Ledger(6).load_state_dict({**Ledger(6).state_dict(), "version": 99})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, r"size=0.*len\(dataset\).*in \[1, 2147483648\]"),
        ((2**31 + 1,), ValueError, "size"),
        ((1.5,), TypeError, r"len\(dataset\)"),
        ((True,), TypeError, "size"),
    ],
)
def test_bad_sizes(arguments, error, message):
    with pytest.raises(error, match=message):
        Ledger(*arguments)


@pytest.mark.parametrize("ema", [-0.1, 1.0, float("nan")])
def test_bad_ema(ema):
    with pytest.raises(ValueError, match="ema"):
        Ledger(3, ema=ema)


@pytest.mark.parametrize(
    ("ids", "losses", "error", "message"),
    [
        (torch.tensor([0.0]), torch.ones(1), TypeError, "integer"),
        (torch.tensor([True]), torch.ones(1), TypeError, "integer"),
        ([0], torch.ones(1), TypeError, "integer"),
        (torch.tensor([0]), torch.ones(1, dtype=torch.int64), TypeError, "floating-point"),
        (torch.tensor([0]), [1.0], TypeError, "floating-point"),
        (torch.tensor([0, 1]), torch.ones(3), ValueError, "one value an id"),
        (torch.tensor([[0, 1]]), torch.ones(1, 2), ValueError, "one-dimensional"),
        (torch.tensor([0, 3]), torch.ones(2), IndexError, r"id 3 is outside \[0, 3\)"),
        (torch.tensor([1, -1]), torch.ones(2), IndexError, "id -1 is outside"),
        (torch.tensor([2**40]), torch.ones(1), IndexError, "outside"),
    ],
)
def test_bad_updates_are_refused_and_change_nothing(ids, losses, error, message):
    ledger = Ledger(3)
    ledger.update(torch.tensor([0]), torch.ones(1))
    before = ledger.records.clone()
    with pytest.raises(error, match=message):
        ledger.update(ids, losses)
    assert torch.equal(ledger.records.view(torch.int32), before.view(torch.int32))


def test_unknown_column_lists_the_known():
    with pytest.raises(KeyError, match="loss_ema"):
        Ledger(2).column("loss")


# --- several ranks ----------------------------------------------------------------------------------------------------


def observe_and_sync(rank, world, syncs):
    """Rank r sees r, r + W, ...; id 0 is seen by all; rank 0 sees more than the others."""
    ledger = Ledger(2**24 + 50)
    for step in range(4):
        ids = torch.tensor([0, 2**24 + rank + step * world] + ([7] if rank == 0 else []))
        losses = (ids % 1000 + rank + 10 * step).to(torch.bfloat16 if step % 2 else torch.float64)
        losses[1] = torch.nan if step == 3 else losses[1]
        ledger.update(ids, losses, scores=losses.float() if step == 1 else None)
        if step in syncs:
            ledger.sync()
    ledger.sync()
    ledger.sync()
    touched = [0, 7, *range(2**24, 2**24 + 50)]
    return ledger.records[touched].view(torch.int32), ledger.rejected, ledger.updates, int(ledger.seen.sum())


@pytest.mark.parametrize("world", [2, 3])
def test_sync_makes_all_ranks_equal_to_one_process(world):
    single = Ledger(2**24 + 50)
    for step in range(4):
        parts = []
        for rank in range(world):  # the order that sync promises: step, rank, batch
            ids = torch.tensor([0, 2**24 + rank + step * world] + ([7] if rank == 0 else []))
            losses = (ids % 1000 + rank + 10 * step).to(torch.bfloat16 if step % 2 else torch.float64)
            losses[1] = torch.nan if step == 3 else losses[1]
            parts.append((ids, losses))
        ids, losses = (torch.cat(part) for part in zip(*parts, strict=True))
        single.update(ids, losses, scores=losses.float() if step == 1 else None)
    touched = [0, 7, *range(2**24, 2**24 + 50)]
    expected = single.records[touched].view(torch.int32), single.rejected, single.updates, int(single.seen.sum())
    for syncs in ((), (1,)):
        for got in run_ranks(world, observe_and_sync, world, syncs):
            assert torch.equal(got[0], expected[0])
            assert got[1:] == expected[1:]


def unsynced_state(rank):
    ledger = Ledger(4)
    ledger.update(torch.tensor([rank]), torch.ones(1))
    own = copy.deepcopy(ledger.state_dict())
    restored = Ledger(4)
    restored.load_state_dict(own)
    restored.sync()
    return own, restored.seen.tolist()


def test_a_rank_restores_its_own_unsynced_state_and_no_other_does():
    results = run_ranks(2, unsynced_state)
    assert [seen for _, seen in results] == [[True, True, False, False]] * 2
    with pytest.raises(ValueError, match=r"Call sync\(\) on every rank"):
        Ledger(4).load_state_dict(results[0][0])


def uneven_updates(rank):
    ledger = Ledger(4)
    for _ in range(1 + 2 * rank):
        ledger.update(torch.tensor([rank]), torch.ones(1))
    ledger.sync()
    return ledger.updates, ledger.column("last_step").tolist()


def test_ranks_that_observed_unevenly_agree_on_the_number_of_updates():
    assert run_ranks(2, uneven_updates) == [(3, [0, 2, -1, -1])] * 2


def refused_update(rank):
    try:
        Ledger(4).update(torch.tensor([4]), torch.ones(1))
    except IndexError as error:
        return str(error)


def test_bad_ids_are_refused_at_once_with_several_ranks():
    assert all("outside [0, 4)" in message for message in run_ranks(2, refused_update))

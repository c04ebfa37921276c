"""`attach(trainer, sampler)` on two ranks, and from two ranks to one."""

import pytest
from huggingface_support import BATCH, ROWS, Told, joined, losses_told, prepare, rank_runs, told_rows

from support import HardHalf, run_ranks

WORLD = 2
STEPS = {1: 6, 2: 3}  # optimizer steps an epoch, by accumulation: 11 batches of both ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def runs(folder):
    """Of each rank, by (accumulation, step that was resumed from, 0 for the whole run)."""
    return run_ranks(WORLD, rank_runs, WORLD, folder, ((1, 0), (1, 4), (1, 6), (2, 0), (2, 1), (2, 5)))


def dealt(ranks, key):
    """The ids in the order that accelerate deals out: a batch of the first rank, one of the second, and so on."""
    batches = zip(*(rank[key]["ids"] for rank in ranks), strict=True)
    return [number for both in batches for batch in both for number in batch]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_loss_lands_on_its_own_row_and_both_ranks_know_it(runs, accumulation):
    first, second = (rank[accumulation, 0] for rank in runs)
    for ids, losses in zip(first["ids"] + second["ids"], first["losses"] + second["losses"], strict=True):
        assert losses == losses_told()[ids].tolist()
    assert first["exact"]
    assert all(first["seen"])
    assert first["ledger"] == second["ledger"]
    assert first["weights"] == second["weights"]
    assert first["rates"][-1] == 0.0
    assert len(first["rates"]) == 3 * STEPS[accumulation]


def test_the_union_over_ranks_is_the_plan(runs):
    """22 samples in 6 batches of 2 a rank: the last one is filled up with the epoch's first samples."""
    ids, plans = dealt(runs, (1, 0)), runs[0][1, 0]["plans"]
    epochs = [ids[epoch * 24 : (epoch + 1) * 24] for epoch in range(3)]
    for epoch, plan in zip(epochs, plans, strict=True):
        assert sorted(epoch[:ROWS]) == plan
    for epoch in epochs:
        assert epoch[ROWS:] == epoch[:2]
    assert len(set(epochs[1])) < ROWS  # it depends on the losses of both ranks


@pytest.mark.parametrize("key", [(1, 4), (1, 6), (2, 1), (2, 5)])
def test_resume_is_exact(runs, key):
    for rank in runs:
        whole, part = rank[key[0], 0], rank[key]
        assert len(part["rates"]) == len(whole["rates"]) - key[1]
        for name in ("ids", "losses", "rates"):
            assert part[name] == whole[name][-len(part[name]) :]
        for name in ("ledger", "weights", "position"):
            assert part[name] == whole[name]


@pytest.mark.parametrize(("step", "batch", "accumulation"), [(4, 2 * BATCH, 1), (4, BATCH, 2), (6, BATCH, 2)])
def test_from_two_ranks_to_one_with_the_same_samples_a_step(runs, folder, step, batch, accumulation):
    sampler = HardHalf(ROWS)
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    trainer, noted = prepare(folder / "one", sampler, model=Told(), data=told_rows(), **settings)
    trainer.train(resume_from_checkpoint=str(folder / "runs-1" / f"checkpoint-{step}"))
    whole = dealt(runs, (1, 0))
    left = whole[4 * step : 22] + whole[24 : 24 + 22] + whole[48 : 48 + 22] if step < 6 else whole[24:46] + whole[48:70]
    assert joined(noted.ids) == left
    assert (sampler.ledger.column("loss_last").numpy() == losses_told()).all()
    assert (sampler.epoch, sampler.consumed) == (2, ROWS)


def test_weights_where_tokens_are_counted_over_all_ranks(runs):
    """``average_tokens_across_devices``, which is on."""
    for rank in runs:
        plain, twice = rank["weighted"]
        assert twice == pytest.approx([2 * loss for loss in plain], rel=1e-5)


def test_a_stream_is_not_dealt_out_twice(runs):
    runs = [rank["stream"] for rank in runs]
    for rank, run in enumerate(runs):
        for begin in (0, 6):
            assert joined(run["ids"][begin : begin + 6]) == list(range(rank, ROWS, WORLD))
        assert run["exact"] == losses_told().tolist()
        assert run["ledger"] == runs[0]["ledger"]
        assert run["position"][0] == 1


def test_another_total_batch_is_refused(runs, folder):
    trainer, _ = prepare(folder / "one", HardHalf(ROWS), model=Told(), data=told_rows(), gradient_accumulation_steps=1)
    with pytest.raises(
        RuntimeError, match="saved after 16 samples of epoch 0, but the Trainer goes on after 8 of epoch"
    ):
        trainer.train(resume_from_checkpoint=str(folder / "runs-1" / "checkpoint-4"))

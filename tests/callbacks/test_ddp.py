"""DDP with real gloo processes that Lightning starts, two and, where nothing divides evenly, three of them."""

from collections import Counter

import pytest
import torch
from lightning_support import QUIET, SaveEveryStep, Traced, fit, run_job, validation

from samplewise.cuda_ext import Ledger, reference
from support import HardHalf

pytestmark = QUIET
SIZE = 29


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    train_alone(folder)
    output = run_job("ddp", folder, world=request.param)
    assert "sync_dist" not in output  # Lightning's advice to metrics that differ between ranks
    results = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(request.param)]
    return [{**result, "folder": folder} for result in results]


def train_alone(folder) -> None:
    """One rank's run, saved after 3 batches of the second epoch."""
    model = fit(HardHalf(SIZE), SaveEveryStep(folder), kind=Traced, val=validation(), max_epochs=3)
    step = len(model.batches[0]) + 3
    (folder / "alone").mkdir()
    (folder / f"on_train_batch_end-{step:03d}.ckpt").rename(folder / "alone" / "checkpoint.ckpt")
    torch.save((model.batches, model.plans), folder / "alone.pt")
    for path in folder.glob("*.ckpt"):
        path.unlink()


def check_goes_on(before, after, plan, ranks: int) -> None:
    """Nothing lost, and nothing repeated but what fills up the last step."""
    served = [i for batches in (before, *after) for batch in batches for i in batch]
    assert not Counter(plan) - Counter(served)
    assert len(served) - len(plan) < ranks


def test_several_ranks_go_on_with_the_epoch_of_one(ranks):
    batches, plans = torch.load(ranks[0]["folder"] / "alone.pt", weights_only=False)
    resumed = [rank["resumed alone"] for rank in ranks]
    check_goes_on(batches[1][:3], [rank[1] for rank in resumed], plans[1], len(ranks))
    assert all(list(rank) == [1, 2] for rank in resumed)


def test_one_rank_goes_on_with_the_epoch_of_several(ranks):
    lengths = [len(batches) for batches in ranks[0]["batches"].values()]
    step = lengths[0] + 1
    before = [batch for rank in ranks for batch in rank["batches"][1][:1]]
    path = ranks[0]["folder"] / f"on_train_batch_end-{step:03d}.ckpt"
    model = fit(HardHalf(SIZE), ckpt_path=path, kind=Traced, val=validation(), max_epochs=3)
    assert model.plans[1] == ranks[0]["plans"][1]
    check_goes_on(before, [model.batches[1]], model.plans[1], 1)
    assert list(model.batches) == [1, 2]
    assert sorted(i for batch in model.batches[2] for i in batch) == model.plans[2]


def test_the_union_over_ranks_is_the_plan(ranks):
    lengths = set()
    for epoch, plan in ranks[0]["plans"].items():
        assert all(rank["plans"][epoch] == plan for rank in ranks)
        shares = [[i for batch in rank["batches"][epoch] for i in batch] for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        served = Counter(i for share in shares for i in share)
        assert set(served) == set(plan)
        assert sum(served.values()) - len(plan) < len(ranks)  # filled up to a multiple of the ranks
        lengths.add(len(plan))
    assert len(lengths) > 1
    assert len(ranks[0]["plans"]) == 3


def test_all_ranks_hold_the_ledger_of_one_process(ranks):
    alone = Ledger(SIZE)
    for batch in zip(*(rank["pairs"] for rank in ranks), strict=True):
        alone.update(*(torch.cat(parts) for parts in list(zip(*batch, strict=True))[1:]))  # one step of all ranks
    expected = columns(alone.records)
    for rank in ranks:
        records = torch.frombuffer(bytearray(rank["whole"]["ledger"]), dtype=torch.float32).view(SIZE, -1)
        assert columns(records) == expected


def columns(records) -> bytes:
    """All but the weights, which are the plan's."""
    records = records.clone()
    records[:, reference.WEIGHT] = 0
    return records.numpy().tobytes()


def test_all_ranks_would_save_the_same(ranks):
    assert len(ranks[0]["saved"]) == len(ranks[0]["whole"]["ids"])
    assert all(rank["saved"] == ranks[0]["saved"] for rank in ranks)
    assert len({rank["whole"]["weight"] for rank in ranks}) == 1


def test_resume_is_exact_on_every_rank(ranks):
    for rank in ranks:
        whole = rank["whole"]
        steps = len(whole["ids"])
        assert len(rank["resumed"]) >= steps // (2 * len(ranks) - 3)
        for name, resumed in rank["resumed"].items():
            step = int(name.split("-")[1].removesuffix(".ckpt"))
            assert resumed["ids"] == whole["ids"][step:], name
            assert resumed["weight"] == whole["weight"], name
            if step < steps:
                assert (resumed["ledger"], resumed["position"]) == (whole["ledger"], whole["position"]), name


def test_a_batch_sampler_that_lightning_rebuilds_is_refused(ranks):
    """T5. On one rank the same loader would be fine."""
    assert all("has a batch_sampler of its own, OwnBatches" in rank["error"] for rank in ranks)

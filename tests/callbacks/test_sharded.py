"""A sampler whose ledger is dealt out over the ranks, in Lightning on two of them."""

import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from lightning_support import QUIET, SaveEveryStep, fit

from samplewise.loaders.shares import load_saved_state, saved_state
from samplewise.plugins import InfoBatch
from support import run_ranks

pytestmark = QUIET
SIZE = 53


def sampler():
    return InfoBatch(SIZE, epochs=4, sharded=True)


def facts(model):
    planner = model.sampler
    shard = planner.ledger.records.view(torch.int32).clone(), planner.ledger.shard
    return {"batches": model.batches, "shard": shard, "weight": model.net.weight.detach().clone()}


def two_ranks(rank, folder):
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in {**names, "TORCHELASTIC_RUN_ID": "sharded"}.items()}
    settings = {"strategy": "ddp", "devices": 2, "max_epochs": 3}
    model = fit(sampler(), SaveEveryStep(folder), **settings)
    dist.barrier()
    found = {"whole": facts(model), "plans": []}
    for step in (4, 9):
        found[step] = facts(fit(sampler(), ckpt_path=folder / f"on_train_batch_end-{step:03d}.ckpt", **settings))
    planner = model.sampler
    for epoch in (3, 4):
        planner.set_epoch(epoch)
        found["plans"].append([int(i) for i in planner.current_plan.ids])
    planner.advance_to(planner.total_size)  # as if the epoch were over
    found["state"] = saved_state(planner)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks(2, two_ranks, tmp_path_factory.mktemp("sharded"))


def test_each_rank_holds_its_rows(ranks):
    for rank, found in enumerate(ranks):
        records, shard = found["whole"]["shard"]
        assert shard == (rank, 2)
        assert len(records) == len(range(rank, SIZE, 2))
    served = Counter(
        i for found in ranks for batches in found["whole"]["batches"].values() for batch in batches for i in batch
    )
    for rank, found in enumerate(ranks):
        assert found["whole"]["shard"][0][:, 4].tolist() == [served[i] for i in range(rank, SIZE, 2)]
    assert any(len(found["whole"]["batches"][1]) < len(found["whole"]["batches"][0]) for found in ranks)


def test_resume_from_the_checkpoint_that_one_rank_wrote(ranks):
    for found in ranks:
        whole = found["whole"]
        flat = [batch for epoch in sorted(whole["batches"]) for batch in whole["batches"][epoch]]
        for step in (4, 9):
            resumed = found[step]
            assert [batch for epoch in sorted(resumed["batches"]) for batch in resumed["batches"][epoch]] == flat[step:]
            assert torch.equal(resumed["weight"], whole["weight"])
            assert torch.equal(resumed["shard"][0], whole["shard"][0])


def test_one_process_goes_on_where_two_have_ended_an_epoch(ranks):
    assert len(ranks[0]["state"]["shards"]) == 2
    assert len(ranks[1]["state"]["shards"]) == 1
    alone = sampler()
    load_saved_state(alone, ranks[0]["state"])
    assert (alone.epoch, alone.consumed) == (5, 0)
    for rank, found in enumerate(ranks):
        mine = alone.ledger.records[rank::2].view(torch.int32)
        kept = [column for column in range(8) if column != 6]  # the weights are the new plan's
        assert torch.equal(mine[:, kept], found["whole"]["shard"][0][:, kept])
    assert len(alone) == SIZE

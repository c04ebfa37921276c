"""FSDP with two gloo processes that Lightning starts: parameters in parts, plans and ledgers whole."""

from collections import Counter

import pytest
import torch
from lightning_support import run_job


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    run_job("fsdp", folder, world=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_union_over_ranks_is_the_plan(ranks):
    for epoch, plan in ranks[0]["plans"].items():
        assert ranks[1]["plans"][epoch] == plan
        served = Counter(i for rank in ranks for batch in rank["batches"][epoch] for i in batch)
        assert set(served) == set(plan)
        assert sum(served.values()) - len(plan) < 2
    assert len({len(plan) for plan in ranks[0]["plans"].values()}) > 1


def test_both_ranks_hold_the_same(ranks):
    one, other = (rank["whole"] for rank in ranks)
    assert (one["ledger"], one["weight"], one["position"]) == (other["ledger"], other["weight"], other["position"])


def test_resume_is_exact(ranks):
    for rank in ranks:
        whole = rank["whole"]
        for step, resumed in rank["resumed"].items():
            assert resumed["ids"] == whole["ids"][step:]
            assert [resumed[name] for name in ("ledger", "position", "weight")] == [
                whole[name] for name in ("ledger", "position", "weight")
            ]

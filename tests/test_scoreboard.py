"""The scoreboard: 4 loops x 3 kinds of data x 1 and 2 ranks x 0 and 2 workers, and its table in the README."""

import re
from pathlib import Path

import pytest
import scoreboard

from support import run_ranks

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:.*{message}")
    for message in (
        "'set_vital'",
        "LeafSpec",
        "no `val_dataloader`",
        "dataloader is not resumable",
        "Checkpoint directory",
        "smaller than the logging interval",
    )
]
README = (Path(__file__).parents[1] / "README.md").read_text()
LOST = {("Lightning", "webdataset"), ("HF Trainer", "webdataset")}
"""Loops that do not save the place in a stream."""


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def cells(request, tmp_path_factory):
    folder, world = tmp_path_factory.mktemp("scoreboard"), request.param
    shards = scoreboard.write_shards(folder)
    arguments = world, shards, str(folder)
    ranks = [scoreboard.play(0, *arguments)] if world == 1 else run_ranks(world, scoreboard.play, *arguments)
    found = {name: scoreboard.judge([rank[name] for rank in ranks]) for name in ranks[0]}
    print(f"{world} ranks\n{scoreboard.table(found)}")
    return found


def test_what_holds_in_every_cell(cells):
    assert len(cells) == 4 * 3 * 2
    for name, holds in cells.items():
        loop, data, _ = name.split("/")
        lost = (loop, data) in LOST
        for text in holds.pop("refused"):
            assert bool(re.search(r"the place in a stream.*(Resume from|Set )", text)) == lost
        assert holds == {"rows": True, "plan": True, "resume": not lost}, name


def test_the_table_stands_in_the_readme(cells):
    assert scoreboard.table(cells) in README

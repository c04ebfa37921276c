"""RefreshHardNegatives in real Lightning runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning_support import QUIET, Figures, SaveEveryStep, run_job, trainer
from negatives_support import DOCUMENTS, POSITIVES, QUERIES, Encoder, dataset, loader

from samplewise.callbacks import RefreshHardNegatives
from samplewise.loaders import RetrievalDataset
from samplewise.plugins import Uniform, mine_hard_negatives

pytestmark = QUIET
TOP_K, BATCHES = 5, 6


class Run:
    """A training run of three epochs of six batches."""

    def __init__(self, folder, *more, ckpt_path=None, epochs=3, workers=0, keep=20, settings=None, **refresh):
        self.sampler = Uniform(len(QUERIES), seed=1)
        self.data = dataset(folder, self.sampler, keep=keep)
        self.model = Encoder(self.sampler)
        refresh = refresh or {"every_n_epochs": 1}
        self.callback = RefreshHardNegatives(self.data, self.model.encode, top_k=TOP_K, progress=False, **refresh)
        persistent = {"num_workers": workers, "persistent_workers": workers > 0}
        train = loader(self.data, self.sampler, **persistent)
        run = trainer(self.sampler, self.callback, *more, max_epochs=epochs, **(settings or {}))
        run.fit(self.model, train, ckpt_path=ckpt_path, weights_only=True)

    @property
    def weights(self) -> bytes:
        return self.model.words.weight.detach().numpy().tobytes()

    @property
    def versions(self):
        return [row["version"] for row in self.callback.history]


class Copies(SaveEveryStep):
    """Also copies the table of each epoch's start."""

    def __init__(self, folder, table):
        super().__init__(folder)
        self.table, self.lists = table, {}

    def on_train_batch_start(self, trainer, *args):
        self.lists.setdefault(trainer.current_epoch, np.array(self.table["negatives"]))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_draws_from_the_negatives_mined_at_its_start(tmp_path, workers):
    run = Run(tmp_path, workers=workers)
    assert run.versions == [1, 2, 3]
    assert [row["step"] for row in run.callback.history] == [0, BATCHES, 2 * BATCHES]
    lists = [version_of(run, number) for number in (1, 2, 3)]
    assert (lists[0] != lists[1]).any()
    assert (lists[1] != lists[2]).any()
    for epoch, queries, negatives in run.model.seen:
        for query, row in zip(queries, negatives, strict=True):
            assert set(row) <= set(lists[epoch][query]), (epoch, query)


def version_of(run, number):
    (folder,) = Path(run.data.negatives.path).glob(f"version-{number}-*")
    return np.load(folder / "negatives.npy")


def test_the_negatives_are_those_of_the_weights_at_that_moment(tmp_path):
    run = Run(tmp_path, epochs=1)
    model = Encoder(run.sampler).eval()  # the initial weights
    with torch.no_grad():
        table = mine_hard_negatives(model.encode(DOCUMENTS), model.encode(QUERIES), POSITIVES, top_k=TOP_K)
    np.testing.assert_array_equal(version_of(run, 1), table["negatives"])


@pytest.mark.parametrize(("accumulate", "steps"), [(1, [0, 4, 8]), (2, [0, 4])])
def test_every_n_steps_counts_optimizer_steps(tmp_path, accumulate, steps):
    run = Run(tmp_path, epochs=2, every_n_steps=4, settings={"accumulate_grad_batches": accumulate})
    assert [row["step"] for row in run.callback.history] == steps


@pytest.mark.parametrize("refresh", [{"every_n_epochs": 1}, {"every_n_epochs": 2}, {"every_n_steps": 4}], ids=str)
def test_resume_is_exact_at_every_step(tmp_path, refresh):
    table = tmp_path / "table"
    whole = Run(table, SaveEveryStep(tmp_path), **refresh)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 3 * BATCHES
    for path in checkpoints:
        step = int(path.stem.split("-")[1])
        shutil.copytree(table, copy := tmp_path / f"table-{step}")
        again = Run(copy, ckpt_path=path, **refresh)
        assert again.model.seen == whole.model.seen[step:], step
        assert again.weights == whole.weights, step
        assert again.versions == whole.versions, step


def test_a_version_that_is_gone_is_mined_anew(tmp_path):
    Run(tmp_path / "table", SaveEveryStep(tmp_path), keep=1)
    with pytest.warns(UserWarning, match="the checkpoint's negatives are mined anew"):
        again = Run(tmp_path / "table", ckpt_path=tmp_path / "on_train_batch_end-002.ckpt")
    assert [row["step"] for row in again.callback.history] == [0, 2, BATCHES, 2 * BATCHES]


def test_a_second_run_of_the_same_callback_mines_as_the_first(tmp_path):
    run = Run(tmp_path)
    again = trainer(run.sampler, run.callback, max_epochs=3)
    again.fit(run.model, loader(run.data, run.sampler))
    assert [row["step"] for row in run.callback.history[3:]] == [0, BATCHES, 2 * BATCHES]


def test_a_run_may_begin_with_what_the_table_holds(tmp_path):
    first = Run(tmp_path, epochs=1)
    again = Run(tmp_path, epochs=2, every_n_epochs=1, at_start=False)
    assert [row["step"] for row in again.callback.history] == [BATCHES]
    lists = version_of(first, 1)
    for epoch, queries, negatives in again.model.seen:
        if epoch == 0:
            assert all(set(row) <= set(lists[query]) for query, row in zip(queries, negatives, strict=True))


def test_a_version_of_another_run_is_mined_anew(tmp_path):
    Run(tmp_path / "table", SaveEveryStep(tmp_path))
    shutil.rmtree(tmp_path / "table")
    Run(tmp_path / "table")
    with pytest.warns(UserWarning, match="the checkpoint's negatives are mined anew"):
        Run(tmp_path / "table", ckpt_path=tmp_path / "on_train_batch_end-008.ckpt")


def test_what_is_logged(tmp_path):
    figures = Figures()
    run = Run(tmp_path, settings={"logger": figures})
    rows = [(step, row) for step, row in figures.rows if "negatives/overlap" in row]
    assert [step for step, _ in rows] == [0, BATCHES, 2 * BATCHES]
    names = {"overlap", "removed", "padded", "margin", "encode_seconds", "mine_seconds"}
    assert all({f"negatives/{name}" for name in names} == set(row) for _, row in rows)
    assert np.isnan(rows[0][1]["negatives/overlap"])
    lists = [version_of(run, number) for number in (1, 2)]
    shared = np.mean([len({*a} & {*b}) / TOP_K for a, b in zip(*lists, strict=True)])
    assert rows[1][1]["negatives/overlap"] == pytest.approx(shared)
    assert 0 < shared < 1
    assert rows[0][1]["negatives/padded"] == 0


def test_nothing_but_the_table_is_touched(tmp_path):
    sampler = Uniform(len(QUERIES))
    model = Encoder(sampler)
    callback = RefreshHardNegatives(dataset(tmp_path, sampler), model.encode, every_n_epochs=1, top_k=TOP_K)
    run = trainer(sampler, max_epochs=1)
    run.strategy.connect(model)
    before = torch.get_rng_state()
    callback.on_fit_start(run, model)
    assert (torch.get_rng_state() == before).all()
    assert model.training
    assert not model.frozen.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_difficulty_of_queries_is_in_the_ledger(tmp_path):
    run = Run(tmp_path, epochs=1)
    assert run.sampler.ledger.seen.all()
    assert run.sampler.ledger.column("loss_last").std() > 0


def test_two_ranks_mine_together(tmp_path):
    run_job("negatives", tmp_path, world=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert first["versions"] == second["versions"] == [1, 2]
    assert first["weights"] == second["weights"]
    assert first["resumed"] == second["resumed"] == first["weights"]
    assert not {id for ids in first["ids"] for id in ids} & {id for ids in second["ids"][:-1] for id in ids[:-1]}


def test_bad_arguments(tmp_path):
    data = dataset(tmp_path, None)
    without = RetrievalDataset(QUERIES, DOCUMENTS, POSITIVES)
    for wrong in (without, QUERIES):
        with pytest.raises(TypeError, match="a RetrievalDataset whose negatives are a Table"):
            RefreshHardNegatives(wrong, len, every_n_epochs=1)
    for options in ({}, {"every_n_epochs": 1, "every_n_steps": 1}):
        with pytest.raises(ValueError, match="give one of the two"):
            RefreshHardNegatives(data, len, **options)
    with pytest.raises(TypeError, match=r"RefreshHardNegatives\(similarty=\.\.\.\): there are similarity, margin"):
        RefreshHardNegatives(data, len, every_n_epochs=1, similarty="dot")
    for top_k in (1, 61):  # two are drawn, and there are 60 documents
        with pytest.raises(ValueError, match=r"top_k .* must be in \[2, 60\]"):
            RefreshHardNegatives(data, len, every_n_epochs=1, top_k=top_k)
    with pytest.raises(ValueError, match="every_n_steps must be >= 1"):
        RefreshHardNegatives(data, len, every_n_steps=0)
    callback = RefreshHardNegatives(data, len, every_n_epochs=1)
    with pytest.raises(ValueError, match="version 9 was saved"):
        callback.load_state_dict({"version": 9})

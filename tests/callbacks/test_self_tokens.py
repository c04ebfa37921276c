"""RefreshSelfTokens in real Lightning runs of a toy Llama."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning_support import QUIET, Figures, SaveEveryStep, run_job, trainer
from refresh_support import BATCH, BATCHES, DATA, SIZE, TOKENIZER, TokenRun, llama
from torch.utils.data import DataLoader

from samplewise.callbacks import RefreshSelfTokens
from samplewise.cuda_ext import Ledger
from samplewise.loaders import with_ids
from samplewise.plugins import BetaSchedule, CorrectionDataset, SelfTokenMixer, TokenBuffer, Uniform
from samplewise.plugins.correction import correction_connector
from samplewise.recipes.responses import pad_left, response_losses

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*eval mode at the start of training")]


class Tuner(LightningModule):
    """Writes down each batch: epoch, ids and inputs."""

    def __init__(self, sampler=None):
        super().__init__()
        self.model, self.sampler, self.seen, self.autocast = llama(), sampler, [], []
        self.model.train()
        self.model.model.layers[0].eval()  # as users freeze parts
        self.model.register_forward_pre_hook(self.forwards)

    def forwards(self, model, args):
        self.autocast.append((model.training, torch.is_autocast_enabled("cpu")))

    def training_step(self, batch, batch_idx):
        assert self.model.training
        assert not self.model.model.layers[0].training
        self.seen.append((self.current_epoch, batch["sample_id"].tolist(), batch["input_ids"].tolist()))
        losses = response_losses(self.model, batch)
        return losses.mean() if self.sampler is None else self.sampler.observe(batch["sample_id"], losses)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Run(TokenRun):
    """Three epochs of three batches; ``beta`` is 0, 0.4 and 0.8."""

    def __init__(
        self, folder, *more, ckpt_path=None, epochs=3, workers=0, keep=20, settings=None, beta=None, target=None,
        ledger=False, follows=True, **refresh,
    ):  # fmt: skip
        self.sampler = Uniform(SIZE, seed=1)
        self.buffer = TokenBuffer(folder, DATA, TOKENIZER, keep=keep)
        beta = BetaSchedule(0.8, epochs=3) if beta is None else beta
        follow = {"sampler": self.sampler} if follows else {}
        if target is None:
            self.target = SelfTokenMixer(self.buffer, beta=beta, collate=pad_left, **follow)
            data, collate = DATA, self.target
        else:
            self.target = target(self.buffer, correction_connector(TOKENIZER), correct_share=1.0, **follow)
            data, collate = self.target, pad_left
        self.module = Tuner(self.sampler)
        refresh = {"every_n_epochs": 1} | refresh if "every_n_steps" not in refresh else refresh
        if ledger:
            refresh["ledger"] = self.sampler.ledger
        self.callback = RefreshSelfTokens(self.target, self.module.model, progress=False, **refresh)
        self.loader = DataLoader(
            with_ids(data), BATCH, sampler=self.sampler, collate_fn=collate, num_workers=workers,
            persistent_workers=workers > 0,
        )  # fmt: skip
        self.trainer = trainer(self.sampler, self.callback, *more, max_epochs=epochs, **(settings or {}))
        self.trainer.fit(self.module, self.loader, ckpt_path=ckpt_path, weights_only=True)

    def check(self, versions):
        """Each batch is mixed from the version of its epoch, with the epoch's beta."""
        changed = set()
        for epoch, ids, inputs in self.module.seen:
            for row, tokens in zip(ids, inputs, strict=True):
                mixed = self.inputs(row, epoch, versions[epoch])
                assert tokens[-len(mixed) :] == mixed, (epoch, row)
                if mixed != DATA[row]["input_ids"].tolist():
                    changed.add(epoch)
        return changed


@pytest.mark.parametrize(("workers", "follows"), [(0, True), (2, True), (0, False), (2, False)])
def test_each_epoch_is_mixed_from_the_tokens_generated_at_its_start(tmp_path, workers, follows):
    run = Run(tmp_path, workers=workers, follows=follows)
    assert run.moments == [(1, 0, 0), (2, BATCHES, 1), (3, 2 * BATCHES, 2)]
    assert run.check({0: 1, 1: 2, 2: 3}) == {1, 2}  # beta is 0 in epoch 0
    assert (run.version(2, "tokens") != run.version(3, "tokens")).any()
    assert [run.settings(number)["beta"] for number in (1, 2, 3)] == pytest.approx([0, 0.4, 0.8])
    assert [run.settings(number)["epoch"] for number in (1, 2, 3)] == [0, 1, 2]


def test_without_a_planned_sampler(tmp_path):
    from lightning.pytorch import Trainer

    mixer = SelfTokenMixer(TokenBuffer(tmp_path, DATA, TOKENIZER), beta=lambda epoch: 0.5 * epoch, collate=pad_left)
    module = Tuner()
    callback = RefreshSelfTokens(mixer, module.model, every_n_epochs=1, progress=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=3, callbacks=[callback], enable_model_summary=False, **quiet).fit(
        module, DataLoader(with_ids(DATA), BATCH, collate_fn=mixer)
    )
    assert mixer.epoch == 2
    assert [(row["epoch"], row["step"]) for row in callback.history] == [(0, 0), (1, BATCHES), (2, 2 * BATCHES)]
    assert [row["replaced"] > 0 for row in callback.history] == [False, True, True]


@pytest.mark.parametrize(
    ("refresh", "accumulate", "moments"),
    [
        ({"every_n_epochs": 2}, 1, [(1, 0, 0), (2, 6, 2)]),
        ({"every_n_steps": 4}, 1, [(1, 0, 0), (2, 4, 1), (3, 8, 2)]),
        ({"every_n_steps": 3}, 1, [(1, 0, 0), (2, 3, 1), (3, 6, 2)]),  # after an epoch's last batch: for the next one
        ({"every_n_steps": 4}, 2, [(1, 0, 0), (2, 4, 2)]),
        ({"every_n_epochs": 2, "at_start": False}, 1, [(1, 3, 1), (2, 6, 2)]),  # epoch 1 needs tokens
    ],
    ids=str,
)
def test_when_tokens_are_generated(tmp_path, refresh, accumulate, moments):
    run = Run(tmp_path, settings={"accumulate_grad_batches": accumulate}, **refresh)
    assert run.moments == moments
    assert [run.settings(number)["epoch"] for number, _, _ in moments] == [epoch for _, _, epoch in moments]


@pytest.mark.parametrize(("drift", "versions"), [(0.0, [1, 2, 3]), (0.99, [1, 1, 1])])
def test_drift_decides(tmp_path, drift, versions):
    run = Run(tmp_path, drift=drift, probe=5)
    assert [row["version"] for row in run.callback.history] == versions
    assert ["drift" in row for row in run.callback.history] == [False, True, True]
    assert all(0 < row["drift"] < 0.99 for row in run.callback.history[1:])
    run.check(dict(enumerate(versions)))


@pytest.mark.parametrize(
    "refresh",
    [
        {"every_n_epochs": 1},
        {"every_n_epochs": 2, "at_start": False},
        {"every_n_epochs": 1, "drift": 0.05, "rollout": "sequential", "temperature": 0.7},
        {"every_n_steps": 2, "ledger": True, "budget": 90},
    ],
    ids=str,
)
def test_resume_is_exact_at_every_step(tmp_path, refresh):
    whole = Run(tmp_path / "table", SaveEveryStep(tmp_path), **refresh)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) == 3 * BATCHES
    for path in checkpoints:
        step = int(path.stem.split("-")[1])
        shutil.copytree(tmp_path / "table", copy := tmp_path / f"table-{step}")
        again = Run(copy, ckpt_path=path, **refresh)
        assert again.module.seen == whole.module.seen[step:], step
        assert again.weights == whole.weights, step
        assert [moment[1:] for moment in again.moments] == [moment[1:] for moment in whole.moments], step
        if refresh.get("at_start", True):
            assert again.moments == whole.moments, step


def test_resume_with_workers(tmp_path):
    whole = Run(tmp_path / "table", SaveEveryStep(tmp_path))
    for step in (2, 3, 5):
        shutil.copytree(tmp_path / "table", copy := tmp_path / f"table-{step}")
        again = Run(copy, ckpt_path=tmp_path / f"on_train_batch_end-{step:03d}.ckpt", workers=2)
        assert again.module.seen == whole.module.seen[step:], step


def test_a_version_that_is_gone_is_generated_anew(tmp_path):
    Run(tmp_path / "table", SaveEveryStep(tmp_path), keep=1)
    with pytest.warns(UserWarning, match="RefreshSelfTokens: the checkpoint's tokens are generated anew"):
        again = Run(tmp_path / "table", ckpt_path=tmp_path / "on_train_batch_end-004.ckpt")
    assert [moment[1:] for moment in again.moments] == [(0, 0), (3, 1), (4, 1), (6, 2)]


def test_a_version_of_another_run_is_generated_anew(tmp_path):
    Run(tmp_path / "table", SaveEveryStep(tmp_path))
    shutil.rmtree(tmp_path / "table")
    Run(tmp_path / "table")
    with pytest.warns(UserWarning, match="the checkpoint's tokens are generated anew"):
        Run(tmp_path / "table", ckpt_path=tmp_path / "on_train_batch_end-008.ckpt")


def test_a_second_run_of_the_same_callback_begins_anew(tmp_path):
    run = Run(tmp_path)
    trainer(run.sampler, run.callback, max_epochs=3).fit(run.module, run.loader)
    assert run.moments[3:] == [(4, 0, 0), (5, 3, 1), (6, 6, 2)]


def test_a_budget_refreshes_the_highest_losses(tmp_path):
    run = Run(tmp_path, epochs=2, ledger=True, budget=100)
    losses = Run(tmp_path / "first", epochs=1, ledger=True, budget=100).sampler.ledger.column("loss_ema").numpy()
    fresh = set(np.flatnonzero(run.version(2, "versions") == 2))
    lengths = run.version(2, "offsets")[1:] - run.version(2, "offsets")[:-1]
    order = np.argsort(-losses)
    assert fresh == set(order[np.cumsum(lengths[order]) <= 100])
    assert 0 < len(fresh) < SIZE
    assert run.callback.history[1]["refreshed"] == lengths[list(fresh)].sum() / lengths.sum()


def test_what_is_logged(tmp_path):
    loggers = [Figures("tokens/"), Figures("tokens/")]
    run = Run(tmp_path, settings={"logger": loggers}, drift=0.0)
    assert loggers[0].rows == loggers[1].rows
    assert [step for step, _ in loggers[0].rows] == [0, 3, 6]
    names = {"agreement", "replaced", "refreshed", "tokens", "seconds", "share_of_training"}
    assert [set(row) for _, row in loggers[0].rows] == [
        names,
        names | {"drift", "changed"},
        names | {"drift", "changed"},
    ]
    shares = [row["share_of_training"] for _, row in loggers[0].rows]
    assert shares[0] > shares[-1] > 0
    assert max(shares) <= 1
    changed = run.version(2, "tokens") != run.version(3, "tokens")
    assert loggers[0].rows[2][1]["changed"] == pytest.approx(changed.mean())
    assert json.loads(json.dumps(run.callback.state_dict(), allow_nan=False))["history"] == run.callback.history


def test_corrections(tmp_path):
    logger = Figures("tokens/")
    run = Run(tmp_path, target=CorrectionDataset, follows=False, max_new_tokens=5, settings={"logger": logger})
    assert run.moments == [(1, 0, 0), (2, 3, 1), (3, 6, 2)]
    assert run.target.epoch == 2
    assert set(logger.rows[1][1]) >= {"unfinished", "agreement", "changed"}
    joint = correction_connector(TOKENIZER).tolist()
    for epoch, ids, inputs in run.module.seen:
        for row, tokens in zip(ids, inputs, strict=True):
            begin, length = (run.version(epoch + 1, name)[row] for name in ("offsets", "lengths"))
            attempt = run.version(epoch + 1, "tokens")[begin : begin + length].tolist()
            prompt = DATA[row]["input_ids"][DATA[row]["labels"] == -100].tolist()
            middle = [*prompt, *attempt, *joint]
            rest = len(DATA[row]["input_ids"]) - len(prompt)
            assert tokens[-len(middle) - rest : -rest] == middle


def test_the_trainers_precision_applies(tmp_path):
    run = Run(tmp_path, epochs=1, settings={"precision": "bf16-mixed"})
    assert {mode for mode in run.module.autocast if not mode[0]} == {(False, True)}


def test_nothing_but_the_buffer_is_touched(tmp_path):
    module = Tuner()
    mixer = SelfTokenMixer(TokenBuffer(tmp_path, DATA, TOKENIZER), beta=0.5, collate=pad_left)
    callback = RefreshSelfTokens(mixer, module.model, every_n_epochs=1, progress=False)
    run = trainer(Uniform(SIZE), max_epochs=1)
    run.strategy.connect(module)
    module.train()
    module.model.model.layers[0].eval()
    before = torch.get_rng_state()
    callback.on_fit_start(run, module)
    assert mixer.buffer.version == 1
    assert (torch.get_rng_state() == before).all()
    assert module.model.training
    assert not module.model.model.layers[0].training
    with pytest.raises(ValueError, match=r"RefreshSelfTokens\(model\): it is not in Tuner"):
        callback.on_fit_start(run, Tuner())


def test_the_state_is_plain(tmp_path):
    run = Run(tmp_path / "table", epochs=1)
    torch.save(run.callback.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = RefreshSelfTokens(run.target, run.module.model, every_n_epochs=1)
    again.load_state_dict(json.loads(json.dumps(state)))
    assert again.history == run.callback.history
    saved = again.state_dict()
    assert {**saved, "elapsed": 0} == {**state, "elapsed": 0}
    assert saved["elapsed"] > state["elapsed"]


def test_two_ranks_generate_together(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]]))
    run_job("ddp", tmp_path, world=2, script=__file__)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert first["moments"] == second["moments"] == [(1, 0, 0), (2, 2, 1)]
    assert first["weights"] == second["weights"] == first["resumed"] == second["resumed"]
    assert first["drift"] == second["drift"] > 0


def ddp(folder):
    """A run of two epochs with a drift, which rank 1 measures wrongly, and one resumed from its middle."""
    from samplewise.callbacks import refreshing

    measured, rank = refreshing.token_drift, int(os.environ.get("LOCAL_RANK", 0))
    refreshing.token_drift = lambda *args, **more: measured(*args, **more) if rank == 0 else 0.0
    settings = {"settings": {"strategy": "ddp", "devices": 2}, "epochs": 2, "drift": 0.01, "beta": 0.5}
    whole = Run(folder / "table", SaveEveryStep(folder), **settings)
    again = Run(folder / "table", ckpt_path=folder / "on_train_batch_end-001.ckpt", **settings)
    result = {"moments": whole.moments, "weights": whole.weights, "resumed": again.weights}
    torch.save(result | {"drift": whole.callback.history[1]["drift"]}, folder / f"rank{os.environ['LOCAL_RANK']}.pt")


def test_bad_arguments(tmp_path):
    buffer, model = TokenBuffer(tmp_path, DATA, TOKENIZER), llama()
    mixer = SelfTokenMixer(buffer, beta=0.5)
    corrections = CorrectionDataset(buffer, [1])
    cases = [
        ((buffer, model), {}, TypeError, r"target=TokenBuffer\): a SelfTokenMixer or a CorrectionDataset"),
        ((mixer, Tuner()), {}, TypeError, "of a LightningModule give the model in it"),
        ((mixer, model), {"every_n_steps": 2}, ValueError, "give one of the two"),
        ((mixer, model), {"every_n_epochs": None}, ValueError, "give one of the two"),
        ((mixer, model), {"every_n_epochs": 0}, ValueError, "every_n_epochs must be >= 1"),
        ((mixer, model), {"drift": 1.0}, ValueError, r"drift is .* must be in \[0, 1\)"),
        ((corrections, model), {"drift": 0.1}, ValueError, "for a SelfTokenMixer only"),
        ((mixer, model), {"drift": 0.1, "probe": 0}, ValueError, "probe"),
        ((mixer, model), {"max_new_tokens": 3}, TypeError, "for a SelfTokenMixer, rollout, passes, span, temperature"),
        ((corrections, model), {"span": 3}, TypeError, "for a CorrectionDataset, max_new_tokens, temperature"),
        ((mixer, model), {"rollout": "best"}, ValueError, "rollout"),
        ((mixer, model), {"rollout": "span", "passes": 2}, ValueError, "passes are of the parallel rollout"),
        ((mixer, model), {"temperature": -1.0}, ValueError, "temperature"),
        ((corrections, model), {"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1"),
        ((mixer, model), {"ledger": Ledger(3)}, ValueError, "it has 3 samples, the data 10"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            RefreshSelfTokens(*given, **{"every_n_epochs": 1, **options})
    with pytest.raises(ValueError, match="version 9 was saved"):
        RefreshSelfTokens(mixer, model, every_n_epochs=1).load_state_dict({"version": 9})


if __name__ == "__main__":
    {"ddp": ddp}[sys.argv[1]](Path(sys.argv[2]))

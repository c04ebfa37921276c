"""RefreshSelfTokens in runs of the HF Trainer with a toy Llama."""

import json
import shutil

import pytest
import torch
import transformers
from refresh_support import BATCH, BATCHES, DATA, EPOCHS, SIZE, TOKENIZER, TokenRun, llama

from samplewise.callbacks.huggingface import attach
from samplewise.callbacks.huggingface_tokens import STATE_FILE, RefreshSelfTokens
from samplewise.loaders import with_ids
from samplewise.plugins import BetaSchedule, CorrectionDataset, SelfTokenMixer, TokenBuffer, Uniform
from samplewise.recipes.responses import pad_left

pytestmark = [pytest.mark.filterwarnings("error:RefreshSelfTokens")]
PROMPTS = [item["input_ids"][item["labels"] == -100].tolist() for item in DATA]


class Run(TokenRun):
    """Three epochs of three batches; ``beta`` is 0, 0.4 and 0.8."""

    def __init__(
        self, folder, table, *, resume=None, keep=20, corrections=False, workers=0, keep_ids=False, arguments=None,
        **refresh,
    ):  # fmt: skip
        self.buffer, self.model, self.seen, self.autocast = (
            TokenBuffer(table, DATA, TOKENIZER, keep=keep),
            llama(),
            [],
            [],
        )
        if corrections:
            self.target = CorrectionDataset(self.buffer, [1, 2, 3], correct_share=1.0)
            data, collate = self.target, pad_left
        else:
            beta = BetaSchedule(0.8, epochs=EPOCHS)
            self.target = SelfTokenMixer(self.buffer, beta=beta, collate=pad_left, keep_ids=keep_ids)
            data, collate = with_ids(DATA), self.target
        if not {"every_n_steps", "every_n_epochs"} & set(refresh):
            refresh["every_n_epochs"] = 1
        self.callback = RefreshSelfTokens(self.target, progress=False, **refresh)
        settings = {
            "num_train_epochs": EPOCHS, "per_device_train_batch_size": BATCH, "learning_rate": 0.02, "report_to": [],
            "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
            "remove_unused_columns": corrections, "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0, **(arguments or {}),
        }  # fmt: skip
        self.trainer = transformers.Trainer(
            self.model, transformers.TrainingArguments(str(folder), **settings), data_collator=collate,
            train_dataset=data, callbacks=[self.callback],
        )  # fmt: skip
        self.model.register_forward_pre_hook(self.forwards, with_kwargs=True)
        self.model.model.register_forward_pre_hook(self.inner)
        self.trainer.train(resume_from_checkpoint=None if resume is None else str(resume))

    def inner(self, model, args):
        self.autocast.append((model.training, torch.is_autocast_enabled("cpu")))

    def forwards(self, model, args, given):
        if model.training:
            rows = zip(given["input_ids"], given["attention_mask"], strict=True)
            self.seen.append([tokens[mask == 1].tolist() for tokens, mask in rows])

    def check(self, versions):
        """Each batch is mixed from the version of its epoch, with the epoch's beta."""
        changed, rows = set(), {epoch: [] for epoch in range(EPOCHS)}
        for number, batch in enumerate(self.seen):
            epoch = number // BATCHES
            for tokens in batch:
                (row,) = (row for row, prompt in enumerate(PROMPTS) if tokens[: len(prompt)] == prompt)
                assert tokens == self.inputs(row, epoch, versions[epoch]), (epoch, row)
                rows[epoch].append(row)
                if tokens != DATA[row]["input_ids"].tolist():
                    changed.add(epoch)
        assert all(sorted(found) == list(range(SIZE)) for found in rows.values())
        return changed


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_is_mixed_from_the_tokens_generated_at_its_start(tmp_path, workers):
    run = Run(tmp_path / "out", tmp_path / "table", workers=workers, arguments={"save_strategy": "no"})
    assert run.moments == [(1, 0, 0), (2, 3, 1), (3, 6, 2)]
    assert run.check({0: 1, 1: 2, 2: 3}) == {1, 2}  # beta is 0 in epoch 0
    assert (run.version(2, "tokens") != run.version(3, "tokens")).any()
    assert [run.settings(number)["beta"] for number in (1, 2, 3)] == pytest.approx([0, 0.4, 0.8])
    assert [run.settings(number)["epoch"] for number in (1, 2, 3)] == [0, 1, 2]


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
    arguments = {"save_strategy": "no", "gradient_accumulation_steps": accumulate}
    run = Run(tmp_path / "out", tmp_path / "table", arguments=arguments, **refresh)
    assert run.moments == moments
    assert [run.settings(number)["epoch"] for number, _, _ in moments] == [epoch for _, _, epoch in moments]


@pytest.mark.parametrize(("drift", "versions"), [(0.0, [1, 2, 3]), (0.99, [1, 1, 1])])
def test_drift_decides(tmp_path, drift, versions):
    run = Run(tmp_path / "out", tmp_path / "table", drift=drift, probe=5, arguments={"save_strategy": "no"})
    assert [row["version"] for row in run.callback.history] == versions
    assert ["drift" in row for row in run.callback.history] == [False, True, True]
    assert all(0 < row["drift"] < 0.99 for row in run.callback.history[1:])
    run.check(dict(enumerate(versions)))


@pytest.mark.parametrize(
    ("refresh", "strategy", "workers"),
    [({}, "steps", 0), ({}, "steps", 2), ({"every_n_epochs": 2, "drift": 0.01}, "epoch", 0)],
    ids=str,
)
def test_resume_is_exact(tmp_path, refresh, strategy, workers):
    arguments = {"save_strategy": strategy}
    whole = Run(tmp_path / "out", tmp_path / "table", arguments=arguments, **refresh)
    steps = (3, 6) if strategy == "epoch" else (2, 3) if workers else (2, 3, 4, 6, 9)
    for step in steps:
        shutil.copytree(tmp_path / "table", copy := tmp_path / f"table-{step}")
        shutil.copytree(tmp_path / "out" / f"checkpoint-{step}", tmp_path / f"out-{step}" / f"checkpoint-{step}")
        given = {"resume": (folder := tmp_path / f"out-{step}") / f"checkpoint-{step}", "workers": workers}
        given["arguments"] = {"save_strategy": "no", "dataloader_persistent_workers": False}
        again = Run(folder, copy, **given, **refresh)
        assert again.seen == whole.seen[step:], step
        assert again.weights == whole.weights, step
        assert again.moments == whole.moments, step


def test_resume_by_steps_away_from_a_refresh(tmp_path):
    """Just after one, the batch that was fetched ahead differs, as the documentation says."""
    whole = Run(tmp_path / "out", tmp_path / "table", every_n_steps=4)
    shutil.copytree(tmp_path / "table", copy := tmp_path / "copy")
    again = Run(tmp_path / "out", copy, resume=tmp_path / "out" / "checkpoint-5", every_n_steps=4)
    assert again.seen == whole.seen[5:]
    assert again.weights == whole.weights
    assert again.moments == whole.moments


def test_a_checkpoint_in_another_folder(tmp_path):
    whole = Run(tmp_path / "out", tmp_path / "table")
    moved = shutil.move(tmp_path / "out" / "checkpoint-2", tmp_path / "moved")
    for number, arguments in enumerate(({"resume_from_checkpoint": str(moved)}, {})):
        shutil.copytree(tmp_path / "table", copy := tmp_path / f"table-{number}")
        given = {"resume": moved, "arguments": {"save_strategy": "no", **arguments}}
        if arguments:
            assert Run(tmp_path / "new", copy, **given).moments == whole.moments
        else:
            with pytest.warns(UserWarning, match=f"there is no .*checkpoint-2.*{STATE_FILE} of step 2"):
                again = Run(tmp_path / "new", copy, **given)
            assert again.moments == [(4, 2, 0), (5, 3, 1), (6, 6, 2)]
    shutil.copytree(tmp_path / "table", copy := tmp_path / "table-other")
    stale = {"save_strategy": "no", "resume_from_checkpoint": str(moved)}  # of another step than the one that is given
    again = Run(tmp_path / "out", copy, resume=tmp_path / "out" / "checkpoint-4", arguments=stale)
    assert again.moments == whole.moments


def test_a_version_that_is_gone_is_generated_anew(tmp_path):
    Run(tmp_path / "out", tmp_path / "table", keep=1)
    with pytest.warns(UserWarning, match="RefreshSelfTokens: the checkpoint's tokens are generated anew"):
        again = Run(tmp_path / "out", tmp_path / "table", resume=tmp_path / "out" / "checkpoint-4")
    assert [moment[1:] for moment in again.moments] == [(0, 0), (3, 1), (4, 1), (6, 2)]


def test_corrections(tmp_path):
    run = Run(
        tmp_path / "out", tmp_path / "table", corrections=True, max_new_tokens=4, arguments={"save_strategy": "no"}
    )
    assert run.moments == [(1, 0, 0), (2, 3, 1), (3, 6, 2)]
    for number, batch in enumerate(run.seen):
        for tokens in batch:
            (row,) = (row for row, prompt in enumerate(PROMPTS) if tokens[: len(prompt)] == prompt)
            begin, length = (run.version(number // BATCHES + 1, name)[row] for name in ("offsets", "lengths"))
            attempt = run.version(number // BATCHES + 1, "tokens")[begin : begin + length].tolist()
            assert tokens[len(PROMPTS[row]) :][: length + 3] == [*attempt, 1, 2, 3]
    assert run.target.epoch == 2


def test_what_is_logged_and_saved(tmp_path):
    run = Run(tmp_path / "out", tmp_path / "table", drift=0.0)
    rows = [row for row in run.trainer.state.log_history if "tokens/tokens" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    names = {"agreement", "replaced", "refreshed", "tokens", "seconds", "share_of_training"}
    names = {f"tokens/{name}" for name in names} | {"step", "epoch"}
    assert [set(row) for row in rows] == [names, *[names | {"tokens/drift", "tokens/changed"}] * 2]
    for row, noted in zip(rows, run.callback.history, strict=True):
        assert {name[7:]: value for name, value in row.items() if "/" in name}.items() <= noted.items()
    saved = json.loads((tmp_path / "out" / "checkpoint-9" / STATE_FILE).read_text())
    assert saved["history"] == run.callback.history
    assert saved["table"][0] == saved["epoch"] == 3
    logged = json.loads((tmp_path / "out" / "checkpoint-9" / "trainer_state.json").read_text())["log_history"]
    assert [row for row in logged if "tokens/tokens" in row] == rows


def test_the_trainers_precision_applies(tmp_path):
    arguments = {"save_strategy": "no", "bf16": True, "max_steps": 2}
    run = Run(tmp_path / "out", tmp_path / "table", arguments=arguments)
    assert {mode for mode in run.autocast if not mode[0]} == {(False, True)}


def test_evaluation_data_without_ids_are_not_mixed(tmp_path):
    run = Run(tmp_path / "out", tmp_path / "table", arguments={"save_strategy": "no"})
    rows = [DATA[row] for row in range(BATCH)]
    plain = pad_left(rows)
    loss = run.trainer.evaluate(rows)["eval_loss"]
    with torch.no_grad():
        expected = run.model.eval()(**{name: plain[name] for name in ("input_ids", "labels", "attention_mask")}).loss
    assert loss == pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(ValueError, match=r"is not the one that the buffer|response tokens in the batch"):
        run.trainer.evaluate(with_ids([DATA[row] for row in range(4, 8)]))


def test_what_would_leave_the_epoch_at_zero_or_the_ids_out(tmp_path):
    buffer = TokenBuffer(tmp_path / "table", DATA, TOKENIZER)
    for sampler, data, message in (
        (Uniform(len(DATA)), with_ids(DATA), "leave sampler out"),
        (None, DATA, r"Trainer\(train_dataset=with_ids\(data\)\)"),
    ):
        mixer = SelfTokenMixer(buffer, beta=0.5, collate=pad_left, keep_ids=False, sampler=sampler)
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, remove_unused_columns=False, report_to=[], disable_tqdm=True
        )
        callbacks = [RefreshSelfTokens(mixer, every_n_epochs=1)]
        given = {"data_collator": mixer, "train_dataset": data, "callbacks": callbacks}
        with pytest.raises(ValueError, match=message):
            transformers.Trainer(llama(), arguments, **given).train()
    assert buffer.version == 0


def test_wrong_settings(tmp_path):
    for settings, message in (
        ({"keep_ids": True}, r"set SelfTokenMixer\(keep_ids=False\)"),
        ({"arguments": {"remove_unused_columns": True}}, r"TrainingArguments\(remove_unused_columns=False\)"),
        ({"every_n_steps": 2, "every_n_epochs": 1}, "give one of the two"),
        ({"drift": -0.1}, "drift"),
    ):
        with pytest.raises(ValueError, match=message):
            Run(tmp_path / "out", tmp_path / "table", **settings)
    with pytest.raises(TypeError, match="a SelfTokenMixer or a CorrectionDataset is needed"):
        RefreshSelfTokens(DATA, every_n_epochs=1)
    mixer = SelfTokenMixer(TokenBuffer(tmp_path / "table", DATA, TOKENIZER), beta=0.5)
    with pytest.raises(TypeError, match="a language model of transformers is needed"):
        RefreshSelfTokens(mixer, torch.nn.Linear(1, 1), every_n_epochs=1)
    with pytest.raises(TypeError, match="there are, for a SelfTokenMixer, rollout"):
        RefreshSelfTokens(mixer, every_n_epochs=1, tempersture=1)


def test_beside_a_planned_sampler(tmp_path):
    """The mixer gets the ids that it replaces by, and the sampler records whose losses they are."""
    sampler, seen = Uniform(SIZE), []
    buffer, model = TokenBuffer(tmp_path / "table", DATA, TOKENIZER, keep=20), llama()
    mixer = SelfTokenMixer(buffer, beta=0.5, collate=pad_left, keep_ids=False)
    refresh = RefreshSelfTokens(mixer, every_n_epochs=1, progress=False)
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": BATCH, "remove_unused_columns": False}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = transformers.Trainer(
        model, transformers.TrainingArguments(str(tmp_path), **settings), data_collator=mixer,
        train_dataset=with_ids(DATA), callbacks=[refresh],
    )  # fmt: skip
    attach(trainer, sampler)
    observe = sampler.observe
    sampler.observe = lambda ids, losses: (seen.append(ids.tolist()), observe(ids, losses))[1]
    trained = []

    def forward(model, args, given):
        if model.training:
            trained.append(given["input_ids"])

    model.register_forward_pre_hook(forward, with_kwargs=True)
    trainer.train()
    assert [row["version"] for row in refresh.history] == [1, 2]
    own = [pad_left([DATA[row] for row in ids])["input_ids"] for ids in seen[-BATCHES:]]
    assert any(a.shape != b.shape or (a != b).any() for a, b in zip(trained[-BATCHES:], own, strict=True))
    for begin in (0, BATCHES):
        assert sorted(sum(seen[begin : begin + BATCHES], [])) == list(range(SIZE))  # noqa: RUF017
    assert sampler.ledger.seen.all()

"""`attach(trainer, sampler)`: what the HF Trainer trains on, and what it refuses."""

import subprocess
import sys
import time
import types

import datasets
import pytest
import torch
import transformers
from bits_support import tiny_llama, tiny_quantized, token_ids
from huggingface_support import ROWS, items, joined, prepare, weights
from switch_support import Traced

from samplewise.callbacks.huggingface import attach
from samplewise.loaders import with_ids
from support import Everything, HardHalf, Lengths

pytestmark = pytest.mark.filterwarnings("error:attach")


class Batches:
    """Writes down what the model gets."""

    def __init__(self, model):
        self.training, self.evaluating = [], []
        model.register_forward_pre_hook(self.forward, with_kwargs=True)

    def forward(self, model, args, inputs):
        (self.training if model.training else self.evaluating).append(inputs)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 4, "dataloader_num_workers": 2},
        {
            "per_device_train_batch_size": 3,
            "dataloader_drop_last": True,
            "max_steps": 5,
            "gradient_accumulation_steps": 1,
        },
    ],
    ids=["plain", "workers", "drop_last"],
)
def test_without_weights_it_is_the_trainers_own_run_bit_for_bit(tmp_path, settings):
    ends = []
    for sampler in (None, Everything(ROWS, shuffle=False)):
        model = tiny_llama()
        for module in model.modules():  # the global generator, too, must be where it would be
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.1
        strategy = "random" if sampler else "sequential"
        trainer, _ = prepare(tmp_path, sampler, model=model, train_sampling_strategy=strategy, **settings)
        trainer.train()
        ends.append((weights(trainer), logged(trainer, "loss"), logged(trainer, "learning_rate")))
    assert ends[0] == ends[1]
    assert len(ends[0][1]) == {4: 9}.get(settings.get("gradient_accumulation_steps"), settings.get("max_steps", 18))


@pytest.mark.parametrize("kind", ["dicts", "datasets", "ours"])
def test_ids_belong_to_their_samples_and_never_reach_the_model(tmp_path, kind):
    """Each row begins with its number. The data has a column that the model does not take."""
    data = items()
    if kind == "datasets":
        data = datasets.Dataset.from_list(
            [{key: torch.as_tensor(value).tolist() for key, value in row.items()} for row in data]
        )
    elif kind == "ours":
        data = with_ids(data)
    sampler = HardHalf(ROWS)
    given = {"eval_dataset": data.dataset if kind == "ours" else data}
    trainer, noted = prepare(tmp_path, sampler, data=data, given=given, eval_strategy="epoch")
    seen = Batches(trainer.model)
    trainer.train()
    assert [batch["input_ids"][:, 0].tolist() for batch in seen.training] == noted.ids
    assert all("sample_id" not in batch and "unused" not in batch for batch in seen.training + seen.evaluating)
    assert sampler.step == len(noted.ids) == 3 * 11
    assert len(seen.evaluating) == 3 * 3


def test_recorded_losses_are_those_of_the_samples(tmp_path):
    sampler = Everything(ROWS)
    trainer, _ = prepare(tmp_path, sampler, learning_rate=0.0, num_train_epochs=1)
    trainer.train()
    with torch.no_grad():
        for row, item in enumerate(items()):
            alone = trainer.model(input_ids=item["input_ids"][None], labels=item["labels"][None]).loss
            assert float(sampler.ledger.column("loss_last")[row]) == pytest.approx(float(alone), rel=1e-5)
    recorded = sampler.ledger.records.clone()
    trainer.evaluate(items())
    trainer.predict(items())
    assert torch.equal(sampler.ledger.records.view(torch.int32), recorded.view(torch.int32))


class Half(Lengths):
    """Plans of 22, 11, 6 and 22 samples."""

    def __init__(self, size):
        super().__init__(size, lengths=[22, 11, 6, 22])


@pytest.mark.parametrize(("accumulation", "batch"), [(1, 2), (4, 3)])
def test_epochs_are_equally_long_and_the_learning_rate_reaches_its_end(tmp_path, accumulation, batch):
    """The first plan's length is that of all epochs: 0-21, then 11 + 6 + 5 of the last plan, then its 17 and 5."""
    sampler = Half(ROWS)
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    trainer, noted = prepare(tmp_path, sampler, **settings)
    trainer.train()
    batches = -(-ROWS // batch)
    steps = -(-batches // accumulation)
    assert sampler.epoch_length == ROWS
    assert trainer.state.global_step == trainer.state.max_steps == 3 * steps
    assert [noted.rates[-2] > 0, noted.rates[-1]] == [True, 0.0]
    epochs = [joined(noted.ids[epoch * batches : (epoch + 1) * batches]) for epoch in range(3)]
    assert [len(epoch) for epoch in epochs] == [ROWS] * 3
    assert [sorted(epoch[:count]) for epoch, count in zip(epochs, (22, 11, 17), strict=True)][:2] == [
        list(range(22)),
        list(range(11)),
    ]
    assert sorted(epochs[1][11:17]) == list(range(6))
    assert sorted(epochs[1][17:] + epochs[2][:17]) == list(range(22))


def test_a_plan_shorter_than_the_data(tmp_path):
    sampler = Lengths(ROWS, lengths=[8])
    trainer, _ = prepare(tmp_path, sampler, gradient_accumulation_steps=1)
    trainer.train()
    assert trainer.state.max_steps == 3 * 4
    (first, *_, last) = [row for row in trainer.state.log_history if "samplewise/kept" in row]
    assert first["samplewise/kept"] == last["samplewise/kept"] == 8 / ROWS
    assert last["samplewise/saved"] == pytest.approx(1 - 8 / ROWS)
    assert last["epoch"] == 3.0


class Reporter(transformers.TrainerCallback):
    def __init__(self):
        self.rows = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append(dict(logs))


def test_figures_reach_the_reporters_and_leave_other_logs_alone(tmp_path):
    reporter = Reporter()
    settings = {"logging_strategy": "epoch", "eval_strategy": "epoch", "per_device_eval_batch_size": ROWS}
    trainer, _ = prepare(tmp_path, HardHalf(ROWS), given={"callbacks": [reporter], "eval_dataset": items()}, **settings)
    trainer.train()
    figures = [row for row in reporter.rows if "samplewise/kept" in row]
    assert [row["epoch"] for row in figures] == [1.0, 2.0, 3.0]
    names = {f"samplewise/{name}" for name in ("kept", "coverage", "ess", "staleness", "plan_seconds")}
    assert all(set(row) == {*names, "epoch"} for row in figures)
    assert figures[0]["samplewise/ess"] == 1 > figures[1]["samplewise/ess"] > 0
    assert figures[0]["samplewise/kept"] == 1 > figures[1]["samplewise/kept"] > 0
    assert len(logged(trainer, "loss")) == len(logged(trainer, "eval_loss")) == 3


def test_losses_that_are_not_finite_are_told(tmp_path):
    sampler = Everything(ROWS)

    def losses(outputs, inputs):
        return torch.where(inputs["input_ids"][:, 0] == 3, torch.nan, outputs.logits[:, 0, 0])

    trainer, _ = prepare(tmp_path, sampler, losses=losses, num_train_epochs=1)
    with pytest.warns(UserWarning, match="attach: 1 losses so far were not finite"):
        trainer.train()
    assert logged(trainer, "samplewise/rejected") == [1.0]
    assert not sampler.ledger.seen[3]


class Silent(transformers.Trainer):
    """Computes its loss without `compute_loss`."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_trainer_that_records_nothing_is_told(tmp_path):
    sampler = Everything(ROWS)
    trainer, _ = prepare(tmp_path, sampler, kind=Silent, num_train_epochs=1)
    with pytest.warns(UserWarning, match="attach: no loss was recorded in epoch 0"):
        trainer.train()
    assert (sampler.step, sampler.consumed) == (0, ROWS)


def test_training_again_within_an_epoch_begins_it_anew(tmp_path):
    trainer, noted = prepare(tmp_path, Everything(ROWS), max_steps=2)
    trainer.train()
    with pytest.warns(UserWarning, match="attach: training begins anew"):
        trainer.train()
    assert noted.ids[:4] == noted.ids[4:]


def test_training_again_begins_anew(tmp_path):
    sampler = Everything(ROWS)
    trainer, noted = prepare(tmp_path, sampler, num_train_epochs=2)
    trainer.train()
    with pytest.warns(UserWarning, match="attach: training begins anew"):
        trainer.train()
    assert (sampler.epoch, sampler.consumed, len(noted.ids)) == (1, ROWS, 4 * 11)
    for begin in range(0, 44, 11):
        assert sorted(joined(noted.ids[begin : begin + 11])) == list(range(ROWS))


def test_beside_a_schedule_of_bit_widths(tmp_path):
    ends = []
    for order in ("alone", "before", "behind"):
        model, layers = tiny_quantized()
        schedule, sampler = Traced(layers=layers), HardHalf(ROWS)
        trainer, _ = prepare(tmp_path, model=model, num_train_epochs=2)
        for what in {"alone": (schedule,), "before": (schedule, sampler), "behind": (sampler, schedule)}[order]:
            attach(trainer, what)
        trainer.train()
        assert len(schedule.recorded) == 12
        ends.append((sampler.step, [loss for _, loss, _ in schedule.recorded], weights(trainer)))
        assert ends[-1][1] == pytest.approx(logged(trainer, "loss"))
    assert ends[0][0] == 0
    assert ends[1] == ends[2]
    assert ends[1][0] == 22


# --- what is refused --------------------------------------------------------------------------------------------------


class OwnLoader(transformers.Trainer):
    def get_train_dataloader(self):
        return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, batch_size=2, shuffle=True))


class PassesOn(transformers.Trainer):
    """Overrides as documented, and prefers another batch size."""

    def get_train_dataloader(self):
        self._train_batch_size = 4
        return super().get_train_dataloader()


def test_an_overridden_loader(tmp_path):
    trainer, _ = prepare(tmp_path, Everything(ROWS), kind=OwnLoader)
    with pytest.raises(RuntimeError, match=r"gives a loader with another sampler, RandomSampler\. Have it call super"):
        trainer.train()
    trainer, noted = prepare(tmp_path, Everything(ROWS), kind=PassesOn, num_train_epochs=1)
    trainer.train()
    assert [len(batch) for batch in noted.ids] == [4] * 5 + [2]


class SlowFirst(list):
    """The first of two workers is slow, so that the batches of the second one overtake its own."""

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info().id == 0:
            time.sleep(0.05)
        return super().__getitem__(index)


class Overtaking(transformers.Trainer):
    def get_train_dataloader(self):
        settings = {"num_workers": 2, "in_order": False, "collate_fn": self.data_collator}
        return torch.utils.data.DataLoader(self.train_dataset, 2, sampler=self._get_train_sampler(), **settings)


def test_batches_that_overtake_each_other(tmp_path):
    sampler, rows = Everything(ROWS), [{name: row[name] for name in ("input_ids", "labels")} for row in items()]
    trainer, noted = prepare(tmp_path, sampler, kind=Overtaking, data=SlowFirst(rows), num_train_epochs=1)
    trainer.train()
    assert joined(noted.ids) != sampler.order().ids(0, ROWS).tolist()
    assert sorted(joined(noted.ids)) == list(range(ROWS))


def test_a_loader_that_is_replaced_later(tmp_path):
    trainer, _ = prepare(tmp_path, Everything(ROWS))
    loader = torch.utils.data.DataLoader(token_ids(ROWS), batch_size=2)
    trainer.get_train_dataloader = lambda: loader
    with pytest.raises(RuntimeError, match="get_train_dataloader was replaced after attach"):
        trainer.train()


def test_an_order_that_is_not_the_samplers(tmp_path):
    sampler = Everything(ROWS)
    trainer, _ = prepare(tmp_path, sampler)
    inside = sampler.__class__.__iter__
    sampler.__class__ = type("Turned", (Everything,), {"__iter__": lambda self: iter(list(inside(self))[::-1])})
    with pytest.raises(RuntimeError, match=r"attach: the batch holds the samples .* Leave the accelerator's dispatch"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"size": ROWS + 1}, ValueError, r"plans for 23 samples, the Trainer's data set has 22; make"),
        (
            {"train_sampling_strategy": "group_by_length"},
            ValueError,
            r"TrainingArguments\(train_sampling_strategy='random'\)",
        ),
        ({"train_sampling_strategy": "sequential"}, ValueError, "the sampler decides what comes when"),
        ({"ignore_data_skip": True}, ValueError, r"set TrainingArguments\(ignore_data_skip=False\)"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            ValueError,
            r"accelerator_config=\{'dispatch_batches': Fal",
        ),
        ({"accelerator_config": {"split_batches": True}}, ValueError, r"accelerator_config=\{'split_batches': False\}"),
    ],
)
def test_settings_that_contradict(tmp_path, settings, error, message):
    sampler = Everything(settings.pop("size", ROWS))
    with pytest.raises(error, match=message):
        prepare(tmp_path, sampler, **settings)


def test_what_attach_takes(tmp_path):
    sampler = Everything(ROWS)
    trainer, _ = prepare(tmp_path, sampler)
    trainer.args._n_gpu = 2
    fresh, _ = prepare(tmp_path)
    fresh.args._n_gpu = 2
    for call, error, message in (
        (lambda: attach(object(), sampler), TypeError, r"attach\(target=object\): a transformers.Trainer is needed"),
        (lambda: attach(trainer, sampler), RuntimeError, "it has a sampler already"),
        (lambda: attach(trainer, sampler, evaluate=2), TypeError, r"attach\(evaluate=...\): belongs to another use"),
        (lambda: attach(trainer, Traced(layers=["x"]), losses=len), TypeError, r"attach\(losses=...\)"),
        (lambda: attach(trainer, 3), TypeError, r"what=int\): a PlannedSampler or a Schedule is needed"),
        (lambda: attach(fresh, sampler), ValueError, "start one process a GPU"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_ledger_that_is_dealt_out(tmp_path):
    fresh, _ = prepare(tmp_path)
    sampler = Everything(ROWS)
    sampler.sharded = True
    assert fresh.args.world_size == 1
    fresh.args.__dict__["distributed_state"] = types.SimpleNamespace(num_processes=2)
    with pytest.raises(ValueError, match=r"Everything\(sharded=True\) knows its own only.*leave sharded out"):
        attach(fresh, sampler)


def test_a_sampler_of_other_ranks(tmp_path):
    trainer, _ = prepare(tmp_path, Everything(ROWS, num_replicas=2, rank=0))
    with pytest.raises(RuntimeError, match="the sampler serves 2 ranks, the Trainer has 1"):
        trainer.train()


def test_attach_itself_needs_no_transformers():
    """Loops with accelerate go without it."""
    code = "import sys, samplewise.callbacks.huggingface; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_method_of_another_number_of_epochs(tmp_path):
    sampler = Everything(ROWS)
    sampler.epochs = 5
    trainer, _ = prepare(tmp_path, sampler, max_steps=1)
    with pytest.warns(UserWarning, match=r"Everything\(epochs=5\), but the Trainer trains for 1 epochs"):
        trainer.train()

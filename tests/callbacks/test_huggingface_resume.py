"""`attach(trainer, sampler)`: runs of the HF Trainer that go on exactly."""

import shutil

import pytest
import torch
import transformers
from huggingface_support import BATCH, ROWS, history, items, joined, prepare

from samplewise.callbacks.huggingface_loader import PassedBatches
from samplewise.callbacks.huggingface_sampling import STATE_FILE
from samplewise.loaders.order import Order
from support import Everything, HardHalf

pytestmark = [pytest.mark.filterwarnings("error:attach")]


def run(folder, resume=None, **settings):
    """A run of 18 steps in 3 epochs, or what is left of it, and how it went."""
    sampler = HardHalf(ROWS, seed=3)
    settings = {"save_strategy": "steps", "save_steps": 1, **settings}
    trainer, noted = prepare(folder, sampler, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return history(trainer, sampler, noted)


def rest(whole, part):
    """The whole run's last entries, as many as the part has."""
    return {
        key: value[len(value) - len(part[key]) :] if isinstance(value, list) else value for key, value in whole.items()
    }


DROPPED = {"dataloader_num_workers": 2, "dataloader_drop_last": True, "per_device_train_batch_size": 4}


@pytest.mark.parametrize(
    ("settings", "total", "steps"), [({}, 18, (1, 4, 6, 11, 12, 17)), (DROPPED, 9, (2, 3))], ids=["plain", "dropped"]
)
def test_from_any_checkpoint_and_twice_in_a_row(tmp_path, settings, total, steps):
    """Steps 6 and 12, or 3, are the ends of epochs, with an accumulation that is not full."""
    folder = tmp_path / "runs"
    whole = run(folder, **settings)
    assert len(whole["rates"]) == total
    moved = {step: shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"moved-{step}") for step in steps}
    for step in steps:
        part = run(tmp_path / "other", str(moved[step]), **{**settings, "save_strategy": "no"})
        assert len(part["rates"]) == total - step
        assert part == rest(whole, part)
    for last in (3, total // 2):  # the newest one, then one that a resumed run has saved
        for step in range(last + 1, total + 1):
            shutil.rmtree(folder / f"checkpoint-{step}")
        part = run(folder, True, **settings)
        assert part == rest(whole, part)


def test_nothing_is_read_for_what_is_passed_over(tmp_path):
    folder, read = tmp_path, []
    run(folder)

    class Reads(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    run(folder, str(folder / "checkpoint-5"), data=Reads(items()), max_steps=6)
    assert len(read) == BATCH  # the one batch of step 6


def test_ids_of_batches_that_are_passed_over_are_not_drawn(monkeypatch):
    """But for the first batches, which accelerate keeps to fill up the last ones with."""
    size, ranks = 10_000, 2
    done, sampler, whole = (Everything(size, epoch_length=size, num_replicas=ranks, rank=0) for _ in range(3))
    for one in (sampler, whole):
        one.sharding = "loader"
    done.advance_to(size // 2)
    sampler.load_state_dict(done.state_dict())
    made, make = [], Order.ids
    monkeypatch.setattr(Order, "ids", lambda self, start, stop: (made.append(stop - start), make(self, start, stop))[1])
    batches = PassedBatches(sampler, 4, False)
    batches.passed = size // 8
    found = iter(batches)
    passed = [next(found) for _ in range(size // 8)]
    assert sum(made) == 4 * ranks
    ids = list(whole)
    assert passed == [ids[:4], *[ids[4:8]] * (size // 8 - 1)]
    assert joined(found) == ids[size // 2 :]
    assert batches.passed == 0


def test_a_checkpoint_without_the_samplers_state(tmp_path):
    run(tmp_path)
    file = tmp_path / "checkpoint-8" / STATE_FILE
    assert set(torch.load(file, weights_only=True)) == {"version", "sampler", "figures"}
    assert not list((tmp_path / "checkpoint-8").glob(".*"))
    file.unlink()
    with pytest.warns(UserWarning, match=f"there is no .*{STATE_FILE}.*at the Trainer's step 8"):
        part = run(tmp_path, str(tmp_path / "checkpoint-8"))
    assert len(part["rates"]) == 10
    assert part["position"][:2] == (2, ROWS)


@pytest.mark.parametrize("settings", [{"per_device_train_batch_size": 4}, {"gradient_accumulation_steps": 1}])
def test_another_total_batch_is_refused(tmp_path, settings):
    run(tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match=r"saved after 8 samples of epoch 0, but .* Keep the product of"):
        run(tmp_path, str(tmp_path / "checkpoint-2"), **settings)


class LeavesEarly(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 4


def test_an_epoch_that_was_left_early(tmp_path):
    run(tmp_path, given={"callbacks": [LeavesEarly()]})
    with pytest.raises(RuntimeError, match=r"4 samples of epoch 1, .* 20 of epoch 0\. .*leave no epoch early"):
        run(tmp_path, str(tmp_path / "checkpoint-5"))


def test_the_same_total_batch_goes_on(tmp_path):
    whole = run(tmp_path / "runs")
    part = run(
        tmp_path / "other",
        str(tmp_path / "runs" / "checkpoint-8"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
    )
    assert joined(part["ids"])[:14] == joined(whole["ids"])[ROWS + 8 : 2 * ROWS]


def test_figures_are_those_of_the_epochs_beginning(tmp_path):
    sampler = HardHalf(ROWS)
    trainer, _ = prepare(tmp_path, sampler, save_strategy="steps", save_steps=4)
    trainer.train()
    again, _ = prepare(tmp_path, HardHalf(ROWS), save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    rows = [[row for row in each.state.log_history if "samplewise/kept" in row] for each in (trainer, again)]
    for row in rows[0] + rows[1]:
        del row["samplewise/plan_seconds"]
    assert rows[0] == rows[1]

"""SwitchBits in real Lightning trainings: which configuration each step has, what it trains and what is recorded."""

import pytest
import switch_support as support
import torch
from lightning.pytorch import Callback
from lightning_support import QUIET, SaveEveryStep, run_job
from switch_support import Memory, Module, Traced, by_step, fit, history, in_use, loader, small, trainer, weights
from torch import nn
from torch.utils.data import DataLoader

from samplewise.callbacks import SamplingCallback, SwitchBits
from samplewise.callbacks.switching import Switch
from samplewise.loaders import with_ids
from samplewise.plugins import ArmSchedule, BitSchedule, add_adapters, quantize_model
from samplewise.plugins.bit_adapters import gradient_norms
from support import Everything

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("error:SwitchBits"),
    pytest.mark.filterwarnings("ignore:.*returned `?None"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated"),
]
ACCUMULATED = {"accumulate_grad_batches": 4, "max_epochs": 2}  # of 10 batches: windows of 4, 4 and 2


def drawn(schedule, step):
    """The widths of a step."""
    return tuple(schedule.draw(step).values())


def assert_goes_on(rest, whole, batches, steps):
    """``rest`` is what is left of ``whole`` after so many batches and optimizer steps."""
    assert len(rest["batches"]) == len(whole["batches"]) - batches > 0
    for key, start in (("batches", batches), ("moved", steps), ("recorded", steps)):
        assert rest[key] == whole[key][start:], key
    for key in ("state", "weights"):
        assert rest[key] == whole[key], key


# --- training ---


def test_one_configuration_for_all_batches_of_a_step():
    plain, _ = fit()
    module, schedule = fit(**ACCUMULATED)
    assert [step for step, _, _ in module.batches] == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 4 + [4] * 4 + [5] * 2
    assert all(widths == drawn(schedule, step) for step, widths, _ in module.batches + plain.batches)
    assert len({widths for _, widths, _ in module.batches}) > 3
    assert schedule.step == 6
    assert schedule.counts.sum(1).tolist() == [6] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_adapters_that_a_step_does_not_use_stay_bit_identical(optimizer, set_to_none):
    """In spite of momentum and weight decay."""
    module, schedule = fit(optimizer=optimizer, set_to_none=set_to_none, max_epochs=2)
    assert module.moved == [in_use(schedule.draw(step)) for step in range(20)]
    assert len(set.union(*module.moved)) == 9  # each adapter had its turn


def test_recorded_losses_are_the_means_of_the_windows():
    module, schedule = fit(ema=0.0, **ACCUMULATED)
    means = [sum(losses) / len(losses) for losses in by_step(module.batches).values()]
    assert [loss for _, loss, _ in schedule.recorded] == pytest.approx(means)
    for slot in range(3):
        last = {drawn(schedule, step)[slot]: mean for step, mean in enumerate(means)}
        for arm, width in enumerate(schedule.arms):
            assert schedule.losses[slot, arm] == pytest.approx(last.get(width, float("nan")), nan_ok=True)


def test_a_loss_that_is_not_finite_is_counted_and_not_averaged():
    _, schedule = fit(bad=[5], max_steps=2, accumulate_grad_batches=4, period=2)  # 4 bits, then 2
    assert (schedule.rejected, schedule.counts.tolist()) == (1, [[1, 0, 1]] * 3)
    assert schedule.losses[:, 2].tolist() == pytest.approx([schedule.recorded[0][1]] * 3)
    assert torch.tensor(schedule.losses[:, :2]).isnan().all()


def test_a_step_without_a_loss():
    class Skips(Module):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    model, layers = small()
    schedule = Traced(layers=layers)
    trainer(SwitchBits(schedule)).fit(Skips(model), loader())
    assert schedule.recorded == [(step, None, None) for step in range(10)]


class Norms(Callback):
    """The gradients' norms as the optimizer gets them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append({name: float(norm) for name, norm in gradient_norms(module.model).items()})


@pytest.mark.parametrize("mapping", ["loss", "grad_norm"])
def test_draws_that_depend_on_what_was_recorded(mapping):
    norms = Norms()
    module, schedule = fit(norms, mapping=mapping, **ACCUMULATED)
    values = schedule.losses if mapping == "loss" else schedule.scores
    assert torch.tensor(values).isfinite().any(1).all()
    assert abs(schedule.probabilities(6) - 1 / 3).max() > 0.01
    assert [scores for _, _, scores in schedule.recorded] == (norms.seen if mapping == "grad_norm" else [None] * 6)
    assert all(norm > 0 for row in norms.seen for norm in row.values())
    assert module.moved == [
        {(name, f"bits{w}") for name, w in zip(schedule.layers, widths, strict=True)}
        for widths in dict((step, widths) for step, widths, _ in module.batches).values()
    ]


def test_the_average_width_is_logged():
    memory = Memory()
    _, schedule = fit(logger=memory, log_every_n_steps=1, accumulate_grad_batches=2)
    logged = [row["samplewise/bits"] for row in memory.rows.values() if "samplewise/bits" in row]
    assert logged == pytest.approx([schedule.average(step) for step in range(5)])


def test_mixed_precision():
    module, schedule = fit(precision="bf16-mixed", **ACCUMULATED)
    assert module.moved == [in_use(schedule.draw(step)) for step in range(6)]
    means = [sum(losses) / len(losses) for losses in by_step(module.batches).values()]
    assert [loss for _, loss, _ in schedule.recorded] == pytest.approx(means, rel=0.02)


def test_activation_checkpointing_gives_the_same_gradients():
    """What is recomputed in the backward pass has the configuration of the forward pass."""
    from bits_support import tiny_quantized, token_ids

    class Llama(Module):
        def training_step(self, batch, batch_idx):
            ids = token_ids(seed=batch_idx)
            return self.model(input_ids=ids, labels=ids).loss

    def run(checkpointing):
        model, layers = tiny_quantized()
        model.train()
        calls = []
        model.get_submodule("base_model.model.model.layers.0.mlp.up_proj").register_forward_hook(
            lambda *args: calls.append(1)
        )
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module, norms = Llama(model, optimizer="sgd"), Norms()
        settings = {"limit_train_batches": 4, "accumulate_grad_batches": 2}
        trainer(SwitchBits(Traced(layers=layers, period=2)), norms, **settings).fit(module, loader())
        return weights(model), norms.seen, len(calls)

    plain, again = run(False), run(True)
    assert again[:2] == plain[:2]
    assert (plain[2], again[2]) == (4, 8)


class Sampled(Module):
    """Trains on the batch, with per-sample losses that a sampler observes."""

    def __init__(self, model, sampler):
        super().__init__(model)
        self.sampler = sampler

    def training_step(self, batch, batch_idx):
        ids, x = batch
        losses = self.model(x).square().mean(1)
        self.batches.append((self.global_step, self.widths(), float(losses.detach().mean())))
        return self.sampler.observe(ids, losses)


def test_together_with_a_planned_sampler(tmp_path):
    rows = torch.randn(18, support.WIDTH, generator=torch.Generator().manual_seed(0))

    def run(*callbacks, ckpt_path=None):
        model, layers = small()
        sampler, schedule = Everything(18), Traced(layers=layers)
        module = Sampled(model, sampler)
        train = DataLoader(with_ids(rows), batch_size=4, sampler=sampler)
        run = trainer(
            SwitchBits(schedule), SamplingCallback(sampler), *callbacks, max_epochs=3, accumulate_grad_batches=2
        )
        run.fit(module, train, ckpt_path=ckpt_path, weights_only=True)
        return history(module, schedule), sampler.ledger.records.numpy().tobytes(), sampler, schedule

    whole, ledger, sampler, schedule = run(SaveEveryStep(tmp_path))
    assert sampler.ledger.column("count").tolist() == [3] * 18
    assert schedule.counts.sum(1).tolist() == [9] * 3  # of 5 batches each epoch: 2, 2, 1
    means = [sum(losses) / len(losses) for losses in by_step(whole["batches"]).values()]
    assert [loss for _, loss, _ in whole["recorded"]] == pytest.approx(means)
    rest, ledger_again, *_ = run(ckpt_path=tmp_path / "on_train_batch_end-007.ckpt")
    assert_goes_on(rest, whole, 7, 4)
    assert ledger_again == ledger


# --- evaluation ---


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        (None, [(4, 4, 4)] * 3),
        (2, [(2, 2, 2)] * 3),
        ({"0": 2, "2": 3, "4": 4}, [(2, 3, 4)] * 3),
        ({"2": 3}, [(4, 3, 4)] * 3),
        ([2, {"0": 2}, 4], [(2, 2, 2), (2, 4, 4), (4, 4, 4)]),
    ],
)
def test_evaluation_at_configurations_of_its_own(evaluate, expected):
    """In the sanity check, and inside an epoch and a window, which is then trained on as without it."""
    val = [loader(2)] * 3
    module, schedule = fit(evaluate=evaluate, val=val, num_sanity_val_steps=1, val_check_interval=3, **ACCUMULATED)
    rows = [("validate", k, expected[k]) for k in range(3) for _ in range(2)]
    assert module.pinned == [("sanity_check", k, expected[k]) for k in range(3)] + 6 * rows
    assert history(module, schedule) == history(*fit(**ACCUMULATED))


@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_loops_apart_from_training(loop):
    module, schedule = fit(max_steps=5)
    state = schedule.state_dict()
    run = trainer(SwitchBits(schedule, evaluate=[2, {"2": 3}]))
    getattr(run, loop)(module, [loader(2)] * 2)
    assert module.pinned == [(loop, 0, (2, 2, 2))] * 2 + [(loop, 1, (4, 3, 4))] * 2
    assert schedule.state_dict() == state


@pytest.mark.parametrize("loop", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("loaders", [1, 3])
def test_another_number_of_configurations_than_loaders(loop, loaders):
    model, layers = small()
    run, data = trainer(SwitchBits(Traced(layers=layers), evaluate=[2, 3])), [loader(2)] * loaders
    with pytest.raises(ValueError, match=rf"has 2 configurations, and this evaluation {loaders} loaders"):
        getattr(run, loop)(Module(model), *([loader(), data] if loop == "fit" else [data]))


# --- resume ---


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("mapping", ["maxent", "loss", "grad_norm"])
def test_resume_is_exact_and_twice_in_a_row(tmp_path, optimizer, mapping):
    settings = {"optimizer": optimizer, "mapping": mapping, **ACCUMULATED}
    whole = history(*fit(SaveEveryStep(tmp_path / "whole"), **settings))
    first = tmp_path / "whole" / "on_train_batch_end-004.ckpt"
    assert_goes_on(history(*fit(SaveEveryStep(tmp_path / "again"), ckpt_path=first, **settings)), whole, 4, 1)
    second = tmp_path / "again" / "on_train_batch_end-014.ckpt"
    assert_goes_on(history(*fit(ckpt_path=second, **settings)), whole, 14, 4)


def test_resume_inside_a_window(tmp_path):
    """Lightning does not save accumulated gradients; the configurations are the same."""
    whole, _ = fit(SaveEveryStep(tmp_path), **ACCUMULATED)
    rest, _ = fit(ckpt_path=tmp_path / "on_train_batch_end-006.ckpt", **ACCUMULATED)
    assert [row[:2] for row in rest.batches] == [row[:2] for row in whole.batches[6:]]


def test_a_checkpoint_without_the_callbacks_state(tmp_path):
    whole, _ = fit(SaveEveryStep(tmp_path))
    path = tmp_path / "on_train_batch_end-004.ckpt"
    saved = torch.load(path, weights_only=True)
    del saved["callbacks"]["SwitchBits"]
    torch.save(saved, path)
    with pytest.warns(UserWarning, match="training begins at step 4, and the schedule has recorded 0"):
        module, schedule = fit(ckpt_path=path)
    assert module.batches == whole.batches[4:]
    assert (schedule.step, schedule.counts.sum()) == (10, 18)
    with pytest.raises(ValueError, match="version 0 was saved"):
        SwitchBits(schedule).load_state_dict({"version": 0})


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    fit(SaveEveryStep(tmp_path), max_steps=4)
    with pytest.raises(ValueError, match="other slots, arms, seed or options"):
        fit(ckpt_path=tmp_path / "on_train_batch_end-002.ckpt", seed=1)


def test_a_schedule_that_was_used_begins_anew():
    module, schedule = fit()
    with pytest.warns(UserWarning, match="has recorded 10; what was recorded is forgotten"):
        trainer(SwitchBits(schedule), max_steps=4).fit(module, loader())
    assert (schedule.step, schedule.counts.sum()) == (4, 12)
    assert [widths for _, widths, _ in module.batches[10:]] == [drawn(schedule, step) for step in range(4)]


def test_a_trainer_that_goes_on_keeps_what_was_recorded():
    model, layers = small()
    module, schedule = Module(model), Traced(layers=layers)
    run = trainer(SwitchBits(schedule), max_epochs=1)
    run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert [step for step, _, _ in schedule.recorded] == list(range(20))
    assert schedule.counts.sum() == 60


def test_testing_a_checkpoint_is_no_resume(tmp_path):
    module, schedule = fit(SaveEveryStep(tmp_path))
    state = schedule.state_dict()
    run = trainer(SwitchBits(schedule))
    run.test(module, loader(1), ckpt_path=tmp_path / "on_train_batch_end-002.ckpt", weights_only=True)
    assert schedule.state_dict() == state


# --- what is refused ---


def test_a_period_longer_than_the_training():
    with pytest.warns(UserWarning, match=r"the training has 6 optimizer steps.*Take a period of 6 or less"):
        fit(period=100, **ACCUMULATED)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SwitchBits("maxent"), TypeError, r"SwitchBits\(schedule=str\): a Schedule with a slot for each layer"),
        (lambda: SwitchBits(ArmSchedule(arms=[2, 3])), TypeError, r"schedule=ArmSchedule\): a Schedule with a slot"),
        (lambda: SwitchBits(BitSchedule(layers=["0"]), evaluate=[]), ValueError, "at least one configuration"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "evaluate", "message"),
    [
        ({"layers": ["0", "2", "4", "x"]}, None, "it has 1 layers that the model does not have, such as 'x'"),
        ({"layers": ["0", "2"]}, None, "it leaves out 1 quantized layers of the model, such as '4'"),
        ({"layers": ["0", "2", "4"], "bits": (2, 3, 5)}, None, "it draws 5 bits, and 0 is quantized at 2, 3, 4"),
        ({"layers": ["0", "2", "4"]}, 5, "0 is to have 5 bits, and is quantized at 2, 3, 4"),
        ({"layers": ["0", "2", "4"]}, [2, {"x": 2}], "there is no quantized layer 'x'"),
    ],
)
def test_what_does_not_fit_the_model(settings, evaluate, message):
    model, _ = small()
    with pytest.raises(ValueError, match=message):
        trainer(SwitchBits(Traced(**settings), evaluate=evaluate)).fit(Module(model), loader())


def test_a_model_without_quantized_layers():
    module = Module(nn.Linear(support.WIDTH, support.WIDTH))
    with pytest.raises(ValueError, match=r"call quantize_model\(model\) first"):
        trainer(SwitchBits(Traced(layers=["0"]))).fit(module, loader())


def test_ddp_must_look_for_unused_parameters():
    model, layers = small()
    switch = Switch("SwitchBits", BitSchedule(layers=layers), None)
    switch.find(model)
    switch.check_ddp(True)
    with pytest.raises(RuntimeError, match="ddp_find_unused_parameters_true"):
        switch.check_ddp(False)
    model = nn.Sequential(nn.Linear(support.WIDTH, support.WIDTH))
    switch = Switch("SwitchBits", BitSchedule(layers=quantize_model(model, group_size=32)), None)
    switch.find(add_adapters(model, shared=True))
    switch.check_ddp(False)  # all adapters are used in each step


# --- DDP ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    output = run_job("ddp", folder, world=2, script=support.__file__)
    assert "sync_dist" not in output
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_ranks_have_the_configurations_of_one_process(ranks):
    module, _ = fit(batches=5, max_epochs=2, accumulate_grad_batches=2)
    for rank in ranks:
        assert [row[:2] for row in rank["maxent"]["batches"]] == [row[:2] for row in module.batches]
        assert rank["maxent"]["moved"] == module.moved
    assert len(module.moved) == 6


@pytest.mark.parametrize("mapping", ["maxent", "grad_norm"])
def test_ranks_record_the_same(ranks, mapping):
    one, other = (rank[mapping] for rank in ranks)
    assert one["batches"] != other["batches"]  # their losses are their own
    for key in ("moved", "recorded", "state", "weights"):
        assert one[key] == other[key], key
    both = [by_step(rank["batches"]) for rank in (one, other)]
    means = [sum(both[0][step] + both[1][step]) / 2 / len(both[0][step]) for step in range(6)]
    assert [loss for _, loss, _ in one["recorded"]] == pytest.approx(means)


@pytest.mark.parametrize("mapping", ["maxent", "grad_norm"])
def test_resume_with_ranks_is_exact(ranks, mapping):
    for rank in ranks:
        assert_goes_on(rank[f"{mapping} resumed"], rank[mapping], 7, 4)


def test_plain_ddp_is_refused(ranks):
    assert all("ddp_find_unused_parameters_true" in rank["refused"] for rank in ranks)

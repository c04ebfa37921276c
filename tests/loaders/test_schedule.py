import io
import json
import random

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from samplewise.loaders import schedule as schedules
from samplewise.loaders.schedule import FixedSchedule, Schedule
from samplewise.plugins import ArmSchedule

RARE = 1e-4  # p-value below which draws are called wrong
P = np.array([[0.2, 0.3, 0.5], [0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0, 0.25, 0.75]])
SLOTS = ["a", "b", "c", "d"]


class Custom(Schedule):
    """Given probabilities, the same in each step."""

    def __init__(self, p=P, slots=SLOTS, arms=(10, 20, 40), **options):
        super().__init__(arms=arms, slots=slots, **options)
        self.p = np.asarray(p)

    def probabilities(self, step):
        return self.p


def even(slots=SLOTS, **options):
    return Custom(np.full(3, 1 / 3), slots, **options)


def stack(schedule, steps):
    return np.array([schedule.indices(step) for step in range(steps)])


# --- draws ---


def test_draw_depends_on_seed_and_step_alone():
    first, again = even(seed=5), even(seed=5)
    draws = [first.draw(step) for step in range(50)]
    backwards = [again.draw(step) for step in reversed(range(50))][::-1]
    assert draws == backwards == [first.draw(step) for step in range(50)]
    again.record(0, loss=3.0)
    assert draws == [again.draw(step) for step in range(50)]
    assert draws[0].keys() == set(SLOTS)
    assert {arm for draw in draws for arm in draw.values()} == {10, 20, 40}


def test_other_seeds_and_steps_differ():
    reference = stack(even(seed=0), 100)
    for other in (stack(even(seed=1), 100), np.roll(reference, 1, axis=0)):
        assert 0.2 < (reference == other).mean() < 0.47  # 1/3 by chance, over 400 draws: sd .024


def test_a_slot_does_not_depend_on_the_others():
    every, few = even(), even(["d", "new", "b"])
    for step in range(50):
        assert {s: few.draw(step)[s] for s in "bd"} == {s: every.draw(step)[s] for s in "bd"}


def test_global_generators_are_left_alone():
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = states()
    schedule = Custom()
    for step in range(20):
        schedule.draw(step)
        schedule.record(step, loss=torch.tensor(1.0), scores=[1.0] * 4)
    schedule.load_state_dict(schedule.state_dict())
    assert states() == before


def test_draws_follow_each_slots_probabilities():
    n = 6000
    draws = stack(Custom(), n)
    for slot, p in enumerate(P):
        counts = np.bincount(draws[:, slot], minlength=3)
        assert not counts[p == 0].any()
        assert chisquare(counts[p > 0], n * p[p > 0]).pvalue > RARE
        assert abs(counts / n - p).max() <= 4 * np.sqrt(0.25 / n)


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, 2)])
def test_slots_are_independent(pair):
    draws = stack(Custom(), 4000)[:, pair]
    table = np.zeros((3, 3))
    np.add.at(table, tuple(draws.T), 1)
    assert chi2_contingency(table).pvalue > RARE


@pytest.mark.parametrize("lag", [1, 2])
def test_consecutive_steps_are_independent(lag):
    draws = stack(Custom(), 4000)
    for slot in range(3):
        table = np.zeros((3, 3))
        np.add.at(table, (draws[:-lag, slot], draws[lag:, slot]), 1)
        assert chi2_contingency(table).pvalue > RARE


def test_average_is_of_the_drawn_arms():
    schedule = Custom()
    for step in range(5):
        assert schedule.average(step) == np.mean(list(schedule.draw(step).values()))
    assert Custom(arms="xyz").average(3) == stack(Custom(arms="xyz"), 4)[3].mean()


# --- what is recorded ---


def test_counts_and_running_means():
    schedule, n = Custom(ema=0.9), 40
    counts, losses = np.zeros((4, 3), int), np.full((4, 3), np.nan)
    scores = losses.copy()
    for step in range(n):
        loss, given = step % 7 + 0.5, np.arange(4) + step / 10
        for slot, arm in enumerate(schedule.indices(step)):
            counts[slot, arm] += 1
            for means, value in ((losses, loss), (scores, given[slot])):
                old = means[slot, arm]
                means[slot, arm] = value if np.isnan(old) else 0.9 * old + 0.1 * value
        by_name = dict(zip(reversed(SLOTS), torch.tensor(given).flip(0), strict=True))
        schedule.record(step, loss=loss, scores=given if step % 2 else by_name)
    np.testing.assert_array_equal(schedule.counts, counts)
    np.testing.assert_allclose(schedule.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(schedule.scores, scores, rtol=1e-12)
    assert schedule.counts.sum(1).tolist() == [n] * 4
    assert schedule.step == n


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor([-torch.inf])])
def test_a_bad_loss_counts_in_no_statistic(bad):
    schedule, clean = Custom(), Custom()
    for step in range(6):
        schedule.record(step, loss=bad if step == 3 else 1.0 + step)
        clean.record(step, loss=None if step == 3 else 1.0 + step)
        assert schedule.rejected == (step >= 3)
        assert clean.rejected == 0
    assert schedule.step == 6
    np.testing.assert_array_equal(schedule.counts, clean.counts)
    np.testing.assert_array_equal(schedule.losses, clean.losses)
    assert schedule.histogram().counts.sum() == 6
    assert np.nansum(schedule.histogram().losses) == np.nansum(clean.histogram().losses)


def test_bad_scores_leave_the_mean():
    schedule = Custom(p=[1, 0, 0], slots=["a", "b"])
    schedule.record(0, scores=[1.0, 2.0])
    schedule.record(1, scores=[float("nan"), float("inf")])
    assert schedule.scores[:, 0].tolist() == [1, 2]
    assert schedule.rejected == 0


def test_losses_as_tensors_equal_numbers():
    numbers, tensors = Custom(), Custom()
    for step in range(schedules._FLUSH + 70):
        loss = 1 + (step % 11) / 8
        numbers.record(step, loss=loss)
        value = torch.tensor([loss], requires_grad=True)
        tensors.record(step, loss=value)
        with torch.no_grad():
            value.zero_()  # what was recorded must not change with it
        assert len(tensors._pending) < schedules._FLUSH
    np.testing.assert_allclose(tensors.losses, numbers.losses, rtol=1e-12)
    np.testing.assert_array_equal(tensors.counts, numbers.counts)


def test_histogram_sums():
    schedule, n = Custom(), 300
    losses = np.random.default_rng(0).uniform(1, 2, n)
    averages = [schedule.average(step) for step in range(n)]
    for step, loss in enumerate(losses):
        schedule.record(step, loss=loss)
    found = schedule.histogram()
    assert found.edges[[0, -1]].tolist() == [10, 40]
    np.testing.assert_array_equal(found.counts, np.histogram(averages, found.edges)[0])
    np.testing.assert_allclose(np.nansum(found.losses * found.counts), losses.sum())
    assert np.isnan(found.losses[found.counts == 0]).all()


def test_steps_are_recorded_once_in_order():
    schedule = Custom()
    schedule.record(4, loss=1.0)
    with pytest.raises(ValueError, match=r"Custom.record\(step=4\): step 5 is the next"):
        schedule.record(4, loss=1.0)
    assert schedule.counts.sum() == 4


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        ({"loss": torch.ones(2)}, r"record\(loss\): must be one number"),
        ({"scores": {"a": 1.0}}, r"record\(scores\): must have a value for each slot"),
        ({"scores": [1.0, 2.0]}, r"record\(scores\): must be 4 numbers"),
        ({"scores": torch.ones(4, 2)}, r"record\(scores\): must be 4 numbers"),
    ],
)
def test_a_bad_record_changes_nothing(given, rule):
    schedule = Custom()
    schedule.record(0, loss=1.0)
    before = json.dumps(schedule.state_dict())
    with pytest.raises(ValueError, match=rule):
        schedule.record(1, **{"loss": 1.0, **given})
    assert json.dumps(schedule.state_dict()) == before


# --- state ---


def adaptive(**options):
    given = {"arms": [1, 2, 3], "slots": SLOTS, "mapping": "loss", "seed": 3, **options}
    return ArmSchedule(**given)


def train(schedule, steps):
    draws = []
    for step in steps:
        draws.append(schedule.draw(step))
        schedule.record(step, loss=torch.tensor(1.0 + sum(draws[-1].values())), scores=range(4))
    return draws


def through_json(state):
    return json.loads(json.dumps(state, allow_nan=False))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through", [through_json, through_torch])
@pytest.mark.parametrize("stop", [0, 1, 17, 29])
def test_a_resumed_schedule_goes_on_alike(through, stop):
    whole, first, second = adaptive(), adaptive(), adaptive()
    draws = train(whole, range(30))
    assert train(first, range(stop)) == draws[:stop]
    train(second, range(5))
    second.load_state_dict(through(first.state_dict()))
    assert train(second, range(stop, 30)) == draws[stop:]
    assert second.state_dict() == whole.state_dict()


OTHERS = {
    "slots": {"slots": [*SLOTS[:3], "e"]},
    "order": {"slots": SLOTS[::-1]},
    "arms": {"arms": [1, 2, 4]},
    "costs": {"costs": [1, 2, 9]},
    "seed": {"seed": 4},
    "mapping": {"mapping": "grad_norm"},
    "period": {"period": 77},
    "uniform_share": {"uniform_share": 0.5},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_schedules_state_is_refused(other):
    schedule, source = adaptive(), adaptive(**OTHERS[other])
    train(schedule, range(4))
    train(source, range(9))
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=r"ArmSchedule state: .*other slots, arms, seed or options"):
        schedule.load_state_dict(source.state_dict())
    assert schedule.state_dict() == before


def test_another_version_is_refused():
    schedule = Custom()
    schedule.record(0, loss=1.0)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="version 99 was saved, this release reads 1"):
        schedule.load_state_dict({**before, "version": 99})
    assert schedule.state_dict() == before


def test_reset_forgets():
    schedule, fresh = Custom(), Custom()
    for step in range(9):
        schedule.record(step, loss=float("nan") if step == 2 else 1.0, scores=range(4))
    schedule.reset()
    assert schedule.state_dict() == fresh.state_dict()
    schedule.reset(step=7)
    assert schedule.step == 7


# --- FixedSchedule ---


def test_fixed_cycles():
    lengths = FixedSchedule([128, 256, 128, 512])
    assert [lengths.draw(step) for step in range(9)] == [128, 256, 128, 512] * 2 + [128]
    assert lengths.arms == (128, 256, 512)
    assert lengths.average(3) == 512
    assert lengths.probabilities(1).tolist() == [[0, 1, 0]]


def test_fixed_takes_dictionaries():
    entries = [{"a": 2, "b": 4}, {"b": 3, "a": 2}]
    schedule = FixedSchedule(entries)
    assert [schedule.draw(step) for step in range(4)] == entries * 2
    schedule.record(0)
    schedule.record(1)
    assert schedule.counts.tolist() == [[2, 0, 0], [0, 1, 1]]
    pinned = FixedSchedule([{"a": 3}])
    assert pinned.draw(0) == pinned.draw(1000) == {"a": 3}


def test_fixed_state_is_of_its_entries():
    with pytest.raises(ValueError, match="state"):
        FixedSchedule([1, 2, 2]).load_state_dict(FixedSchedule([1, 2, 1]).state_dict())


@pytest.mark.parametrize("entries", [[{"a": 1}, {"b": 1}], [{"a": 1}, 1], [1, {"a": 1}], [{"a": 1}, {"a": 1, "b": 1}]])
def test_fixed_refuses_other_slots(entries):
    with pytest.raises(ValueError, match=r"FixedSchedule\(entries\): entry 1 has other slots"):
        FixedSchedule(entries)


# --- bad inputs ---

BAD = [
    (lambda: Custom(arms=[]), ValueError, r"Custom\(arms=\[\]\): must hold at least one arm"),
    (lambda: Custom(arms=[1, 2, 1]), ValueError, r"Custom\(arms=\[1, 2, 1\]\): .*none twice"),
    (lambda: Custom(arms=[3, 2, 1]), ValueError, r"Custom\(costs=\[3, 2, 1\]\): .*ascending"),
    (lambda: Custom(arms="abc", costs=[1, 2]), ValueError, r"Custom\(costs=\[1, 2\]\): .*each of the 3 arms"),
    (lambda: Custom(costs=[1, 2, np.nan]), ValueError, r"Custom\(costs=.*finite"),
    (lambda: Custom(slots="abc"), TypeError, r"Custom\(slots='abc'\): must be a sequence of names"),
    (lambda: Custom(slots=[1, 2]), TypeError, r"Custom\(slots=\[1, 2\]\): must be a sequence of names"),
    (lambda: Custom(slots=[]), ValueError, r"Custom\(slots\): must name at least one slot"),
    (lambda: Custom(slots=["a", "a"]), ValueError, r"Custom\(slots\): .*none twice"),
    (lambda: Custom(seed=-1), ValueError, r"Custom\(seed=-1\): seed must be >= 0"),
    (lambda: Custom(seed=1.5), TypeError, r"Custom\(seed=1.5\): seed must be an int"),
    (lambda: Custom(ema=1.0), ValueError, r"Custom\(ema=1.0\): ema is .* \[0, 1\)"),
    (lambda: Custom().draw(-1), ValueError, r"Custom\(step=-1\): step is the number of optimizer steps"),
    (lambda: Custom().draw(True), TypeError, r"Custom\(step=True\): .*must be an int"),
    (lambda: Custom().record(0.5), TypeError, r"Custom\(step=0.5\): step must be an int"),
    (lambda: Custom().reset(step=-3), ValueError, r"Custom\(step=-3\): step must be >= 0"),
    (lambda: FixedSchedule([]), ValueError, r"FixedSchedule\(entries=\[\]\): must be a list of at least one"),
    (lambda: FixedSchedule({"a": 1}), ValueError, r"FixedSchedule\(entries=\{'a': 1\}\): must be a list"),
    (lambda: FixedSchedule("ab"), ValueError, r"FixedSchedule\(entries='ab'\): must be a list"),
]


@pytest.mark.parametrize(("make", "error", "rule"), BAD)
def test_bad_inputs(make, error, rule):
    with pytest.raises(error, match=rule):
        make()


# --- any setting of a step ---


def test_lengths_of_sequences():
    lengths = ArmSchedule(arms=[128, 256, 512, 1024], slots=None, period=100)
    assert lengths.draw(0) == 1024
    assert lengths.draw(50) == 128
    batch = {"input_ids": torch.zeros(2, 1024)}
    seen = {batch["input_ids"][:, : lengths.draw(step)].shape[1] for step in range(100)}
    assert seen == {128, 256, 512, 1024}


def test_ranks_of_adapters():
    layers = [f"layer{n}" for n in range(64)]
    ranks = ArmSchedule(arms=[4, 8, 16], slots=layers, period=100, mapping="adjacent")
    assert set(ranks.draw(0).values()) == {16}
    assert set(ranks.draw(20).values()) == {8, 16}
    assert ranks.target(20) == pytest.approx(16 - 12 * 0.4)


def test_resolutions_with_costs():
    sizes = [(112, 112), (160, 160), (224, 224)]
    schedule = ArmSchedule(arms=sizes, costs=[h * w for h, w in sizes], period=10, mapping="uniform")
    assert {schedule.draw(step) for step in range(60)} == set(sizes)
    assert schedule.average(3) == np.prod(schedule.draw(3))
    assert schedule.target(0) == pytest.approx(np.mean(schedule.costs))

import numpy as np

from samplewise.plugins import Uniform


def test_plan_is_the_whole_data_set_without_a_list():
    sampler = Uniform(1000)
    assert sampler.plan(0, np.random.default_rng(0)).ids == range(1000)
    assert sampler.current_plan.weights is None


def test_each_epoch_is_a_new_order_of_all_ids():
    sampler = Uniform(500, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(500))
    assert first != second
    assert list(Uniform(500, seed=3)) == first
    assert list(Uniform(500, seed=4)) != first

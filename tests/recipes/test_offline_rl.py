"""The offline RL recipe, end to end on the small tasks, and its parts."""

import csv
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from samplewise.recipes import offline_rl
from samplewise.recipes.offline_agents import BC
from samplewise.recipes.offline_arms import ARMS, distribution, make_sampler
from samplewise.recipes.offline_data import load_task
from samplewise.recipes.offline_results import findings, summarise, verdict
from samplewise.recipes.offline_rl import OfflineRlOptions, run
from samplewise.recipes.offline_runs import Run

SMALL = {"steps": 20, "evaluations": 2, "episodes": 3, "hidden": 8, "batch_size": 16, "transitions": 2000, "seeds": 2}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Data of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMPLEWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def options(out, **changes):
    given = {"data": ["lottery", "stitch"], "jobs": 1, "out": str(out), **SMALL, **changes}
    return OfflineRlOptions(**given)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison: the results and the folder."""
    out = tmp_path_factory.mktemp("offline_rl")
    return run(options(out)), out


def test_every_combination_has_every_seed_and_equal_steps(finished):
    results, _ = finished
    names = [(entry["data"], entry["agent"], entry["arm"], entry["seed"]) for entry in results["runs"]]
    assert names == [
        (data, agent, arm, seed)
        for data in ("lottery", "stitch")
        for agent in ("bc", "td3_bc", "iql")
        for arm in ("uniform", "rs2", "rw", "aw", "top")
        for seed in (0, 1)
    ]
    assert {entry["steps"] for entry in results["runs"]} == {20}
    assert all(entry["curve"]["steps"] == [10, 20] for entry in results["runs"])
    assert all(np.shape(entry["curve"]["returns"]) == (2, 3) for entry in results["runs"])
    assert all(entry["draw_seconds"] < entry["train_seconds"] for entry in results["runs"])


def test_numbers_add_up(finished):
    results, _ = finished
    tasks = {data["name"]: data for data in results["data"]}
    scores = {}
    for entry in results["runs"]:
        data, last = tasks[entry["data"]], np.mean(entry["curve"]["returns"][-1])
        assert entry["return"] == pytest.approx(last)
        reach = data["expert_return"] - data["random_return"]
        assert entry["score"] == pytest.approx(100 * (last - data["random_return"]) / reach)
        scores.setdefault((entry["data"], entry["agent"], entry["arm"]), []).append(entry["score"])
    for row in results["summary"]:
        key = (row["data"], row["agent"], row["arm"])
        own, base = np.array(scores[key]), np.array(scores[(row["data"], row["agent"], "uniform")])
        assert (row["score"], row["score_sd"]) == (pytest.approx(own.mean()), pytest.approx(own.std(ddof=1)))
        if row["arm"] == "uniform":
            assert row["gain"] is row["error"] is None
        else:
            assert row["gain"] == pytest.approx((own - base).mean())
            assert row["error"] == pytest.approx((own - base).std(ddof=1) / np.sqrt(2))


def test_distributions_are_those_of_the_samplers(finished):
    results, out = finished
    for data in results["data"]:
        episodes = load_task(data["name"], transitions=2000, say=lambda line: None).episodes
        for arm, figures in data["arms"].items():
            weights, expected = distribution(ARMS[arm], episodes, options(out))
            assert weights.sum() == pytest.approx(1)
            assert sum(figures["shares"]) == pytest.approx(1)
            assert figures["expected_return"] == pytest.approx(weights @ episodes.returns)
            assert figures["ess"] == pytest.approx(1 / np.square(weights).sum())
            assert expected["ess"] == figures["ess"]
        arms = data["arms"]
        assert arms["uniform"]["ess"] == pytest.approx(data["trajectories"])
        assert arms["rs2"]["expected_return"] == pytest.approx(arms["uniform"]["expected_return"])
        assert arms["rw"]["expected_return"] > arms["uniform"]["expected_return"]


def test_files(finished):
    results, out = finished
    assert json.loads((out / "results.json").read_text())["summary"] == results["summary"]
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [entry["score"] for entry in results["runs"]]
    page = (out / "report.html").read_text()
    for sentence in results["findings"]:
        assert sentence.replace("'", "&#x27;") in page
    assert {"lottery-returns.png", "stitch-iql-curves.png", "stitch-bc.png"} <= {
        path.name for path in (out / "plots").iterdir()
    }


def test_several_processes_give_the_same_runs(finished, tmp_path):
    results, _ = finished
    given = {"data": ["lottery"], "agents": ["td3_bc"], "arms": ["uniform", "rw"], "jobs": 2}
    apart = run(options(tmp_path, **given))
    there = {
        (entry["agent"], entry["arm"], entry["seed"]): entry["curve"]
        for entry in results["runs"]
        if entry["data"] == "lottery"
    }
    assert len(apart["runs"]) == 4
    for entry in apart["runs"]:
        assert entry["curve"] == there[entry["agent"], entry["arm"], entry["seed"]]


PARENT = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from samplewise.recipes.offline_runs import _end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600).result()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_workers_end_when_the_run_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        worker = Path("/proc") / parent.stdout.readline().strip() / "stat"
        assert runs(worker)
        parent.kill()
    for _ in range(600):
        if not runs(worker):
            return
        time.sleep(0.1)
    raise AssertionError("the worker goes on")


ONE_FAILS = """
import time
from samplewise.recipes.offline_arms import ARMS
from samplewise.recipes.offline_data import load_task
from samplewise.recipes.offline_rl import OfflineRlOptions
from samplewise.recipes.offline_runs import Job, run_all


def train(agent, task, options, seed, **given):
    if seed == 0:
        raise RuntimeError("seed 0 went wrong")
    time.sleep(600)


if __name__ == "__main__":
    options, task = OfflineRlOptions(jobs=2), load_task("lottery", transitions=2000)
    for run in run_all([Job(task, "bc", ARMS["uniform"], seed, options) for seed in (0, 1)], train, None):
        pass
"""


def test_what_goes_wrong_ends_the_other_trainings(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(ONE_FAILS)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=250)
    assert done.returncode == 1
    assert "seed 0 went wrong" in done.stderr


def runs(stat):
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_arms_differ_only_in_what_they_draw(tmp_path):
    task, given = load_task("stitch", transitions=2000, say=lambda line: None), options(tmp_path)

    def policy(arm, batches):
        sampler = make_sampler(ARMS[arm], task.episodes, batches, 0, given)
        trained = offline_rl.train(BC, task, given, 0, sampler=sampler, observe=sampler.observe)
        return torch.nn.utils.parameters_to_vector(trained.policy.parameters())

    names = ["uniform", "rs2", "rw", "aw", "top"]
    policies = {arm: policy(arm, 160) for arm in names}
    assert torch.equal(policies["uniform"], policy("uniform", 160))
    for one, other in itertools.combinations(names, 2):
        assert not torch.equal(policies[one], policies[other])


def test_prioritised_replay_runs(tmp_path):
    results = run(options(tmp_path, data=["stitch"], agents=["iql"], arms=["uniform", "replay", "replay_aw"], seeds=1))
    assert [row["arm"] for row in results["summary"]] == ["uniform", "replay", "replay_aw"]
    assert [verdict(row) for row in results["summary"]] == ["", "one seed", "one seed"]


def test_a_replay_sampler_uses_the_temporal_difference_errors(tmp_path):
    episodes = load_task("stitch", transitions=2000, say=lambda line: None).episodes
    assert make_sampler(ARMS["replay"], episodes, 100, 0, options(tmp_path)).uses_losses
    assert not make_sampler(ARMS["aw"], episodes, 100, 0, options(tmp_path)).uses_losses


def made(arm, seed, score, data="hopper", agent="bc"):
    nothing = np.zeros((1, 1))
    return Run(data, agent, ARMS[arm], seed, np.array([10]), nothing, np.array([score]), 1.0, 0.1, 0.1)


@pytest.mark.parametrize(
    ("gains", "word"),
    [
        ([3.0, 4.0, 5.0], "better"),
        ([-3.0, -4.0, -5.0], "worse"),
        ([-4.0, 5.0, 0.0], "within its standard error"),
        ([4.0], "one seed"),
    ],
)
def test_verdicts(gains, word):
    runs = [made("uniform", seed, 10.0 + seed) for seed in range(len(gains))]
    runs += [made("aw", seed, 10.0 + seed + gain) for seed, gain in enumerate(gains)]
    rows = summarise(runs)
    assert rows[1]["gain"] == pytest.approx(np.mean(gains))
    assert verdict(rows[1]) == word
    (sentence,) = findings(rows)
    assert sentence.startswith("hopper: Advantage-weighted (AW) against uniform draws: BC ")
    assert f"({word})" in sentence


def test_without_a_uniform_arm_there_are_no_differences():
    rows = summarise([made("aw", 0, 1.0), made("rw", 0, 2.0)])
    assert [row["gain"] for row in rows] == [None, None]
    assert findings(rows) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": []}, "data=[]: needs at least one"),
        ({"data": ["hoper"]}, "data=['hoper']: there are hopper-mixed"),
        ({"data": ["stitch", "stitch"]}, "names a data set twice"),
        ({"agents": ["sac"]}, "agents=['sac']: there are bc, td3_bc, iql"),
        ({"arms": ["best"]}, "arms=['best']: there are uniform"),
        ({"arms": ["replay"]}, "bc has no TD error"),
        ({"alpha": 0.0}, "alpha=0.0: is a temperature"),
        ({"top": 0.0}, "top=0.0"),
        ({"clip_quantile": 0.5}, "clip_quantile=0.5"),
        ({"mix": 1.1}, "mix=1.1"),
        ({"steps": 21}, "steps=21: must be a multiple of evaluations"),
        ({"steps": 0}, "steps=0"),
        ({"evaluations": 0}, "evaluations=0"),
        ({"seeds": 0}, "seeds=0"),
        ({"discount": 1.0}, "discount=1.0"),
        ({"transitions": 10}, "transitions=10"),
        ({"jobs": -1}, "jobs=-1"),
    ],
)
def test_wrong_options_are_named(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=r".") as error:
        options(tmp_path, **changes).validate()
    assert complaint in str(error.value)


def test_jobs_by_default_are_the_cores_on_the_cpu_and_one_elsewhere(monkeypatch):
    monkeypatch.setattr(offline_rl.os, "cpu_count", lambda: 6)
    assert OfflineRlOptions().processes == 6
    assert OfflineRlOptions(accelerator="gpu").processes == 1
    assert OfflineRlOptions(jobs=2).processes == 2


def test_scores_are_between_random_and_expert():
    task = load_task("lottery", transitions=2000, say=lambda line: None)
    assert task.score(np.array([task.random_return])) == pytest.approx(0)
    assert task.score(np.array([task.expert_return])) == pytest.approx(100)

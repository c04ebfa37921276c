"""The prune recipe, end to end on digits, and its parts."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from samplewise.callbacks.report import EpochRecord
from samplewise.recipes import prune
from samplewise.recipes.arms import Arm, make_sampler, make_schedule, plan_arms
from samplewise.recipes.data import load_task
from samplewise.recipes.prune import PruneOptions, accuracy, auc, run
from samplewise.recipes.results import Run, findings, not_learnt, summarise
from support import Lengths, loss_of, without_marked_lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison: the results and the folder."""
    out = tmp_path_factory.mktemp("prune")
    options = PruneOptions(
        data="digits", methods=["uniform", "seta"], epochs=4, seeds=2, batch_size=64, model="mlp", out=str(out)
    )
    return run(options), out


def test_every_arm_has_every_seed(finished):
    results, _ = finished
    names = [(entry["arm"], entry["seed"]) for entry in results["runs"]]
    assert names == [(arm, seed) for seed in (0, 1) for arm in ("uniform", "seta", "uniform@seta", "rs2@seta")]
    assert [row["arm"] for row in results["summary"]] == ["uniform", "seta", "uniform@seta", "rs2@seta"]


def test_controls_take_as_many_steps_as_the_method(finished):
    results, _ = finished
    steps = {(entry["arm"], entry["seed"]): entry["steps"] for entry in results["runs"]}
    for seed in (0, 1):
        assert steps["uniform@seta", seed] == steps["rs2@seta", seed] == steps["seta", seed]
        assert steps["seta", seed] < steps["uniform", seed] == 4 * 22


def test_options_reach_the_samplers():
    options = PruneOptions(
        epochs=7, rs2_ratio=0.3, infobatch_prune=0.4, seta_prune=0.2, seta_groups=6, seta_window=0.5, anneal_from=0.6
    )
    made = {name: make_sampler(Arm(name), 100, 5, options) for name in ("uniform", "rs2", "infobatch", "seta")}
    assert {sampler.seed for sampler in made.values()} == {5}
    assert made["rs2"].ratio == 0.3
    assert (made["infobatch"].epochs, made["infobatch"].prune, made["infobatch"].anneal_from) == (7, 0.4, 0.6)
    seta = made["seta"]
    assert (seta.epochs, seta.prune, seta.groups, seta.window, seta.anneal_from) == (7, 0.2, 6, 0.5, 0.6)
    two = PruneOptions(epochs=3, batch_size=10, devices=2)
    assert len(make_sampler(Arm("rs2", "seta"), 1000, 0, two, 30)) == 10 * 20  # 10 steps an epoch, of 2 x 10 samples


def test_all_arms_of_a_seed_start_from_the_same_weights(monkeypatch):
    starts = []

    def remember(self):
        starts.append(torch.cat([p.detach().flatten() for p in self.network.parameters()]).clone())

    monkeypatch.setattr(prune.Classifier, "on_train_start", remember, raising=False)
    options = PruneOptions(data="digits", epochs=1, seeds=2, methods=["uniform", "seta"], controls=["uniform"])
    monkeypatch.setattr(prune, "write_results", lambda *args, **options: {})
    run(options)
    assert len(starts) == 6
    assert all(torch.equal(start, starts[0]) for start in starts[:3])
    assert all(torch.equal(start, starts[3]) for start in starts[3:])
    assert not torch.equal(starts[0], starts[3])


def test_a_control_has_the_methods_rates_step_for_step():
    ends, epochs = [5, 7, 16], 3
    sampler = Lengths(160, lengths=[50, 20, 90])
    rates = []
    for method in ([], ends):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = make_schedule(optimizer, sampler, epochs, method)
        sampler.set_epoch(epochs)  # any other, so that epoch 0 is begun anew
        own = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            for ids in torch.tensor(list(sampler)).split(10):
                own.append(optimizer.param_groups[0]["lr"])
                sampler.observe(ids, loss_of(ids))
                optimizer.step()
                schedule.step()
        rates.append(own)
    assert len(rates[0]) == ends[-1]
    assert rates[1] == pytest.approx(rates[0])


def test_numbers_add_up(finished):
    results, _ = finished
    for entry in results["runs"]:
        for key in ("samples", "steps", "seconds", "plan_seconds", "observe_seconds"):
            assert entry[key] == pytest.approx(sum(epoch[key] for epoch in entry["epochs"]))
        assert entry["seconds"] > entry["observe_seconds"] > 0
        assert 0.3 < entry["score"] <= 1
    uniform, seta = (results["summary"][index] for index in (0, 1))
    assert uniform["samples"] == 4 * 1348
    assert uniform["fewer_samples"] == 0
    assert seta["samples"] == np.mean([entry["samples"] for entry in results["runs"] if entry["arm"] == "seta"])
    scores = {entry["arm"]: [] for entry in results["runs"]}
    for entry in results["runs"]:
        scores[entry["arm"]].append(entry["score"])
    paired = np.subtract(scores["seta"], scores["uniform"])
    assert seta["vs_uniform"] == pytest.approx(paired.mean())
    assert seta["vs_uniform_sd"] == pytest.approx(paired.std(ddof=1))
    assert seta["vs_equal_steps"] == pytest.approx(np.subtract(scores["seta"], scores["uniform@seta"]).mean())


def test_curve_of_a_method_ends_at_its_score(finished):
    results, _ = finished
    for entry in results["runs"]:
        metrics = [epoch["metrics"] for epoch in entry["epochs"]]
        if entry["equal_steps_to"] is None:
            assert metrics[-1]["val_accuracy"] == pytest.approx(entry["score"])
            assert all(metrics)
        else:
            assert not any(metrics)


def test_files(finished):
    results, out = finished
    assert json.loads((out / "results.json").read_text()) == results
    assert results["version"] == 1
    assert results["options"]["epochs"] == 4
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [entry["score"] for entry in results["runs"]]
    with (out / "summary.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [row["arm"] for row in results["summary"]]


def test_report_is_one_page_with_all_pictures_and_no_link(finished):
    results, out = finished
    html = (out / "report.html").read_text()
    pictures = {path.stem for path in (out / "plots").iterdir()}
    assert {"kept", "losses", "coverage", "learning", "scores", "time", "dropped-by-loss"} <= pictures
    assert html.count("data:image/png;base64,") == len(pictures)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", html)
    assert not re.findall(r"https?:|//|<script|<link|@import|url\(", rest)
    for sentence in results["findings"]:
        assert sentence in rest
    for row in results["summary"]:
        assert row["label"] in rest
        assert f"{row['mean']:.4f} ± {row['sd']:.4f}" in rest


def test_ends_with_the_table_and_the_reports_path(tmp_path, capsys):
    options = PruneOptions(data="digits", methods=["uniform"], epochs=1, seeds=1, model="mlp", out=str(tmp_path))
    threads = torch.get_num_threads()
    run(options)
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert "accuracy" in "".join(lines)
    assert any(line.startswith("uniform ") for line in lines)
    assert lines[-1].endswith(f"Report: {(tmp_path / 'report.html').resolve()}")


def test_runs_repeat_exactly_and_share_initial_weights(tmp_path):
    task = load_task("digits", train_size=300)
    options = PruneOptions(epochs=1, batch_size=64, model="mlp")
    scores = []
    for _ in range(2):
        sampler = make_sampler(Arm("uniform"), 300, 3, options)
        scores.append(prune.train(task, options, 3, sampler=sampler, observe=sampler.observe))
    assert scores[0] == scores[1]


def test_without_the_marked_lines_a_plain_training_script_remains():
    with without_marked_lines(prune) as plain:
        score = plain.train(load_task("digits"), PruneOptions(epochs=5, batch_size=64, lr=0.02, model="mlp"), 0)
    assert score > 0.9


def test_validate_lists_all_errors_at_once():
    options = PruneOptions(
        train_size=-1, label_noise=1.0, methods=["uniform", "uniform"], epochs=0, seeds=0, batch_size=0, lr=0.0,
        rs2_ratio=0.0, infobatch_prune=1.0, seta_prune=-0.1, seta_groups=0, seta_window=1.5, anneal_from=2.0,
        devices=0, workers=-1, threads=-1, model="cnn", data="nycflights", controls=["seta"], out=__file__,
    )  # fmt: skip
    with pytest.raises(ValueError, match="epochs=0: must be >= 1") as caught:
        options.validate()
    lines = str(caught.value).splitlines()
    changed = {"train_size", "label_noise", "methods", "epochs", "seeds", "batch_size", "lr", "rs2_ratio"}
    changed |= {"infobatch_prune", "seta_prune", "seta_groups", "seta_window", "anneal_from", "devices", "workers"}
    assert {line.split("=")[0] for line in lines} == changed | {"threads", "model", "controls", "out"}
    with pytest.raises(ValueError, match="epochs=0"):
        run(replace(PruneOptions(), epochs=0))
    PruneOptions().validate()


@pytest.mark.parametrize(
    ("methods", "controls", "names"),
    [
        (["uniform"], ["uniform", "rs2"], ["uniform"]),
        (["uniform", "rs2"], ["uniform", "rs2"], ["uniform", "rs2", "uniform@rs2"]),
        (["seta", "infobatch"], [], ["seta", "infobatch"]),
        (["infobatch"], ["rs2"], ["infobatch", "rs2@infobatch"]),
    ],
)
def test_arms(methods, controls, names):
    assert [arm.name for arm in plan_arms(methods, controls)] == names


def test_equal_step_rs2_plans_enough_batches():
    options = PruneOptions(epochs=3, batch_size=10)
    for steps in (1, 2, 3, 7, 29, 30):
        sampler = make_sampler(Arm("rs2", "seta"), 100, 0, options, steps)
        assert 3 * -(-len(sampler) // 10) >= steps


def test_metrics():
    rng = np.random.default_rng(0)
    scores, y = np.round(rng.normal(size=(500, 2)), 1), rng.integers(0, 2, 500)  # rounded: with ties
    scores[:, 1] += y
    logits, labels = torch.from_numpy(scores), torch.from_numpy(y)
    assert float(auc(logits, labels)) == pytest.approx(roc_auc_score(y, scores[:, 1] - scores[:, 0]), abs=1e-6)
    assert torch.isnan(auc(logits, torch.zeros(500, dtype=torch.int64)))
    assert float(accuracy(torch.tensor([[0.0, 1], [1, 0], [2, 3]]), torch.tensor([1, 1, 1]))) == pytest.approx(2 / 3)


def made(method, equal_to, scores):
    record = EpochRecord(0, 50, 0.5, 1.0, 1.0, 1.0, 0.0, samples=50, steps=5, seconds=1.0)
    return [Run(Arm(method, equal_to), seed, score, [record]) for seed, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([0.80, 0.90], "within one standard deviation of uniform"),
        ([0.60, 0.62], "more than one standard deviation below uniform"),
        ([0.98, 0.99], "more than one standard deviation above uniform"),
    ],
)
def test_findings_say_which_way_it_went(scores, words):
    runs = made("uniform", None, [0.8, 0.9]) + made("seta", None, scores) + made("uniform", "seta", [0.7, 0.8])
    rows = summarise(runs, [Arm("uniform"), Arm("seta"), Arm("uniform", "seta")], 100)
    (sentence,) = findings(rows, "accuracy")
    assert sentence.startswith("SeTa: 50% fewer samples")
    assert words in sentence
    assert f"{np.mean(scores) - 0.75:+.4f} ±" in sentence


def test_a_run_that_did_not_learn_is_named():
    runs = made("uniform", None, [0.8, 0.1]) + made("seta", None, [0.79, float("nan")])
    sentences = not_learnt(runs, "accuracy", 10)
    assert len(sentences) == 2
    assert sentences[0].startswith("Seed 1 of 'Uniform' did not learn (accuracy 0.1000, chance is 0.10)")
    assert not_learnt(made("uniform", None, [0.7]), "auc", 2) == []
    assert len(not_learnt(made("uniform", None, [0.5]), "auc", 2)) == 1


def test_one_seed_has_no_spread_to_judge_by():
    runs = made("uniform", None, [0.8]) + made("seta", None, [0.7])
    (sentence,) = findings(summarise(runs, [Arm("uniform"), Arm("seta")], 100), "accuracy")
    assert "-0.1000 (one seed: no spread to judge it by) against uniform" in sentence

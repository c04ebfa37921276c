"""The quantisation recipe, end to end on a tiny random model and a file of pairs; options; summaries of runs."""

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from language_support import byte_tokenizer, write_language_model
from lightning_support import QUIET

from samplewise.recipes import quant, quant_results
from samplewise.recipes.language_model import load_language_model
from samplewise.recipes.quant import QuantOptions, run
from samplewise.recipes.quant_arms import ARMS
from samplewise.recipes.quant_results import findings, low_averages, summarise, times, verdict
from samplewise.recipes.quant_runs import Run, Score
from samplewise.recipes.responses import pad_left, response_logits, response_losses, response_scores
from samplewise.recipes.text_pairs import Pair, TokenizedPairs
from support import without_marked_lines

pytestmark = QUIET


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quant")
    write_language_model(folder / "model")
    words = ["red", "green", "blue", "black", "white"]
    lines = [{"prompt": f"{n}: {words[n % 5]}", "response": words[(n + 1) % 5] * 2} for n in range(200)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return QuantOptions(
        data=str(folder / "pairs.jsonl"), model=str(folder / "model"), group_size=32, steps=10, period=5, seeds=1,
        batch_size=4, rank=2, lr=1e-2, test_pairs=8, questions=4, search=[6, 3], search_pairs=4,
        out=str(folder / "out"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(settings):
    return run(settings)


def test_every_arm_is_tested_at_every_average_with_equal_steps(results, settings):
    tested = {(row["arm"], row["seed"], row["average"]) for row in results["runs"]}
    trained = {(arm, seed, average) for arm in settings.arms for seed in [0] for average in settings.averages}
    assert tested == trained | {("rtn", 0, average) for average in settings.averages}
    assert {row["steps"] for row in results["runs"] if row["arm"] != "rtn"} == {10}
    assert all(np.isfinite(row["loss"]) and row["perplexity"] == np.exp(row["loss"]) for row in results["runs"])
    assert all(0 <= row["choice_accuracy"] <= 1 and 0 <= row["token_accuracy"] <= 1 for row in results["runs"])
    assert results["model"]["stored_bits"] == 9 + 32 / 32


def test_training_moves_every_arm_away_from_rounding(results):
    rounded = {row["average"]: row["loss"] for row in results["runs"] if row["arm"] == "rtn"}
    for row in results["runs"]:
        assert row["arm"] == "rtn" or row["loss"] != rounded[row["average"]]


def test_what_was_trained_is_what_the_schedules_say(results, settings):
    for name, trained in results["trained"].items():
        averages = trained["averages"]
        assert len(averages) == 10
        if name.startswith("single"):
            assert averages == sorted(averages)
            assert len(set(averages)) == 5
        else:
            assert sum(trained["counts"]) == 10 * results["model"]["layers"]
        if name.startswith("balanced"):
            assert max(averages) == 4  # the wave's beginning


def test_files_hold_the_results(results, settings, tmp_path):
    folder = type(tmp_path)(settings.out)
    assert json.loads((folder / "results.json").read_text())["summary"] == json.loads(json.dumps(results["summary"]))
    with (folder / "summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 5 * 5
    with (folder / "search.csv").open() as file:
        searched = list(csv.DictReader(file))
    assert len(searched) == 9
    assert all(float(row["average"]) <= settings.budget for row in searched)
    assert (folder / "report.html").read_text().count("<img") >= 8
    assert results["search"]["best"]["average"] <= settings.budget + 1e-9


def test_the_same_seed_gives_the_same_results(settings, results, tmp_path):
    again = run(replace(settings, arms=["balanced"], seeds=1, search=[0, 0], out=str(tmp_path)))
    losses = {
        key: [row["loss"] for row in found["runs"] if row["arm"] == "balanced" and row["seed"] == 0]
        for key, found in (("first", results), ("again", again))
    }
    assert losses["first"] == losses["again"]
    assert again["search"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": [4, 2]}, "bits="),
        ({"bits": [2, 9]}, "bits="),
        ({"averages": [1.5]}, "averages=.*from 2 to 4"),
        ({"averages": []}, "averages="),
        ({"budget": 1.9}, "budget=1.9: must be from 2 to 4"),
        ({"group_size": 20}, "group_size=20"),
        ({"arms": []}, "arms="),
        ({"arms": ["best"]}, "arms="),
        ({"steps": 3}, "steps=3"),
        ({"period": 1}, "period=1"),
        ({"search": [0, 5]}, "search="),
        ({"lr": 0.0}, "lr=0.0"),
        ({"seeds": 0}, "seeds=0"),
    ],
)
def test_wrong_options(settings, given, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **given).validate()


# --- responses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch_and_model(settings):
    from transformers import AutoModelForCausalLM

    tokenizer = byte_tokenizer(None)
    pairs = [Pair("one", "12345"), Pair("a longer one", "1"), Pair("x", "123")]
    tokens = TokenizedPairs(pairs, tokenizer, 100)
    return tokens, AutoModelForCausalLM.from_pretrained(settings.model).eval()


def test_losses_are_those_of_each_pair_alone(batch_and_model):
    tokens, model = batch_and_model
    batch = pad_left([tokens[row] for row in range(3)])
    with torch.no_grad():
        together = response_losses(model, batch)
        alone = [
            model(input_ids=tokens[row]["input_ids"][None], labels=tokens[row]["labels"][None]).loss for row in range(3)
        ]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-5)
    losses, hits = response_scores(model, batch)
    counts = [int((tokens[row]["labels"] != -100).sum()) for row in range(3)]
    assert losses.numel() == hits.numel() == sum(counts)
    torch.testing.assert_close(
        torch.stack([part.mean() for part in losses.split(counts)]), together, rtol=1e-4, atol=1e-5
    )
    logits, labels = response_logits(model, batch)
    assert logits.shape[1] == labels.shape[1] == max(counts) + 1  # no logits for prompts alone


# --- summaries --------------------------------------------------------------------------------------------------------


def runs_of(arm, losses, seconds=10.0):
    """A run a seed with one loss for each average 2, 3, 4."""
    scores = [[Score(a, loss, 0.5, 0.25) for a, loss in zip((2, 3, 4), row, strict=True)] for row in losses]
    return [Run(ARMS[arm], seed, row, 10, seconds) for seed, row in enumerate(scores)]


def test_differences_are_paired_by_seed():
    runs = runs_of("uniform", [[3.0, 2.0, 1.0], [4.0, 2.0, 1.0]], 10) + runs_of(
        "balanced", [[2.5, 2.0, 1.2], [3.0, 2.0, 1.2]], 11
    )
    rows = {(row["arm"], row["average"]): row for row in summarise(runs)}
    low = rows["balanced", 2]
    assert low["gain"] == pytest.approx(-0.75)
    assert low["gain_sd"] == pytest.approx(np.std([-0.5, -1.0], ddof=1))
    assert low["error"] == pytest.approx(low["gain_sd"] / np.sqrt(2))
    assert rows["uniform", 2]["gain"] is None
    assert verdict(low["gain"], low["error"]) == "better"
    assert verdict(0.2, 0.0) == verdict(0.2, 0.15) == "worse"
    assert verdict(0.2, 0.3) == "within its standard error"
    assert verdict(0.2, None) == "one seed"
    below = low_averages(runs, 3)
    assert below["gain"] == pytest.approx(-0.75)
    spent = times(runs + runs_of("single", [[1, 1, 1]], 8.0))
    assert {row["arm"]: row["against_single"] for row in spent} == {
        "uniform": 1.25, "balanced": 1.375, "single": 1.0,
    }  # fmt: skip
    text = " ".join(findings(summarise(runs), below, spent, None))
    assert "Below 3 bits, balanced less uniform draws: -0.750" in text
    assert "2: -0.750 (better)" in text
    assert "4: +0.200 (worse)" in text
    assert "balanced: 1.38x the training time of single runs" in text


def test_perplexities_that_say_nothing_are_written_short():
    (row, *_) = summarise(runs_of("rtn", [[16.5, 2.0, 1.0]]))
    assert row["perplexity"] == pytest.approx(np.exp(16.5))
    assert quant_results._cells(row)[2:4] == ["16.500", "1.5e+07"]
    assert quant_results._cells({**row, "perplexity": 9876.54})[3] == "9,876.5"


def test_arms_have_their_own_colours():
    assert [arm.colour for arm in ARMS.values()] == list(range(len(ARMS)))
    assert all(a != b for a, b in pairwise(arm.label for arm in ARMS.values()))


def test_a_training_that_diverged_still_has_results_and_they_are_json(settings, tmp_path):
    given = {"arms": ["balanced"], "seeds": 1, "lr": 1e30, "questions": 0, "search": [3, 0], "out": str(tmp_path)}
    found = run(replace(settings, **given))
    assert found["search"] is None
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["runs"][0]["choice_accuracy"] is None


def test_without_the_marked_lines_a_plain_training_script_remains(settings):
    model, tokenizer = load_language_model(Path(settings.model))
    pairs = TokenizedPairs([Pair(f"{n}: ", str(n)) for n in range(20)], tokenizer, 40)
    batch = pad_left([pairs[row] for row in range(20)])
    with torch.no_grad():
        before = float(response_losses(model.eval(), batch).mean())
    with without_marked_lines(quant) as plain:
        plain.train(model, pairs, replace(settings, lr=1e-2), 20)
    with torch.no_grad():
        assert response_losses(model.eval(), batch).mean() < 0.9 * before

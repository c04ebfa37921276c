"""The recipe of self-generated tokens, end to end on a tiny random model and a file of pairs; scores; summaries."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from language_support import byte_tokenizer, write_language_model
from lightning_support import QUIET

from samplewise.recipes import self_tokens
from samplewise.recipes.language_model import load_language_model
from samplewise.recipes.responses import pad_left, response_losses, response_scores
from samplewise.recipes.self_tokens import SelfTokensOptions, run
from samplewise.recipes.self_tokens_arms import Arm, arms_of
from samplewise.recipes.self_tokens_results import findings, places, summarise
from samplewise.recipes.self_tokens_runs import Run
from samplewise.recipes.self_tokens_scores import Score, by_place, repetition, rouge_l, score
from samplewise.recipes.text_pairs import Pair, TokenizedPairs
from support import without_marked_lines

pytestmark = QUIET
WORDS = ["red", "green", "blue", "black", "white"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_tokens")
    write_language_model(folder / "model")
    pairs = [{"prompt": f"{n}: {WORDS[n % 5]}", "response": WORDS[(n + 1) % 5] * 2} for n in range(120)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return SelfTokensOptions(
        data=str(folder / "pairs.jsonl"), model=str(folder / "model"), betas=[0.5, 1.0], train_pairs=12, epochs=3,
        seeds=2, batch_size=4, rank=2, lr=1e-2, test_pairs=5, max_new_tokens=8, out=str(folder / "out"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def results(settings):
    return run(settings)


def test_every_arm_takes_equal_steps_and_the_timed_ones_as_many_as_their_kind_has_time_for(results):
    rows = {(row["arm"], row["seed"]): row for row in results["runs"]}
    assert len(rows) == 1 + 2 * 7
    for (arm, seed), row in rows.items():
        if arm.startswith("plain-timed"):
            slowest = max(
                one["train_seconds"] for (name, s), one in rows.items() if s == seed and name[:3] == arm[12:15]
            )
            assert row["steps"] == round(9 * max(1, slowest / rows["plain", seed]["train_seconds"]))
        else:
            assert row["steps"] == (0 if arm == "untrained" else 9)


def test_own_tokens_are_refreshed_when_they_are_needed(results):
    found = {name: [figures["epoch"] for figures in rows] for name, rows in results["refreshes"].items()}
    assert found == {
        f"{arm}, seed {seed}": epochs
        for arm, epochs in (("bash-0.5", [1, 2]), ("bash-1", [1, 2]), ("rac", [0, 2]))
        for seed in (0, 1)
    }
    shares = {
        name: [figures["replaced"] for figures in rows] for name, rows in results["refreshes"].items() if "b" in name
    }
    for seed in (0, 1):
        assert shares[f"bash-1, seed {seed}"][1] > shares[f"bash-0.5, seed {seed}"][1] > 0
    rows = {row["arm"]: row for row in results["runs"] if row["seed"] == 0}
    assert all((rows[arm]["refresh_seconds"] > 0) == (arm[:3] in ("bas", "rac")) for arm in rows)


def test_own_tokens_and_corrections_change_what_is_learnt(results):
    losses = {row["arm"]: row["loss"] for row in results["runs"] if row["seed"] == 1}
    assert len({losses[arm] for arm in ("plain", "rs2", "bash-0.5", "bash-1", "rac")}) == 5


def test_the_same_seed_gives_the_same_results(settings, results, tmp_path):
    again = run(replace(settings, arms=["bash", "rac"], betas=[0.5], seeds=1, out=str(tmp_path)))
    first = {row["arm"]: row["loss"] for row in results["runs"] if row["seed"] == 0}
    assert all(row["loss"] == first[row["arm"]] for row in again["runs"] if row["arm"] != "untrained")
    assert all(row["loss_plain"] is None for row in again["summary"])


def test_files_hold_the_results(results, settings, tmp_path):
    folder = type(tmp_path)(settings.out)
    assert json.loads((folder / "results.json").read_text())["runs"] == json.loads(json.dumps(results["runs"]))
    with (folder / "summary.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [
            "untrained", "plain", "rs2", "bash-0.5", "bash-1", "rac", "plain-timed-bash",
            "plain-timed-rac",
        ]  # fmt: skip
    page = (folder / "report.html").read_text()
    assert page.count("<img") == 4
    assert all(answer["reference"] in page and set(answer) > {"untrained", "rac"} for answer in results["answers"])
    assert len(results["answers"]) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arms": []}, "arms="),
        ({"arms": ["best"]}, "arms="),
        ({"arms": ["plain", "plain_timed"]}, "arms=.*needs plain, and bash or rac"),
        ({"betas": [0.0]}, "betas=.*plain is 0"),
        ({"betas": []}, "betas="),
        ({"epochs": 1}, "epochs=1"),
        ({"passes": 2, "rollout": "span"}, "passes=2: are of the parallel"),
        ({"correct_share": 0.0}, "correct_share="),
        ({"clean_share": 1.5}, "clean_share="),
        ({"temperature": -1.0}, "temperature="),
        ({"train_pairs": 3}, "train_pairs=3"),
        ({"attempt_epochs": 0}, "attempt_epochs=0"),
    ],
)
def test_wrong_options(settings, given, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **given).validate()


def test_without_the_marked_lines_a_plain_training_script_remains(settings):
    model, tokenizer = load_language_model(Path(settings.model))
    pairs = TokenizedPairs([Pair(f"{n}: ", str(n)) for n in range(20)], tokenizer, 40)
    batch = pad_left([pairs[row] for row in range(20)])
    with torch.no_grad():
        before = float(response_losses(model.eval(), batch).mean())
    with without_marked_lines(self_tokens) as plain:
        plain.train(model, pairs, replace(settings, lr=1e-2), 20)
    with torch.no_grad():
        assert response_losses(model.eval(), batch).mean() < 0.9 * before


# --- scores -----------------------------------------------------------------------------------------------------------


def test_a_score_is_that_of_answers_made_one_by_one(settings):
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(settings.model), byte_tokenizer(None)
    tests = TokenizedPairs([Pair("one", "12345"), Pair("a longer one", "1"), Pair("x", "123")], tokenizer, 100)
    found = score(model, tests, tokenizer, most=4, batch_size=2, done=lambda count: None)
    right, same, own_losses, losses = [], [], [], []
    for item in (tests[row] for row in range(3)):
        cut = int((item["labels"] != -100).int().argmax())
        target, prompt = item["labels"][cut:], item["input_ids"][:cut]
        answer = model.generate(prompt[None], max_new_tokens=4, do_sample=False, eos_token_id=257, pad_token_id=257)
        own = answer[0, cut:]
        ended = torch.cat([own, torch.full((max(0, len(target) - len(own)),), 257)])[: len(target)]
        own_item = {"input_ids": torch.cat([prompt, ended]), "labels": item["labels"]}
        loss, hits = response_scores(model, pad_left([item]))
        losses.append(loss)
        right.append(hits)
        own_losses.append(response_scores(model, pad_left([own_item]))[0])
        same += [bool(place < len(own) and own[place] == token) for place, token in enumerate(target)]
    assert found.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    assert found.own_loss == pytest.approx(float(torch.cat(own_losses).mean()), rel=1e-4)
    assert found.token_accuracy == float(torch.cat(right).float().mean())
    assert found.own_accuracy == np.mean(same)
    assert sum(row["tokens"] for row in found.places) == len(same)
    assert not model.training


def test_accuracies_by_place():
    rows = by_place(np.array([0, 1, 2, 3, 0, 1]), np.array([1, 1, 0, 1, 0, 1]), np.array([1, 0, 0, 0, 0, 1]))
    assert rows == [
        {"place": 0, "tokens": 2, "reference": 0.5, "own": 0.5},
        {"place": 1, "tokens": 2, "reference": 1.0, "own": 0.5},
        {"place": 2, "tokens": 2, "reference": 0.5, "own": 0.0},
    ]


@pytest.mark.parametrize(
    ("tokens", "share"), [([], 0), ([1, 2, 3], 0), ([1] * 7, 0.75), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)]
)
def test_repetition(tokens, share):
    assert repetition(np.array(tokens)) == pytest.approx(share)


def test_rouge_l_by_hand():
    assert rouge_l(["the cat sat"], ["the cat sat on it"]) == pytest.approx(2 * 1 * 0.6 / 1.6)  # 3 of 3, 3 of 5 words


def made(arm, seed, loss, right, own):
    spread = [{"place": 0.0, "tokens": 4.0, "reference": right, "own": own}]
    excess = (1 - own) / (1 - right) - 1
    found = Score(loss, right, loss + 1, own, excess, own, 0.0, 0.1, spread, ["a"])
    return Run(arm, seed, found, 10, 100.0, 20.0 if arm.beta else 0.0)


def test_differences_are_paired_by_seed():
    plain, bash = Arm("plain", "Plain", "plain", 1), Arm("bash-0.5", "BASH", "bash", 2, 0.5)
    runs = [made(plain, 0, 2.0, 0.5, 0.3), made(plain, 1, 3.0, 0.5, 0.1)]
    runs += [made(bash, 0, 2.5, 0.5, 0.4), made(bash, 1, 3.5, 0.5, 0.2)]
    rows = {row["arm"]: row for row in summarise(runs)}
    row = rows["bash-0.5"]
    assert (row["loss_plain"], row["loss_plain_sd"], row["loss_plain_error"]) == (0.5, 0.0, 0.0)
    assert row["excess_plain"] == pytest.approx(-0.2)  # 1.2 - 1.4 and 1.6 - 1.8
    assert row["refresh_share"] == pytest.approx(0.2)
    assert rows["plain"]["loss_plain"] is row["loss_timed"] is None
    assert places(runs)[1] == pytest.approx(
        {
            "arm": "bash-0.5",
            "place": 0,
            "tokens": 4,
            "reference": 0.5,
            "reference_sd": 0.0,
            "own": 0.3,
            "own_sd": 0.02**0.5,
        }
    )
    text = "\n".join(findings(list(rows.values()), {"plain": "Plain", "bash-0.5": "BASH"}))
    assert text.startswith(
        "BASH (10 steps), less plain fine-tuning (10 steps): better: right in own answers +0.100 ± 0.000, excess of "
        "errors -0.200 ± 0.000, ROUGE-L +0.100 ± 0.000; worse: loss +0.500 ± 0.000, loss after own answers +0.500 ± "
        "0.000; within its standard error: right after references, repeated.\n"
    )
    assert "1.00x the time of plain fine-tuning; 20% of it" in text


def test_arms_are_compared_in_equal_time_with_the_plain_arm_of_their_own_kind():
    plain, bash, rac = (
        Arm("plain", "Plain", "plain", 1),
        Arm("bash-1", "BASH", "bash", 2, 1.0),
        Arm("rac", "RAC", "rac", 3),
    )
    timed = [Arm(f"plain-timed-{kind}", f"As {kind}", "plain_timed", 4, timed=kind) for kind in ("bash", "rac")]
    losses = zip([plain, bash, rac, *timed], [2.0, 3.0, 4.0, 2.5, 3.75], strict=True)
    rows = {row["arm"]: row for row in summarise([made(arm, 0, loss, 0.5, 0.3) for arm, loss in losses])}
    assert [rows[name]["loss_timed"] for name in rows] == [None, 0.5, 0.25, None, None]
    assert [rows[name]["loss_plain"] for name in rows] == [None, 1.0, 2.0, 0.5, 1.75]
    text = findings(list(rows.values()), {name: name for name in rows})
    assert text[2].startswith(
        "plain-timed-bash (10 steps), less plain fine-tuning (10 steps): one seed: loss +0.500, right after"
    )
    assert text[4].startswith("bash-1 (100 s), less plain fine-tuning (100 s): one seed: loss +0.500, right after")


def test_arms_are_as_asked():
    names = [arm.name for arm in arms_of(SelfTokensOptions(arms=["rac", "bash", "plain"], betas=[0.1, 1.0]))]
    assert names == ["plain", "bash-0.1", "bash-1", "rac"]
    timed = [(arm.name, arm.timed) for arm in arms_of(SelfTokensOptions(arms=["plain_timed", "rac", "plain"]))]
    assert timed == [("plain", ""), ("rac", ""), ("plain-timed-rac", "rac")]

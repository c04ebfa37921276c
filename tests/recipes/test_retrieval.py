"""The retrieval recipe, end to end with a tiny encoder, and its parts."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from retrieval_support import write_collection, write_model

from samplewise.loaders.table import Table
from samplewise.plugins.exchange import from_columns, read_run
from samplewise.plugins.selection import Found
from samplewise.recipes import retrieval, retrieval_runs
from samplewise.recipes.corpus import load_collection
from samplewise.recipes.encoder import load_encoder
from samplewise.recipes.retrieval import RetrievalOptions, run
from samplewise.recipes.retrieval_arms import ARMS, bm25_negatives, make_sampler
from samplewise.recipes.retrieval_results import DEPTH, METRICS, Run, findings, measure, summarise
from support import without_marked_lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a collection and of a model."""
    folder = tmp_path_factory.mktemp("made")
    return write_collection(folder / "fruit"), write_model(folder / "model")


def small(made, out, **changes):
    given = {"steps": 6, "seeds": 2, "batch_size": 8, "depth": 10, "negatives": 2, "precision": "32-true", "threads": 1}
    return RetrievalOptions(data=str(made[0]), model=str(made[1]), out=str(out), **(given | changes))


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """A small comparison of all arms: the results and the folder."""
    out = tmp_path_factory.mktemp("retrieval")
    arms = [name for name in ARMS if name != "zero_shot"]
    return run(small(made, out, arms=arms, refresh=2, rs2_ratio=0.5)), out


def test_every_arm_has_every_seed_and_equal_steps(finished):
    results, _ = finished
    names = [(entry["arm"], entry["seed"]) for entry in results["runs"]]
    trained = [name for name in ARMS if name != "zero_shot"]
    assert names == [("zero_shot", 0), *((arm, seed) for seed in (0, 1) for arm in trained)]
    assert [row["arm"] for row in results["summary"]] == list(ARMS)
    assert [len(entry["losses"]) for entry in results["runs"]] == [0] + [6] * (2 * len(trained))
    assert all(np.isfinite(entry["losses"]).all() for entry in results["runs"])


def test_scores_are_those_of_the_run_files(finished, made):
    import ir_measures

    results, out = finished
    collection = load_collection(str(made[0]))
    qrels = {
        query: {collection.document_ids[row]: 1 for row in collection.test.positives[number]}
        for number, query in enumerate(collection.test.ids)
    }
    wanted = {"ndcg_10": ir_measures.nDCG @ 10, "mrr_10": ir_measures.RR @ 10, "recall_100": ir_measures.R @ 100}
    for entry in results["runs"]:
        if entry["seed"] == 0:
            file = list(ir_measures.read_trec_run(str(out / "runs" / f"{entry['arm']}.trec")))
            scores = ir_measures.calc_aggregate(list(wanted.values()), qrels, file)
            for key, metric in wanted.items():
                assert entry[key] == pytest.approx(scores[metric], abs=1e-6)
    ids, _ = read_run(
        out / "runs" / "star.trec", query_names=collection.test.ids, document_names=collection.document_ids
    )
    assert ids.shape == (16, 64)


def test_the_mined_negatives_serve_other_trainers(finished, made):
    _, out = finished
    collection = load_collection(str(made[0]))
    rows = [json.loads(line) for line in (out / "triplets.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(collection.train.positives.values)
    columns = {name: [row[name] for row in rows] for name in ("anchor", "positive", "negative")}
    assert columns["anchor"] == [collection.train.texts[row] for row in collection.train.positives.row_numbers()]
    back = from_columns(columns)
    assert not any(set(back.positives[row]) & {*back.negatives[row].tolist()} for row in range(len(back.queries)))


def test_all_arms_start_from_the_same_weights_and_differ_at_the_end(finished):
    results, _ = finished
    last = {(entry["arm"], entry["seed"]): entry["losses"][-1] for entry in results["runs"] if entry["losses"]}
    assert len(set(last.values())) == len(last)


def test_time_is_counted_where_it_was_spent(finished):
    results, _ = finished
    spent = {entry["arm"]: entry for entry in results["runs"] if entry["seed"] == 0}
    assert all(entry["testing_seconds"] > 0 for entry in spent.values())
    assert spent["zero_shot"]["training_seconds"] == 0 < spent["random"]["training_seconds"]
    for arm in ("zero_shot", "random", "in_batch", "in_batch_random", "in_batch_softmax"):
        assert spent[arm]["mining_seconds"] == spent[arm]["encoding_seconds"] == 0
    shared = results["mining"]["seconds"]
    for arm in ("static_hard", "star", "star_rs2", "star_softmax"):
        assert spent[arm]["mining_seconds"] == shared["mining"]
        assert spent[arm]["encoding_seconds"] == shared["encoding"]
    for arm in ("star_refresh", "adore"):
        assert spent[arm]["encoding_seconds"] > shared["encoding"]
    assert spent["star_refresh"]["mining_seconds"] > shared["mining"]
    assert spent["bm25_hard"]["mining_seconds"] > 0 == spent["bm25_hard"]["encoding_seconds"]


def test_numbers_add_up(finished):
    results, _ = finished
    scores = {arm: [] for arm in ARMS}
    for entry in results["runs"]:
        scores[entry["arm"]].append(entry["ndcg_10"])
    for row in results["summary"]:
        own = scores[row["arm"]]
        assert (row["ndcg_10"], row["seeds"]) == (pytest.approx(np.mean(own)), len(own))
        if row["arm"] in ("zero_shot", "random"):
            assert row["ndcg_10_vs_random"] is None
            continue
        paired = np.subtract(own, scores["random"])
        assert row["ndcg_10_vs_random"] == pytest.approx(paired.mean())
        assert row["ndcg_10_vs_random_sd"] == pytest.approx(paired.std(ddof=1))
        assert row["ndcg_10_sd"] == pytest.approx(np.std(own, ddof=1))


def test_files(finished):
    results, out = finished
    assert json.loads((out / "results.json").read_text()) == results
    with (out / "runs.csv").open() as file:
        assert [float(row["mrr_10"]) for row in csv.DictReader(file)] == [entry["mrr_10"] for entry in results["runs"]]
    with (out / "summary.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == list(ARMS)
    table = Table(out / "negatives")
    assert table["negatives"].shape == (40, 10)
    assert table.version == 1  # STAR with refreshing has one of its own


def test_report_is_one_page_with_all_pictures_and_no_link(finished):
    results, out = finished
    html = (out / "report.html").read_text()
    pictures = {path.stem for path in (out / "plots").iterdir()}
    assert pictures == {*METRICS, "difficulty", "losses", "time"}
    assert html.count("data:image/png;base64,") == len(pictures)
    rest = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]*", "", html)
    assert not re.findall(r"https?:|//|<script|<link|@import|url\(", rest)
    for row in results["summary"]:
        assert row["label"] in rest
    for entry in results["examples"]:
        assert entry["query"] in rest
    assert "(?)" in rest


def test_examples_are_mined_negatives(finished, made):
    results, out = finished
    collection = load_collection(str(made[0]))
    table = Table(out / "negatives")
    assert len(results["examples"]) == 8
    for entry in results["examples"]:
        row = collection.train.texts.index(entry["query"])
        relevant = collection.train.positives[row]
        assert entry["relevant"] == collection.documents[relevant[0]]
        hardest = table["negatives"][row, :3].tolist()
        assert not set(hardest) & set(relevant.tolist())
        assert [negative["document"] for negative in entry["negatives"]] == [collection.documents[d] for d in hardest]


def test_ends_with_the_table_and_the_reports_path(made, tmp_path, capsys):
    threads = torch.get_num_threads()
    run(small(made, tmp_path, arms=["in_batch"], seeds=1, steps=2, precision="bf16-mixed"))
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    assert any("nDCG@10" in line and "Recall@100" in line for line in lines)
    assert any(line.startswith("in_batch ") for line in lines)
    assert lines[-1].endswith(f"Report: {(tmp_path / 'report.html').resolve()}")


def comparison(made, out, **changes):
    options = small(made, out, **changes)
    (out / "runs").mkdir()
    made = retrieval_runs.Comparison(options, retrieval.train, retrieval.train_queries)
    bars = retrieval.Bars(1, quiet=True)
    made.prepare(bars)
    return made, bars


def test_runs_repeat_exactly(made, tmp_path):
    compared, bars = comparison(made, tmp_path)
    runs = [compared.run(ARMS["star"], seed, bars) for seed in (3, 3, 4)]
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].scores == runs[1].scores


@pytest.mark.parametrize(("arm", "count"), [("in_batch", 0), ("random", 2), ("star", 2)])
def test_draws_follow_the_seed_and_the_samplers_epoch(made, tmp_path, monkeypatch, arm, count):
    drawn = []

    class Noted(retrieval.RetrievalDataset):
        def __init__(self, *args, **given):
            super().__init__(*args, **given)
            drawn.append((args[3], given))

    monkeypatch.setattr(retrieval, "RetrievalDataset", Noted)
    compared, bars = comparison(made, tmp_path, steps=2)
    compared.run(ARMS[arm], 5, bars)
    [(negatives, given)] = drawn
    assert (given["count"], given["seed"], given["sampler"].seed) == (count, 5, 5)
    assert negatives is (compared.mined.table if arm == "star" else None)


def test_training_helps_on_what_can_be_learnt(made, tmp_path):
    compared, bars = comparison(made, tmp_path, steps=60, lr=5e-3)
    before = compared.prepare(bars)
    after = compared.run(ARMS["star"], 0, bars)
    assert after.scores["ndcg_10"] > before.scores["ndcg_10"] + 0.1
    assert np.mean(after.losses[-10:]) < 0.7 * np.mean(after.losses[:10])


def test_adore_trains_on_the_index_of_its_first_part(made, tmp_path, monkeypatch):
    compared, bars = comparison(made, tmp_path, adore_share=0.5)
    steps, weights = [], []
    for name in ("train", "train_queries"):
        original = getattr(compared, name)

        def spy(*args, original=original, **given):
            result = original(*args, **given)
            steps.append((args[4], given.get("documents")))
            weights.append(torch.cat([p.detach().flatten() for p in args[0].parameters()]))
            return result

        setattr(compared, name, spy)
    result = compared.run(ARMS["adore"], 0, bars)
    assert [count for count, _ in steps] == [3, 3]
    assert not weights[0].equal(weights[1])
    star = retrieval_runs.copy.deepcopy(compared.pretrained)
    compared.train(
        star, compared.tokenizer, compared.collection, compared.options, 3, arm=ARMS["star"],
        negatives=compared.mined.table, sampler=make_sampler(ARMS["star"], compared.collection.train.positives, 3, 0,
        compared.options),
    )  # fmt: skip
    expected = compared._embed(star, compared.collection.documents, "x", bars)
    torch.testing.assert_close(steps[1][1], expected)
    assert len(result.losses) == 6


def test_what_chooses_the_queries(made):
    positives = load_collection(str(made[0])).train.positives
    options = RetrievalOptions(batch_size=8, rs2_ratio=0.3)
    for name in ("uniform", "rs2", "infobatch", "seta"):
        options.sampler = name
        sampler = make_sampler(ARMS["star"], positives, 11, 5, options)
        assert type(sampler).__name__.lower() == name
        assert sampler.seed == 5
        assert getattr(sampler, "epochs", 3) == 3  # 11 steps of 8 are more than two epochs of 40
        batches = torch.tensor(list(sampler)[: len(sampler) // 8 * 8]).view(-1, 8).tolist()
        for batch in batches:
            relevant = np.concatenate([positives[query] for query in batch])
            assert len(set(relevant.tolist())) == len(relevant)
    options.sampler = "uniform"
    assert make_sampler(ARMS["star_rs2"], positives, 11, 5, options).ratio == 0.3


@pytest.mark.parametrize("name", ["star_softmax", "in_batch_softmax"])
def test_softmax_losses(name):
    """Three queries with two negatives each; document 7 is relevant to queries 0 and 1, 5 to query 2."""
    rng = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(3, 4, generator=rng), torch.randn(9, 4, generator=rng)
    positive_ids = torch.tensor([7, 3, 5])
    negative_ids = torch.tensor([[1, 5], [7, 2], [4, 1]])
    positives = torch.tensor([[7, -1], [3, 7], [5, -1]])
    if name == "in_batch_softmax":
        documents, negative_ids = documents[:3], negative_ids[:, :0]
    batch = {"positive_ids": positive_ids, "negative_ids": negative_ids, "positives": positives}
    ids = [7, 3, 5, *negative_ids.flatten().tolist()]
    expected = []
    for query, relevant in enumerate(({7}, {3, 7}, {5})):
        scores = (documents.double() @ queries[query].double() / 0.5).tolist()
        kept = [score for row, score in enumerate(scores) if row == query or ids[row] not in relevant]
        expected.append(np.log(np.sum(np.exp(kept))) - scores[query])
    losses = ARMS[name].losses(queries, documents, batch, RetrievalOptions(temperature=0.5))
    assert losses.tolist() == pytest.approx(expected, rel=1e-5)


def test_bm25_negatives(made):
    collection = load_collection(str(made[0]))
    found = bm25_negatives(collection, 10)
    assert found.shape == (40, 10)
    for row, text in enumerate(collection.train.texts):
        assert not set(found[row].tolist()) & set(collection.train.positives[row].tolist())
        assert len(set(found[row].tolist())) == 10
        words = set(text.split())
        assert words & set(collection.documents[found[row, 0]].split())  # the first has a word of the query


def test_measure(made):
    test = load_collection(str(made[0])).test
    ids = torch.arange(64).expand(16, 64).clone()
    found = Found(torch.linspace(1, 0, 64).expand(16, 64), ids, torch.zeros(16))
    scores, first = measure(test, [f"d{row}" for row in range(64)], found)
    ranks = np.array([min(test.positives[row]) + 1 for row in range(16)])
    assert first.tolist() == ranks.tolist()
    assert scores["mrr_10"] == pytest.approx(np.where(ranks <= 10, 1 / ranks, 0).mean())
    assert scores["recall_100"] == 1
    nothing = Found(found.scores[:, :1], torch.full((16, 1), int(test.positives.values.max()) - 63 or 1), found.above)
    _, first = measure(test, [f"d{row}" for row in range(64)], nothing)
    assert set(first.tolist()) <= {1, DEPTH + 1}


def test_findings_say_which_way_it_went():
    def runs(name, scores):
        return [
            Run(ARMS[name], seed, dict.fromkeys(METRICS, score), np.array([1]), dict.fromkeys(
                ("training", "encoding", "mining", "testing"), 1.0), [0.0])
            for seed, score in enumerate(scores)
        ]  # fmt: skip

    parts = {"random": [0.5, 0.51, 0.52], "in_batch": [0.52, 0.50, 0.53], "star": [0.6, 0.61, 0.62]}
    every = [run for name, scores in parts.items() for run in runs(name, scores)]
    rows = summarise(every, [ARMS[name] for name in parts])
    lines = findings(rows)
    assert lines[0].startswith("Random negatives: nDCG@10 -0.0067 ± 0.0153 against in-batch negatives (within two")
    assert "+0.1000 ± 0.0000 against random negatives (better)" in lines[2]
    single = findings(summarise([run for run in every if run.seed == 0], [ARMS[name] for name in parts]))
    assert "one seed" in single[2]


def test_without_the_marked_lines_a_plain_training_script_remains(made):
    with without_marked_lines(retrieval) as plain:
        collection = load_collection(str(made[0]))
        encoder, tokenizer = load_encoder(made[1], 16)
        before = encoder(tokenizer(collection.train.texts)) @ encoder(tokenizer(collection.documents)).T
        options = plain.RetrievalOptions(batch_size=8, lr=5e-3, precision="32-true")
        plain.train(encoder, tokenizer, collection, options, 30)
        after = encoder(tokenizer(collection.train.texts)) @ encoder(tokenizer(collection.documents)).T
    relevant = [int(collection.train.positives[row][0]) for row in range(40)]
    ranks = [(scores > scores[range(40), relevant][:, None]).float().sum(1).mean() for scores in (before, after)]
    assert ranks[1] < 0.5 * ranks[0]


def test_validate_lists_all_errors_at_once():
    options = RetrievalOptions(
        documents=-1, arms=["star", "star"], steps=1, seeds=0, batch_size=1, negatives=99, skip=-1, margin=-0.1,
        alpha=0.0, temperature=0.0, lr=0.0, adore_share=1.0, adore_lr=0.0, adore_top_k=0, refresh=0, rs2_ratio=0.0,
        max_length=1, workers=-1, threads=-1, out=__file__,
    )  # fmt: skip
    with pytest.raises(ValueError, match="documents=-1") as caught:
        options.validate()
    named = {line.partition("=")[0] for line in str(caught.value).splitlines()}
    assert named == {
        "documents", "arms", "steps", "seeds", "batch_size", "negatives", "skip", "margin", "alpha", "temperature",
        "lr", "adore_share", "adore_lr", "adore_top_k", "refresh", "rs2_ratio", "max_length", "workers", "threads",
        "out",
    }  # fmt: skip
    RetrievalOptions().validate()

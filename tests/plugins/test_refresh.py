"""Encoding and mining again in a plain loop, on one and on two ranks."""

import datasets
import numpy as np
import pytest
import torch
from negatives_support import DOCUMENTS, POSITIVES, QUERIES, WORDS, dataset, tokenize

from samplewise.loaders import RetrievalDataset, Table, with_ids
from samplewise.plugins import mine_hard_negatives
from samplewise.plugins.refresh import encode, overlap, refresh_hard_negatives
from support import run_ranks

VECTORS = torch.from_numpy(np.random.default_rng(0).normal(size=(2, WORDS, 6)))


def encoder(step, sizes=None):
    def embed(items):
        assert not torch.is_grad_enabled()
        if sizes is not None:
            sizes.append(len(items))
        return VECTORS[step][tokenize(items)].mean(1)

    return embed


def test_encode_keeps_the_order_of_the_items():
    texts = ["x" * (number * 7 % 50) for number in range(45)]
    batches = []

    def lengths(items):
        batches.append([len(item) for item in items])
        return torch.tensor(batches[-1], dtype=torch.bfloat16, requires_grad=True)[:, None]

    out = encode(texts, lengths, batch_size=10)
    assert out[:, 0].tolist() == [len(text) for text in texts]
    assert (out.dtype, out.requires_grad) == (torch.float32, False)
    assert [len(batch) for batch in batches] == [10, 10, 10, 10, 5]
    assert [length for batch in batches for length in batch] == sorted(map(len, texts))  # little padding


def test_encode_takes_anything_with_rows():
    rows = torch.arange(12.0).view(6, 2)
    assert encode(rows, torch.stack, batch_size=4).tolist() == rows.tolist()
    assert encode(rows, lambda items: torch.stack(items).numpy(), batch_size=4).tolist() == rows.tolist()


def test_encode_sorts_dicts_by_their_texts_and_fetches_batches():
    rows = datasets.Dataset.from_dict({"text": ["x" * (number * 7 % 50) for number in range(45)]})
    seen = []

    def lengths(items):
        seen.extend(len(item["text"]) for item in items)
        return torch.tensor([[float(len(item["text"]))] for item in items])

    assert encode(rows, lengths, batch_size=10)[:, 0].tolist() == [len(text) for text in rows["text"]]
    assert seen == sorted(seen)


@pytest.mark.parametrize("given", [torch.ones(2), torch.ones(3, 2), [[1.0]] * 2])
def test_an_encoder_that_gives_something_else(given):
    with pytest.raises(ValueError, match=r"for 2 items; it must give a tensor \(b, E\)"):
        encode(["a", "b"], lambda items: given)


def test_nothing_to_encode():
    with pytest.raises(ValueError, match="nothing to encode"):
        encode([], lambda items: torch.ones(0, 2))


def test_each_refresh_is_a_new_version(tmp_path):
    data = dataset(tmp_path, None)
    table = data.negatives
    first = refresh_hard_negatives(data, encoder(0), top_k=7, batch_size=5, progress=False)
    assert np.isnan(first["overlap"])
    before = table.snapshot()
    second = refresh_hard_negatives(data, encoder(1), top_k=7, progress=False)
    assert table.version == 2
    with torch.no_grad():
        mined = mine_hard_negatives(encoder(1)(DOCUMENTS), encoder(1)(QUERIES), POSITIVES, top_k=7)
    np.testing.assert_array_equal(table["negatives"], mined["negatives"])
    shared = np.mean(
        [len({*a} & {*b}) / 7 for a, b in zip(before.arrays["negatives"], table["negatives"], strict=True)]
    )
    assert second["overlap"] == pytest.approx(shared)
    assert overlap(before, before) == 1.0
    meta = mined.snapshot().meta
    assert (second["removed"], second["margin"], second["padded"]) == (meta["removed"], meta["margin"], 0)


def test_queries_and_documents_may_have_encoders_of_their_own(tmp_path):
    data, sizes = dataset(tmp_path, None), ([], [])
    refresh_hard_negatives(data, encoder(0, sizes[0]), encoder(1, sizes[1]), top_k=7, batch_size=10, progress=False)
    assert sizes == ([10, 10, 3], [10] * 6)


@pytest.mark.filterwarnings("ignore:.*negatives are random")
def test_random_filling_is_no_overlap(tmp_path):
    data = dataset(tmp_path, None)
    for _ in range(2):
        figures = refresh_hard_negatives(data, encoder(0), top_k=7, max_score=-1e9, progress=False)
    assert figures["overlap"] == 0.0
    assert figures["padded"] == 1.0
    assert np.isnan(figures["margin"])


def test_the_table_gets_the_fingerprint_of_the_data(tmp_path):
    refresh_hard_negatives(dataset(tmp_path, None), encoder(0), top_k=7, progress=False)
    with pytest.raises(ValueError, match="fingerprint"):
        RetrievalDataset(QUERIES, [*DOCUMENTS[:-1], "1 2 3"], POSITIVES, Table(tmp_path))


def refresh_on(rank, folder):
    data = dataset(folder, None)
    versions = []
    for step in range(2):
        figures = refresh_hard_negatives(data, encoder(step), top_k=7, batch_size=4, progress=False)
        versions.append((np.array(data.negatives["negatives"]), figures["overlap"], data.negatives.version))
    return versions


def test_two_ranks_mine_what_one_process_mines(tmp_path):
    alone = refresh_on(0, tmp_path / "alone")
    for versions in run_ranks(2, refresh_on, tmp_path / "two"):  # 23 queries: uneven shares
        for (lists, shared, version), (expected, expected_shared, number) in zip(versions, alone, strict=True):
            np.testing.assert_array_equal(lists, expected)
            assert shared == pytest.approx(expected_shared, nan_ok=True)
            assert version == number


def test_a_data_set_without_a_table():
    data = RetrievalDataset(QUERIES, DOCUMENTS, POSITIVES)
    for wrong in (data, with_ids(data)):
        with pytest.raises(TypeError, match="a RetrievalDataset whose negatives are a Table is needed"):
            refresh_hard_negatives(wrong, encoder(0))


def test_what_is_not_given_is_as_it_was_before(tmp_path):
    data = dataset(tmp_path, None)
    settings = {"similarity": "cosine", "relative_margin": 0.125, "ranks": (1, 30), "seed": 5}
    refresh_hard_negatives(data, encoder(0), top_k=7, progress=False, **settings)
    before = data.negatives.snapshot().meta
    refresh_hard_negatives(data, encoder(0), progress=False)
    after = data.negatives.snapshot().meta
    for key in ("top_k", "similarity", "seed", "filters"):
        assert after[key] == before[key]
    assert refresh_hard_negatives(data, encoder(0), progress=False, similarity="cosine")["overlap"] == 1.0
    refresh_hard_negatives(data, encoder(0), progress=False, top_k=9, ranks=(0, None))
    assert data.negatives.snapshot().meta["filters"]["ranks"] == [0, None]
    assert data.negatives["negatives"].shape == (len(QUERIES), 9)


def test_many_random_negatives_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="161 of 161 negatives are random, since so few documents pass the filters"):
        refresh_hard_negatives(dataset(tmp_path, None), encoder(0), top_k=7, max_score=-1e9, progress=False)

"""The encoder: pooling, chunks, tokens, and where a model comes from."""

import copy
import pickle

import pytest
import torch
from retrieval_support import write_model

from samplewise.recipes.assets import AssetError
from samplewise.recipes.encoder import embed, find_model, load_encoder

TEXTS = ["red apple", "old", "a boat that is green", "new engine that is small", "cold cold cold cold cold cold cold"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return load_encoder(folder, 16)


def test_tokens(loaded):
    _, tokenizer = loaded
    tokens = tokenizer(TEXTS)
    assert sorted(tokens) == ["attention_mask", "input_ids"]
    assert tokens["attention_mask"].sum(1).tolist() == [4, 3, 7, 7, 9]
    assert tokens["input_ids"].shape == (5, 9)
    assert pickle.loads(pickle.dumps(tokenizer))(TEXTS)["input_ids"].equal(tokens["input_ids"])


def test_long_texts_are_cut(folder):
    _, tokenizer = load_encoder(folder, 5)
    assert tokenizer(TEXTS)["attention_mask"].sum(1).tolist() == [4, 3, 5, 5, 5]


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_embeddings_are_means_over_the_tokens_whatever_the_chunks(loaded, chunk):
    encoder, tokenizer = copy.deepcopy(loaded)
    encoder.chunk = chunk
    with torch.no_grad():
        found = encoder(tokenizer(TEXTS))
        for text, row in zip(TEXTS, found, strict=True):
            states = encoder.body(**tokenizer([text])).last_hidden_state[0]
            expected = states.mean(0) / states.mean(0).norm()
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_chunks(loaded):
    gradients = []
    for chunk in (2, 64):
        encoder, tokenizer = copy.deepcopy(loaded)
        encoder.chunk = chunk
        target = torch.linspace(-1, 1, 32)
        (encoder(tokenizer(TEXTS)) * torch.arange(1, 6)[:, None] @ target).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_embed_gives_the_same_in_evaluation_mode_and_tells_how_far_it_is(loaded):
    encoder, tokenizer = copy.deepcopy(loaded)
    encoder.train()
    seen = []
    texts = TEXTS * 100
    found = embed(encoder, tokenizer, texts, device="cpu", mixed=False, watch=seen.append)
    assert sum(seen) == len(texts)
    assert not encoder.training
    with torch.no_grad():
        torch.testing.assert_close(found[:5], encoder(tokenizer(TEXTS)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:5], found[-5:], rtol=1e-4, atol=1e-5)
    mixed = embed(encoder, tokenizer, TEXTS, device="cpu", mixed=True, watch=seen.append)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, found[:5], rtol=0.05, atol=0.02)
    assert not mixed.equal(found[:5])


def test_where_a_model_comes_from(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(str(folder)) == folder
    with pytest.raises(AssetError, match="hub model some/name: switched off by HF_HUB_OFFLINE"):
        find_model("some/name", say=lambda line: None)
    with pytest.raises(ValueError, match="no model that transformers can read"):
        load_encoder(tmp_path, 16)

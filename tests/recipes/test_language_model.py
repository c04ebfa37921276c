"""Language models: where they come from, how a GGUF file becomes an ordinary folder, and what is refused."""

import re
import sys

import pytest
import torch
from language_support import byte_tokenizer, write_language_model
from retrieval_support import write_model

from samplewise.recipes import language_model
from samplewise.recipes.assets import MARKER, AssetError
from samplewise.recipes.language_model import Gguf, find_language_model, load_language_model


def quiet(line):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def write_gguf(folder):
    """A random Llama of two layers, as llama.cpp names its weights; the vocabulary is `byte_tokenizer`'s."""
    import gguf

    tokenizer = byte_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"]  # there must be a merge
    file = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    file.add_context_length(64)
    file.add_embedding_length(32)
    file.add_block_count(2)
    file.add_feed_forward_length(64)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10000.0)
    file.add_vocab_size(len(tokens))
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    file.add_token_merges(["a b"])
    file.add_bos_token_id(tokenizer.bos_token_id)
    file.add_eos_token_id(tokenizer.eos_token_id)
    file.add_pad_token_id(tokenizer.pad_token_id)
    file.add_chat_template(tokenizer.chat_template)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for layer in range(2):
        square = {name: (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        sizes = {**square, "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        sizes.update(attn_norm=(32,), ffn_norm=(32,))
        shapes.update({f"blk.{layer}.{name}": shape for name, shape in sizes.items()})
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, values in weights.items():
        file.add_tensor(f"{name}.weight", values.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return weights


def test_loaded_as_it_was_saved(folder):
    from transformers import LlamaForCausalLM

    model, tokenizer = load_language_model(folder)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    saved = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(values.equal(saved[name]) for name, values in model.state_dict().items())
    assert tokenizer("a b")["input_ids"] == byte_tokenizer()("a b")["input_ids"]
    assert tokenizer.chat_template == byte_tokenizer().chat_template


def test_half_precision_is_loaded_as_float32(folder, tmp_path):
    model, tokenizer = load_language_model(folder)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_language_model(tmp_path)[0].dtype == torch.float32


def test_where_a_model_comes_from(folder, cache):
    assert find_language_model(str(folder)) == folder
    with pytest.raises(AssetError, match="hub model some/name: switched off by HF_HUB_OFFLINE"):
        find_language_model("some/name", quiet)


def test_nothing_is_written_to_the_terminal(folder, capfd):
    from transformers.utils import logging

    level = logging.get_verbosity()
    load_language_model(folder)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == level


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_folders_without_a_model(folder, tmp_path, missing):
    for path in folder.iterdir():
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer_config.json").unlink()  # which names a class that would do without a file
    with pytest.raises(
        ValueError, match=rf"model={str(tmp_path)!r}: no language model.*give a folder with config.json"
    ):
        load_language_model(tmp_path)


def test_an_encoder_is_no_language_model(tmp_path):
    with pytest.raises(ValueError, match=r"its weights are no language model's, cls.predictions.* missing"):
        load_language_model(write_model(tmp_path))


def test_several_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 GGUF files \(a.gguf, b.gguf\); give a folder with one of them"):
        find_language_model(str(tmp_path))


def test_a_gguf_file_is_converted_once(tmp_path, cache, capfd):
    pytest.importorskip("gguf")
    weights, lines = write_gguf(tmp_path), []
    converted = find_language_model(str(tmp_path), lines.append)
    assert capfd.readouterr() == ("", "")
    assert converted.parent == cache
    assert {"config.json", "model.safetensors", "tokenizer.json", MARKER} <= {path.name for path in converted.iterdir()}
    assert lines[-1].startswith(f"tiny: from conversion of {tmp_path / 'tiny.gguf'}, into {converted}")
    model, tokenizer = load_language_model(tmp_path, lines.append)  # by way of the cache
    assert lines[-1].startswith(f"tiny: cached in {converted}")
    assert [path.name for path in cache.iterdir()] == [converted.name]
    assert model.config.num_hidden_layers == 2
    assert not hasattr(model.config, "quantization_config")
    torch.testing.assert_close(model.model.embed_tokens.weight.data, weights["token_embd"])
    torch.testing.assert_close(model.model.layers[1].mlp.down_proj.weight.data, weights["blk.1.ffn_down"])
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert torch.isfinite(model(**tokenizer("a", return_tensors="pt")).logits).all()


def test_a_changed_file_is_converted_again(tmp_path, cache, monkeypatch):
    converted = []

    def fetch(self, folder):
        converted.append(self)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(Gguf, "fetch", fetch)
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = find_language_model(str(tmp_path), quiet)
    assert find_language_model(str(tmp_path), quiet) == first
    file.write_bytes(b"another")
    assert find_language_model(str(tmp_path), quiet) != first
    assert [source.size for source in converted] == [3, 7]


def test_a_file_that_is_broken_leaves_nothing_behind(tmp_path, cache):
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(AssetError, match=r"broken could not be had(.|\n)*conversion of .*broken.gguf: \w+"):
        find_language_model(str(tmp_path), quiet)
    assert list(cache.iterdir()) == []


def test_packages_that_are_missing_are_named(tmp_path, cache, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    find_spec = language_model.importlib.util.find_spec
    monkeypatch.setattr(
        language_model.importlib.util, "find_spec", lambda name: find_spec(name) if name != "gguf" else None
    )
    with pytest.raises(AssetError, match="reading it needs more packages: pip install gguf\n"):
        find_language_model(str(tmp_path), quiet)


# --- for real ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_smallest_smollm2_answers(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("SAMPLEWISE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        folder = find_language_model("smollm2-135m-instruct", quiet)
    except AssetError as error:
        if not re.search(r"Could not|No matching|[Cc]onnection|[Rr]esol|timed out", str(error)):
            raise
        pytest.skip(f"no registry answers: {error}")
    model, tokenizer = load_language_model(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    text = "def f(x):\n    return x  # 1 , 2 .\n\tn't"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert "gguf" in sys.modules

"""The README's code runs as it stands, given a data set, a model and an optimizer."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from bits_support import tiny_llama
from language_support import byte_tokenizer, write_language_model
from negatives_support import WORDS, texts, tokenize
from torch.utils.data import DataLoader, TensorDataset

from samplewise.plugins.multi_bit import MultiBitLinear
from samplewise.recipes.responses import pad_left
from samplewise.recipes.text_pairs import Pair, TokenizedPairs

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Lightning writes its logs there
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    model = torch.nn.Linear(4, 2)
    return {
        "torch": torch,
        "F": F,
        "train_set": TensorDataset(x, (x[:, 0] > 0).long()),
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "__name__": "readme",
    }


def test_there_are_the_fourteen_examples():
    assert len(BLOCKS) == 14


def test_plain_loop_and_lightning(names):
    exec(BLOCKS[0], names)
    plain = names["sampler"]
    assert plain.ledger.seen.all()
    assert plain.epoch == 2
    assert int(plain.ledger.column("count").sum()) < 3 * 200
    exec(BLOCKS[1], names)
    assert names["sampler"].ledger.seen.all()
    assert names["trainer"].current_epoch == 3
    before = names["sampler"].ledger.updates
    exec(BLOCKS[2], names)
    assert names["sampler"].ledger.updates == before + len(names["loader"])
    assert names["sampler"].ledger.column("score").isfinite().any()


def test_hard_negatives(names):
    exec(BLOCKS[0], names)  # its imports
    words = torch.nn.EmbeddingBag(WORDS, 8)
    names |= {"queries": texts(64, 0), "documents": texts(200, 1), "positives": [[row, row + 64] for row in range(64)]}
    names |= {"encoder": words, "tokenize": tokenize, "embed": lambda items: words(tokenize(items))}
    names["optimizer"] = torch.optim.SGD(words.parameters(), lr=0.1)
    before = words.weight.detach().clone()
    exec(BLOCKS[3], names)
    assert names["table"]["negatives"].shape == (64, 50)
    assert names["sampler"].ledger.seen.all()
    assert (words.weight != before).any()


def test_offline_rl(names, capsys):
    generator = torch.Generator().manual_seed(0)
    ends = torch.arange(1, 401) % 20 == 0
    names |= {"observations": torch.randn(400, 4, generator=generator), "actions": torch.ones(400, 2)}
    names |= {"rewards": torch.randn(400, generator=generator), "terminals": torch.zeros(400, dtype=torch.bool)}
    names |= {"timeouts": ends, "policy": names["model"]}
    exec(BLOCKS[4], names)
    assert "expected_return" in capsys.readouterr().out
    sampler, data = names["sampler"], names["data"]
    assert sampler.ledger.updates == 2000
    drawn = np.add.reduceat(sampler.ledger.column("count").numpy(), data.offsets[:-1])
    assert drawn.sum() == 512_000
    assert drawn[data.returns.argmax()] > drawn[data.returns.argmin()]


def test_one_run_for_every_bit_width(names):
    model = tiny_llama()
    tokens = torch.randint(0, 97, (4, 2, 8)).unbind()
    names |= {"language_model": model, "batches": tokens[:3], "validation": tokens[3]}
    exec(BLOCKS[5], names)
    assert names["schedule"].step == 3
    assert names["found"].average.max() <= 2.5
    assert not any(isinstance(module, MultiBitLinear) for module in names["plain"].modules())


def test_the_models_own_tokens(names):
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(write_language_model(Path("model"))), byte_tokenizer(None)
    data = TokenizedPairs([Pair(f"{n}", "abcdefgh"[: 2 + n % 6]) for n in range(40)], tokenizer, 64)
    names |= {"language_model": model, "tokenizer": tokenizer, "data": data, "pad": pad_left}
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(BLOCKS[6], names)
    assert names["buffer"].version == 2  # nothing is replaced in the first epoch
    assert names["sampler"].ledger.seen.all()
    names["module"] = torch.nn.Module()
    names["module"].model = model
    exec(BLOCKS[7], names)
    assert names["trainer"].max_epochs == 3
    names["mixer"].set_epoch(0)
    exec(BLOCKS[8], names)
    names["trainer"].train()
    assert names["mixer"].epoch == 2
    assert names["buffer"].version >= 4
    exec(BLOCKS[9], names)
    assert names["attempts"].version == 1
    labels = next(iter(names["loader"]))["labels"]
    assert labels.shape[1] > 20  # a request is in some rows


def test_everywhere_people_train(names):
    from transformers import AutoModelForCausalLM

    names |= {"language_model": AutoModelForCausalLM.from_pretrained(write_language_model(Path("model")))}
    pairs = [Pair(f"{n}", "abcdefgh"[: 2 + n % 6]) for n in range(40)]
    names |= {"data": TokenizedPairs(pairs, byte_tokenizer(None), 64), "pad": pad_left}
    exec(BLOCKS[10], names)
    assert names["trainer"].state.global_step == 15
    assert names["sampler"].ledger.seen.all()
    names["DataLoader"] = DataLoader
    exec(BLOCKS[11], names)
    assert names["sampler"].epoch == 2
    assert names["sampler"].ledger.seen.all()
    names["shards"] = [f"{shard}.tar" for shard in range(4)]
    for shard in range(4):
        with wds.TarWriter(f"{shard}.tar") as writer:
            for row in range(shard, 200, 4):
                x, y = names["train_set"][row]
                writer.write({"__key__": f"row-{row}", "x.npy": x.numpy(), "y.cls": int(y)})
    exec(BLOCKS[12], names)
    assert names["sampler"].epoch == 2
    assert names["sampler"].ledger.seen.all()
    assert int(names["sampler"].ledger.column("count").sum()) < 3 * 200


def test_a_method_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text(BLOCKS[13])  # a module: the contract pickles the sampler
    monkeypatch.syspath_prepend(tmp_path)
    assert len(importlib.import_module("my_method").HardestHalf(10)) == 5

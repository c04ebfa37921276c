"""What the tests of RefreshSelfTokens in Lightning and under the HF Trainer share: pairs, a model, a run's traces."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from language_support import byte_tokenizer

from samplewise.recipes.text_pairs import Pair, TokenizedPairs

SIZE, BATCH, BATCHES, EPOCHS = 10, 4, 3, 3  # the last batch has two
TOKENIZER = byte_tokenizer(None)
PAIRS = [Pair(f"{row}+{row}", f"is {2 * row}, I think" + "!" * (row % 3)) for row in range(SIZE)]
DATA = TokenizedPairs(PAIRS, TOKENIZER, 64)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=128, tie_word_embeddings=True, **sizes)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


class TokenRun:
    """A training with ``buffer``, ``target``, ``callback`` and ``trainer``: what it leaves behind."""

    buffer: Any
    target: Any
    callback: Any
    trainer: Any

    @property
    def weights(self):
        return b"".join(value.detach().numpy().tobytes() for value in self.trainer.model.parameters())

    @property
    def moments(self):
        return [(row["version"], row["step"], row["epoch"]) for row in self.callback.history]

    def version(self, number, name):
        (folder,) = self.buffer.table.path.glob(f"version-{number}-*")
        return np.load(folder / f"{name}.npy")

    def settings(self, number):
        """What a version was generated with."""
        (about,) = self.buffer.table.path.glob(f"version-{number}-*/version.json")
        return json.loads(about.read_text())["meta"]["settings"][str(number)]

    def inputs(self, row, epoch, version):
        """The sample's tokens, mixed from a version."""
        item = DATA[row]
        places = np.flatnonzero(item["labels"].numpy() != -100)
        begin = self.version(version, "offsets")[row]
        own = self.version(version, "tokens")[begin : begin + len(places)]
        tokens = item["input_ids"].numpy().copy()
        replaced = self.target.replaced(np.array([row]), np.array([len(places)]), epoch, 1)
        tokens[places[replaced]] = own[replaced]
        return tokens.tolist()

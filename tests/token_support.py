"""Toy models, samples of known tokens, and buffers written by hand, for the tests of self-generated tokens."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import torch
from language_support import byte_tokenizer

from samplewise.loaders.ragged import Ragged
from samplewise.plugins import TokenBuffer
from samplewise.plugins.token_buffer import IGNORED, digests, read_sample

TOKENIZER = byte_tokenizer(None)
BOS, END = TOKENIZER.all_special_ids
SPECIAL = np.array([BOS, END])


def item(*pieces: Any) -> dict[str, torch.Tensor]:
    """A sample of pieces of tokens: prompt and response in turn."""
    tokens = [token for piece in pieces for token in piece]
    labels = [token if turn % 2 else IGNORED for turn, piece in enumerate(pieces) for token in piece]
    return {"input_ids": torch.tensor(tokens), "labels": torch.tensor(labels, dtype=torch.int64)}


def make_data(seed: int = 0, count: int = 12) -> list[dict[str, torch.Tensor]]:
    """Ragged samples, most of which end; one without a response, one in two turns, one with a response of one token."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        return [int(token) for token in rng.integers(0, 256, length)]

    data = [item(text(2 + row * 5 % 7), [*text(3 + row * 7 % 11), END]) for row in range(count)]
    data[3] = item(text(4), [])
    data[5] = item([BOS, *text(2)], [*text(4), END], [BOS, *text(3)], [*text(5), BOS, *text(1)])
    data[7] = item(text(3), text(1))
    return data


DATA = make_data()
IDS = np.arange(len(DATA))


def targets_of(data: Any = DATA) -> list[np.ndarray]:
    return [row["labels"][row["labels"] != IGNORED].numpy() for row in data]


def others(targets: Any, step: int = 1) -> list[np.ndarray]:
    """Wrong tokens for all that are not special."""
    return [np.where(np.isin(row, SPECIAL), row, (row + step) % 256) for row in targets]


def write(
    buffer: TokenBuffer, own: Any, replaced: Any = None, *, ids: Any = None, seq2seq: bool = False, **meta: Any
) -> None:
    """The next version, of rows of tokens; of the samples in ``ids``, or of all."""
    samples = [read_sample(one, "", seq2seq=seq2seq) for one in buffer.data]
    targets = Ragged.from_lists([sample.targets for sample in samples])
    notes = {"kind": "tokens", "span": 1, "seed": 0, "seq2seq": seq2seq, "temperature": 0.0, "rollout": "parallel"}
    notes |= {"passes": 1}
    with buffer.writing(targets.lengths, digests(targets.values, targets.offsets), {**notes, **meta}) as writer:
        if not buffer.version:
            writer.fill(np.arange(buffer.size), targets)
        flags = None if replaced is None else np.concatenate(replaced)
        rows = np.arange(buffer.size) if ids is None else np.asarray(ids)
        writer.put(rows, Ragged.from_lists(own), flags)


def pad_right(items: Any) -> dict[str, torch.Tensor]:
    """With the token that ends a text, as many tokenizers do."""
    return {
        name: torch.nn.utils.rnn.pad_sequence([one[name] for one in items], batch_first=True, padding_value=value)
        for name, value in (("input_ids", END), ("labels", IGNORED))
    }


def as_lists(items: Any) -> list[dict[str, list[int]]]:
    return [{name: one[name].tolist() for name in ("input_ids", "labels")} for one in items]


def packed(items: Any) -> Any:
    """One row, of all samples."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening()(as_lists(items))


def encoded(items: Any) -> Any:
    """For models with an encoder and a decoder: the response alone is in the labels."""
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(TOKENIZER, model=_t5(0))(as_lists(items))


def seq2seq_data(data: Any = DATA) -> list[dict[str, torch.Tensor]]:
    """Prompts that end for the encoder, and responses for the decoder."""
    return [
        {"input_ids": torch.cat([row["input_ids"][row["labels"] == IGNORED], torch.tensor([END])]),
         "labels": row["labels"][row["labels"] != IGNORED]}
        for row in data
    ]  # fmt: skip


def llama(seed: int = 0) -> Any:
    """A Llama of two layers; its weights are so large that its tokens vary, and some of them are special."""
    return copy.deepcopy(_llama(seed))


@cache
def _llama(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.3,
        bos_token_id=BOS, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[SPECIAL] *= 1.5
    return model


def t5(seed: int = 0) -> Any:
    return copy.deepcopy(_t5(seed))


@cache
def _t5(seed: int) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(TOKENIZER), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, initializer_factor=3.0,
        decoder_start_token_id=END, pad_token_id=END, eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return T5ForConditionalGeneration(config).eval()


def teacher_forced(model: Any, tokens: Any) -> np.ndarray:
    """What a causal model writes at places 1, 2, ... of one text without padding."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(np.asarray(tokens))[None], use_cache=False).logits[0]
    return logits[:-1].argmax(-1).numpy()


def decoded(model: Any, tokens: Any, context: Any) -> np.ndarray:
    """What a model with an encoder writes at each place of one response, after the context before it."""
    fed = torch.tensor([[model.config.decoder_start_token_id, *np.asarray(context)[:-1].tolist()]])
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(np.asarray(tokens))[None], decoder_input_ids=fed).logits[0]
    return logits.argmax(-1).numpy()


def random_states() -> list[bytes]:
    return [
        repr(random.getstate()).encode(),
        repr(np.random.get_state()).encode(),  # noqa: NPY002  (what libraries must leave alone)
        torch.get_rng_state().numpy().tobytes(),
    ]


def disturbed(model: Any) -> list[bool]:
    """Has each forward draw from all generators; gives of each whether it ran in evaluation, without gradients."""
    seen: list[bool] = []

    def draw(module: Any, args: Any) -> None:
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(1)
        seen.append(not torch.is_grad_enabled() and not any(part.training for part in module.modules()))

    model.register_forward_pre_hook(draw)
    return seen


def tolerance(p: float, count: int) -> float:
    """Five standard errors of a share: passed by chance alone in all but one of 1.7 million cases."""
    return 5 * (p * (1 - p) / count) ** 0.5


def padded(one: dict[str, torch.Tensor], length: int, side: str) -> dict[str, torch.Tensor]:
    """A sample as data sets that pad to a length have it, with an attention mask."""
    rows = {**one, "attention_mask": torch.ones_like(one["labels"])}
    fills = {"input_ids": END, "labels": -100, "attention_mask": 0}
    made = {}
    for name, values in rows.items():
        filling = torch.full((length - len(values),), fills[name])
        made[name] = torch.cat([filling, values] if side == "left" else [values, filling])
    return made

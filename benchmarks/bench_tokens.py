"""Self-generated tokens: a refresh against one forward of the data and against training on it; mixing against padding.

`--hidden`, `--layers`, `--samples`, `--batch` and `--length` change the model and the data; `--device cuda` runs it on
a GPU.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import best_of_each, header, judged, table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from samplewise.loaders import collate_with_ids, with_ids
from samplewise.plugins import SelfTokenMixer, TokenBuffer, refresh_self_tokens

VOCABULARY = 8192


class Vocabulary:
    """What a buffer asks of a tokenizer."""

    all_special_ids = (0, 1)

    def __len__(self) -> int:
        return VOCABULARY

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [str(number) for number in ids]


def made(args: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Samples whose second half is the response, of lengths that differ by up to a half."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(args.samples):
        length = int(torch.randint(args.length // 2, args.length + 1, (), generator=generator))
        tokens = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 2] = -100
        samples.append({"input_ids": tokens, "labels": labels})
    return samples


def padded(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch."""
    fills = {"input_ids": 0, "labels": -100}
    batch = {
        name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=fill)
        for name, fill in fills.items()
    }
    lengths = torch.tensor([len(item["labels"]) for item in items])
    return {**batch, "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long()}


def refreshes(args: argparse.Namespace, data: list[dict[str, Tensor]], folder: Path) -> None:
    """A refresh by each rollout, a forward and an epoch of training; they take turns."""
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 64 * 64, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=VOCABULARY,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    ordered = sorted(data, key=lambda item: len(item["labels"]))
    batches = [padded(ordered[low : low + args.batch]) for low in range(0, len(data), args.batch)]

    def forward() -> None:
        for batch in batches:
            with torch.no_grad():
                logits = model(**{name: batch[name].to(args.device) for name in ("input_ids", "attention_mask")}).logits
            logits.argmax(-1).cpu()

    def train() -> None:
        for batch in batches:
            model(**{name: values.to(args.device) for name, values in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def refresh(name: str, **options: Any) -> Callable[[], object]:
        mixer = SelfTokenMixer(TokenBuffer(folder / name, data, Vocabulary()), beta=0.5)
        options |= {"batch_size": args.batch, "progress": False}
        return lambda: refresh_self_tokens(model, mixer, **options)

    calls: dict[str, Callable[[], object]] = {
        "one forward of the data": forward,
        "an epoch of training": train,
        "parallel": refresh("parallel"),
        "parallel, at a temperature": refresh("temperature", temperature=1.0),
        "parallel, 2 passes": refresh("passes", passes=2),
        "span": refresh("span", rollout="span"),
        "sequential": refresh("sequential", rollout="sequential"),
    }
    seconds = best_of_each(calls, repeat=args.repeat)
    one, epoch = seconds["one forward of the data"], seconds["an epoch of training"]
    targets = {"parallel": 1.2, "parallel, 2 passes": 2.4}
    rows = [
        [name, f"{s:.2f}", judged(s / one, most=targets.get(name)), f"{s / epoch:.2f}x"] for name, s in seconds.items()
    ]
    about = f"{args.samples} samples of up to {args.length} tokens, {args.layers} blocks of {args.hidden}"
    table([about, "s", "to one forward", "to an epoch"], rows)


def mixing(args: argparse.Namespace, data: list[dict[str, Tensor]], folder: Path) -> None:
    """A batch in a worker, with the model's own tokens and without."""
    buffer = TokenBuffer(folder / "parallel", data, Vocabulary())
    items = [with_ids(data)[row] for row in range(args.batch)]
    collates: dict[str, Callable[[Any], Any]] = {
        "padding, with ids": collate_with_ids(padded),
        "padding and mixing": SelfTokenMixer(buffer, beta=0.5, collate=padded),
        "the same, errors' labels masked": SelfTokenMixer(buffer, beta=0.5, collate=padded, after_error="mask_next"),
    }
    calls = {name: lambda collate=collate: collate(items) for name, collate in collates.items()}
    seconds = best_of_each(calls, repeat=5, number=50)
    rows = [[name, f"{s * 1e6:.0f}", f"{s / seconds['padding, with ids']:.1f}x"] for name, s in seconds.items()]
    table([f"a batch of {args.batch}", "us", "to padding"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    header(__doc__)
    samples = made(given)
    with tempfile.TemporaryDirectory() as name:
        refreshes(given, samples, Path(name))
        mixing(given, samples, Path(name))

"""How well a language model answers by itself, and how much worse than after the reference's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samplewise.plugins.token_rollouts import undisturbed, written_answers
from samplewise.recipes.responses import pad_left, response_scores
from samplewise.recipes.text_pairs import IGNORED, TokenizedPairs

GRAM = 4
PLACES = (0, 1, 2, 4, 8, 16, 32, 64, 128)
"""Where the stretches of places in a response begin, of which errors are counted apart."""


@dataclass(frozen=True)
class Score:
    """What a model got on held-out pairs.

    Attributes:
        loss: nats a token of the references, each after the reference's tokens before it (teacher forcing).
        token_accuracy: share of these tokens that are the likeliest.
        own_loss: the same loss after the model's own tokens: the first ones of its answer, as many.
        own_accuracy: share of the references' tokens that the answers have at the same place.
        excess: (1 - own_accuracy) / (1 - token_accuracy) - 1: errors that accumulated, as a share of the others.
        rouge_l: mean F of the longest common subsequence of words of answer and reference.
        exact: share of the answers that are the reference.
        repetition: share of the answers' sequences of four tokens that were in the answer before.
        places: for each stretch of places its first one, tokens, and both accuracies there.
        answers: the texts.
    """

    loss: float
    token_accuracy: float
    own_loss: float
    own_accuracy: float
    excess: float
    rouge_l: float
    exact: float
    repetition: float
    places: list[dict[str, float]]
    answers: list[str]

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))

    def row(self) -> dict[str, float]:
        """The numbers."""
        numbers = {key: value for key, value in asdict(self).items() if isinstance(value, float)}
        return {**numbers, "perplexity": self.perplexity}


def score(
    model: Any, pairs: TokenizedPairs, tokenizer: Any, *, most: int, batch_size: int, done: Callable[[int], None]
) -> Score:
    """Score a model; its answers are greedy.

    Args:
        model: of transformers.
        pairs: held-out ones.
        tokenizer: with a special token, which ends an answer.
        most: tokens of an answer at the most.
        batch_size: pairs at a time.
        done: is told how many more pairs are done.
    """
    losses, hits, own_losses, same, places, answers = [], [], [], [], [], []
    ends = np.array(sorted(tokenizer.all_special_ids))
    with undisturbed(model):
        for low in range(0, len(pairs), batch_size):
            items = [pairs[row] for row in range(low, min(low + batch_size, len(pairs)))]
            found = _scored(model, items)
            losses.append(found[0])
            hits.append(found[1])
            cuts = [int((item["labels"] != IGNORED).int().argmax()) for item in items]
            prompts = [item["input_ids"][:cut].numpy() for item, cut in zip(items, cuts, strict=True)]
            written = written_answers(model, prompts, [], most=most, ends=ends, special=ends)
            answers += written
            mixed = []
            for item, cut, answer in zip(items, cuts, written, strict=True):
                target = item["labels"][cut:]
                context, here = (
                    _own_context(torch.from_numpy(answer), len(target), int(target[-1])),
                    np.arange(len(target)),
                )
                same.append((context == target).numpy() & (here <= len(answer)))
                places.append(here)
                mixed.append({"input_ids": torch.cat([item["input_ids"][:cut], context]), "labels": item["labels"]})
            own_losses.append(_scored(model, mixed)[0])
            done(len(items))
    right, own = torch.cat(hits).numpy(), np.concatenate(same)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    references = tokenizer.batch_decode(
        [row["labels"][row["labels"] != IGNORED] for row in (pairs[i] for i in range(len(pairs)))],
        skip_special_tokens=True,
    )
    return Score(
        loss=float(torch.cat(losses).mean()),
        token_accuracy=float(right.mean()),
        own_loss=float(torch.cat(own_losses).mean()),
        own_accuracy=float(own.mean()),
        excess=float((1 - own.mean()) / (1 - right.mean()) - 1) if right.mean() < 1 else 0.0,
        rouge_l=rouge_l(texts, references),
        exact=float(np.mean([a.strip() == b.strip() for a, b in zip(texts, references, strict=True)])),
        repetition=float(np.mean([repetition(answer) for answer in answers])),
        places=by_place(np.concatenate(places), right, own),
        answers=texts,
    )


def _scored(model: Any, items: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    batch = {name: values.to(model.device) for name, values in pad_left(items).items()}
    losses, right = response_scores(model, batch)
    return losses.cpu(), right.cpu()


def _own_context(answer: Tensor, length: int, end: int) -> Tensor:
    """The first tokens of an answer, filled up with the token that ends one."""
    return torch.cat([answer[:length], torch.full((max(0, length - len(answer)),), end)])


def by_place(places: np.ndarray, right: np.ndarray, own: np.ndarray) -> list[dict[str, float]]:
    """Accuracies by stretches of places, those with at least one token."""
    rows = []
    for low, high in zip(PLACES, [*PLACES[1:], 1 << 62], strict=True):
        inside = (places >= low) & (places < high)
        if inside.any():
            counts = {"place": float(low), "tokens": float(inside.sum())}
            rows.append({**counts, "reference": float(right[inside].mean()), "own": float(own[inside].mean())})
    return rows


def repetition(tokens: np.ndarray) -> float:
    """Share of a text's sequences of `GRAM` tokens that were in it before; 0 for a shorter text.

    >>> repetition(np.array([1, 2, 3, 4, 1, 2, 3, 4]))
    0.2
    """
    grams = [tuple(tokens[i : i + GRAM].tolist()) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F of ROUGE-L, by torchmetrics, in [0, 1]."""
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(list(answers), list(references), rouge_keys="rougeL")["rougeL_fmeasure"])

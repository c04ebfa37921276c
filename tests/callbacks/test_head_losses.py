"""Losses of single samples from logits, labels and the loss of the whole batch."""

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from samplewise.callbacks.head_losses import HeadLosses, in_pieces, of_head, row_by_row, shares, spans, tokens

NUMBERS = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=NUMBERS)


def test_spans_outside_of_the_rows_do_not_count():
    """As in ``ForQuestionAnsweringLoss``, where both ends of a span lie outside."""
    starts, ends = normal(4, 6), normal(4, 6)
    first, last = torch.tensor([1, 99, 5, 0]), torch.tensor([[2], [99], [5], [3]])
    rows = spans(starts, ends, first, last)
    counted = [0, 2, 3]
    both = [
        F.cross_entropy(logits[counted], places.flatten()[counted])
        for logits, places in ((starts, first), (ends, last))
    ]
    assert rows.counts.tolist() == [1, 0, 1, 1]
    assert rows.losses[1] == 0
    assert float((rows.losses * rows.counts).sum() / rows.counts.sum()) == pytest.approx(float(sum(both)) / 2)


@pytest.mark.parametrize("causal", [False, True])
def test_a_soft_prompt_in_front(causal):
    logits, labels = normal(3, 7, 5), torch.tensor([[1, 2, 3, -100], [-100, -100, 0, 4], [4, 3, 2, 1]])
    rows = tokens(logits, labels, causal)
    padded = F.pad(labels, (3, 0), value=-100)
    some, targets = (logits[:, :-1], padded[:, 1:]) if causal else (logits, padded)
    losses = F.cross_entropy(some.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    counts = (targets != -100).sum(1)
    assert rows.counts.tolist() == counts.tolist() == [3, 2, 4]
    torch.testing.assert_close(rows.losses, losses.sum(1) / counts)


def test_end_to_end_is_as_apart():
    """Samples of 4, 1 and 3 tokens, whose first labels do not count, and two tokens that fill up."""
    lengths = torch.tensor([4, 1, 3])
    logits, labels = normal(1, 10, 5), torch.tensor([[-100, 1, 2, 3, -100, -100, 0, 4, -100, -100]])
    rows = tokens(logits, labels, True, lengths)
    assert rows.counts.tolist() == [3, 0, 2]
    for row, (begin, end) in enumerate(((0, 4), (4, 5), (5, 8))):
        alone = tokens(logits[:, begin:end], labels[:, begin:end], True)
        assert float(rows.losses[row]) == pytest.approx(float(alone.losses[0]), rel=1e-6)
    unshifted = in_pieces(torch.arange(10.0), torch.ones(10, dtype=torch.bool), lengths, 0)
    assert (unshifted.losses * unshifted.counts).tolist() == [0 + 1 + 2 + 3, 4, 5 + 6 + 7 + 8 + 9]


HEADS = [
    ((3, 1), torch.tensor([0.1, 0.2, 0.3]), None, "squares"),
    ((3,), torch.tensor([0.1, 0.2, 0.3]), None, "squares"),
    ((3, 2), torch.ones(3, 2), "regression", "squares"),
    ((3, 2), torch.ones(3, 2), None, "binary"),
    ((3, 2), torch.tensor([[0], [1], [1]]), None, "classes"),
    ((3, 2), torch.tensor([0, -100, 1]), "single_label_classification", "classes"),
    ((3, 4, 2), torch.ones(3, 4), None, None),
    ((3, 4, 5, 2), torch.ones(3, 4, 5, dtype=torch.int64), None, None),
    ((3, 2), torch.ones(3, 4), None, None),
]


@pytest.mark.parametrize(("shape", "labels", "problem", "kind"), HEADS)
def test_heads_are_told_apart(shape, labels, problem, kind):
    logits = normal(*shape)
    rows = of_head({"logits": logits}, {"labels": labels}, causal=True, problem=problem)
    if kind is None:
        assert rows is None
        return
    whole = {
        "squares": lambda: F.mse_loss(logits.squeeze(), labels.squeeze()),
        "binary": lambda: F.binary_cross_entropy_with_logits(logits, labels),
        "classes": lambda: F.cross_entropy(logits, labels.flatten()),
    }[kind]()
    assert float((rows.losses * rows.counts).sum() / rows.counts.sum()) == pytest.approx(float(whole), rel=1e-5)


def test_labels_that_are_shifted_already():
    logits, labels = normal(2, 4, 5), torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    moved = F.pad(labels, (0, 1), value=-100)[:, 1:]
    plain, given = ({"labels": labels}, {"labels": labels, "shift_labels": moved})
    first, second = (of_head((None, logits), inputs, causal=True) for inputs in (plain, given))
    assert first.losses.tolist() == second.losses.tolist()
    assert second.counts.tolist() == [3, 3]


def test_each_sample_alone():
    outputs = CausalLMOutput(loss=torch.tensor(1.0), logits=torch.arange(6.0).view(3, 2))
    seen = []

    def function(outputs, names, factor, scale=None):
        seen.append((type(outputs), outputs.loss, names, factor))
        return outputs.logits.sum() * scale, "more"

    losses = row_by_row(function, 3, outputs, ["a", "b", "c"], 7, scale=torch.tensor([[1.0], [2.0], [3.0]]))
    assert losses.tolist() == [1.0, 10.0, 27.0]
    assert seen == [(CausalLMOutput, torch.tensor(1.0), [name], 7) for name in "abc"]


LOSSES, COUNTS = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([4, 1, 3])
WAYS = [
    (LOSSES * COUNTS / 8, None, 1, 1),
    (LOSSES * COUNTS / 20, 20, 1, 2),
    (LOSSES * COUNTS * 3 / 50, torch.tensor(50), 3, 2),
    (LOSSES / 3, 20, 1, 2),
    (LOSSES / 6, torch.tensor([20.0]), 1, 2),
    (LOSSES, None, 1, 2),
]


@pytest.mark.parametrize(("parts", "items", "ranks", "steps"), WAYS)
def test_how_a_loss_is_made_up(parts, items, ranks, steps):
    losses = LOSSES.clone().requires_grad_()
    found, gap = shares(HeadLosses(losses, COUNTS), parts.sum(), items, ranks, steps)
    torch.testing.assert_close(found, parts)
    assert float(gap) < 1e-6
    found.sum().backward()
    torch.testing.assert_close(losses.grad * LOSSES, parts)


def test_a_loss_that_is_made_up_otherwise():
    found, gap = shares(HeadLosses(LOSSES, COUNTS), torch.tensor(10.0), None, 1, 1)
    assert float(gap) == pytest.approx(10 - 7)
    found, _ = shares(HeadLosses(LOSSES, COUNTS), torch.tensor(7.0), 20, 1, 1, means=True)
    torch.testing.assert_close(found, LOSSES / 3)
    found, gap = shares(HeadLosses(LOSSES, COUNTS), torch.tensor(torch.nan), None, 1, 1)
    assert torch.isfinite(found).all()

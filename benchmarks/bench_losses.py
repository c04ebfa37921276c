"""Losses and gradient norms from logits in one pass, against F.cross_entropy and a softmax; forward and backward."""

from functools import partial

import torch
import torch.nn.functional as F
from timing import best_of_each, header, table

from samplewise.cuda_ext.losses import sample_losses

SIZES = [(10, 65_536), (10, 256), (100, 16_384), (1000, 4096), (50_257, 64), (128_256, 32)]


def from_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two results from torch: the loss, then the norm of softmax - onehot."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        return losses, norm(logits.float().softmax(1), labels)


def from_log_softmax(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from one softmax, which both share."""
    logs = logits.float().log_softmax(1)
    losses = F.nll_loss(logs, labels, reduction="none")
    with torch.no_grad():
        return losses, norm(logs.exp(), labels)


def norm(gradient: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    gradient[torch.arange(labels.numel()), labels] -= 1
    return gradient.norm(dim=1)


def step(function, logits: torch.Tensor, labels: torch.Tensor) -> None:
    losses, _ = function(logits, labels)
    torch.autograd.grad(losses.mean(), logits)


def main() -> None:
    header("Losses and gradient norms")
    ways = {"ours": sample_losses, "cross_entropy": from_cross_entropy, "log_softmax": from_log_softmax}
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for classes, batch in SIZES:
            logits, labels = torch.randn(batch, classes).mul_(3).to(dtype), torch.randint(classes, (batch,))
            leaf = logits.clone().requires_grad_()
            turns = {name: partial(way, logits, labels) for name, way in ways.items()}
            turns["loss alone"] = partial(F.cross_entropy, logits, labels, reduction="none")
            turns |= {(name, "step"): partial(step, way, leaf, labels) for name, way in ways.items()}
            ns = {name: s / logits.numel() * 1e9 for name, s in best_of_each(turns, repeat=6).items()}
            best = min(ns["cross_entropy", "step"], ns["log_softmax", "step"])
            rows.append([f"{batch} x {classes}", *(f"{value:.2f}" for value in ns.values())])
            rows[-1].append(f"{best / ns['ours', 'step']:.1f}x")
        columns = ["ours", "cross_entropy + norm", "log_softmax + norm", "loss alone"]
        columns += ["ours, backward", "cross_entropy.., backward", "log_softmax.., backward", "best of torch / ours"]
        table([f"{str(dtype).removeprefix('torch.')}, ns a logit", *columns], rows)


if __name__ == "__main__":
    main()

"""Losses and gradient norms from logits in one pass, against F.cross_entropy and a softmax; forward and backward."""

import torch
import torch.nn.functional as F
from timing import best_of, header, table

from samplewise.cuda_ext.losses import sample_losses

SIZES = [(10, 65_536), (10, 256), (100, 16_384), (1000, 4096), (50_257, 64), (128_256, 32)]


def separately(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same two results from torch: the loss, then the norm of softmax - onehot."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    with torch.no_grad():
        gradient = logits.float().softmax(1)
        gradient[torch.arange(labels.numel()), labels] -= 1
        return losses, gradient.norm(dim=1)


def step(function, logits: torch.Tensor, labels: torch.Tensor) -> None:
    losses, _ = function(logits, labels)
    torch.autograd.grad(losses.mean(), logits)


def main() -> None:
    header("Losses and gradient norms")
    for dtype in (torch.float32, torch.bfloat16):
        rows = []
        for classes, batch in SIZES:
            logits, labels = torch.randn(batch, classes).mul_(3).to(dtype), torch.randint(classes, (batch,))
            forward = [
                best_of(lambda z=logits, y=labels: sample_losses(z, y)),
                best_of(lambda z=logits, y=labels: F.cross_entropy(z, y, reduction="none")),
                best_of(lambda z=logits, y=labels: separately(z, y)),
            ]
            logits.requires_grad_()
            both = [best_of(lambda f=f, z=logits, y=labels: step(f, z, y)) for f in (sample_losses, separately)]
            numbers = [f"{seconds / logits.numel() * 1e9:.2f}" for seconds in forward + both]
            rows.append([f"{batch} x {classes}", *numbers, f"{both[1] / both[0]:.1f}x"])
        name = f"{str(dtype).removeprefix('torch.')}, ns a logit"
        table([name, "ours", "cross_entropy", "+ norm", "ours, backward too", "torch, backward too", "ratio"], rows)


if __name__ == "__main__":
    main()

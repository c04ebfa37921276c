"""What the fine-tuning recipes' scripts share: AdamW with a warm-up, and a trainer of so many steps."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def warmed_adamw(module: LightningModule, *, lr: float, weight_decay: float, steps: int) -> Any:
    """AdamW of the trained weights, as `configure_optimizers` gives it: up over 10 % of the steps, then down to 0."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, warmup = AdamW(trained, lr, weight_decay=weight_decay), max(1, steps // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}


def fit(
    module: LightningModule, loader: Any, options: Any, steps: int, callbacks: Sequence[Callback], **more: Any
) -> None:
    """So many optimizer steps, whatever the epochs' lengths; modes stay, so that what is in evaluation mode is.

    Args:
        module: what to train.
        loader: its batches.
        options: a recipe's, with `accelerator` and `precision`.
        steps: of the optimizer.
        callbacks: of the trainer, and
        **more: of its settings.
    """
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=1,
        precision=options.precision,
        max_epochs=-1,
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **more,
    )
    trainer.fit(module, loader)

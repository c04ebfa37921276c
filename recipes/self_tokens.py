"""Fine-tuning on contexts that hold the model's own tokens, against plain fine-tuning, on a small language model.

    python -m samplewise.recipes.self_tokens            # SmolLM2-135M writes Python functions, 3 seeds, 18 minutes each
    samplewise run self_tokens --data pairs.jsonl --model NAME --accelerator gpu --train_pairs 10000 --epochs 3

Trains low-rank adapters on prompts and responses: plainly, on RS2's shares of the pairs, on contexts in which a growing
share of the reference's tokens are the model's own (BASH, for several shares), and on corrections of the model's own
answers (RAC), all for as many optimizer steps; and plainly twice more, for as long as the slowest BASH and as long as
RAC took, what the model wrote for them included. Then each model answers held-out prompts by itself.

Writes `results.json`, `runs.csv`, `summary.csv`, `places.csv`, `report.html` and `plots/*.png` into `--out`, and prints
tables: perplexity of the references; how many of their tokens the model predicts after the reference, and after its
own tokens, and the excess of errors that is due to its own; ROUGE-L, exact matches and repetitions of its answers; and
the time, with the share of it that went into self-generated tokens.

`Tuner` and `train` are an ordinary training script: delete the lines marked `# samplewise` and it still is one.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import override

from samplewise.callbacks import SamplingCallback  # samplewise
from samplewise.loaders import with_ids  # samplewise
from samplewise.recipes.assets import AssetError
from samplewise.recipes.common import Rule, check_options, surroundings
from samplewise.recipes.fitting import fit, warmed_adamw
from samplewise.recipes.progress import Bars
from samplewise.recipes.responses import pad_left, response_losses
from samplewise.recipes.self_tokens_arms import arms_of
from samplewise.recipes.self_tokens_results import write_results
from samplewise.recipes.self_tokens_runs import Comparison
from samplewise.recipes.text_pairs import TokenizedPairs

Name = Literal["plain", "rs2", "bash", "rac", "plain_timed"]
NAMES: tuple[Name, ...] = get_args(Name)


@dataclass
class SelfTokensOptions:
    """What to compare, on what, and how.

    Args:
        data: doc_to_code, code_to_doc, signature_to_doc (from Python packages), or a .jsonl file with a prompt and a
            response on each line, or a folder with train, validation and test.jsonl
        model: smollm2-135m-instruct, a folder that transformers reads, or a hub name
        arms: what is compared, with the model as it is; plain_timed needs plain
        betas: BASH: shares of the tokens that are replaced in the last epoch, an arm for each
        shape: BASH: how the share grows over the epochs, from 0
        rollout: BASH: how the model's own tokens come about
        passes: BASH: forwards of the parallel rollout
        span: BASH: tokens that are replaced together by the span rollout
        after_error: BASH: labels that leave the loss where a token was replaced by a wrong one
        clean_share: BASH: share of the pairs that stay as they are
        correct_share: RAC: share of the pairs that are corrections
        equal: RAC: what becomes of an attempt that equals the reference
        temperature: of the model's own tokens; 0 takes the likeliest
        refresh_epochs: BASH: epochs from one refresh of the model's own tokens to the next
        attempt_epochs: RAC: epochs from one refresh of the model's attempts to the next; the first is before training
        train_pairs: pairs to train on
        epochs: through them; all arms take as many steps
        seeds: number of repeats; repeat s uses seed s for adapters, draws and the order of the pairs
        batch_size: pairs in a batch
        rank: of the adapters; their alpha is twice that
        lr: highest learning rate, of AdamW with gradients clipped at norm 1; up over 10 % of the steps, then down to 0
        weight_decay: of AdamW
        rs2_ratio: RS2: share of the pairs in an epoch, in (0, 1]
        chat: write pairs as the tokenizer's chat template does, not as plain text
        max_length: longer pairs are left out, in tokens
        test_pairs: held-out pairs
        max_new_tokens: of an answer
        evaluate: test, or validation to try settings out
        accelerator: cpu, gpu or mps
        precision: as Lightning calls it
        threads: threads of torch on the CPU; 0 leaves torch's choice
        out: folder for the results
    """

    data: str = "doc_to_code"
    model: str = "smollm2-135m-instruct"
    arms: list[Name] = field(default_factory=lambda: list(NAMES))
    betas: list[float] = field(default_factory=lambda: [0.25, 0.5])
    shape: Literal["constant", "linear", "exponential", "inverse_sigmoid"] = "linear"
    rollout: Literal["parallel", "sequential", "span"] = "parallel"
    passes: int = 1
    span: int = 8
    after_error: Literal["gold", "mask_next", "mask_replaced"] = "gold"
    clean_share: float = 0.0
    correct_share: float = 0.5
    equal: Literal["skip", "keep"] = "skip"
    temperature: float = 0.0
    refresh_epochs: int = 1
    attempt_epochs: int = 2
    train_pairs: int = 96
    epochs: int = 3
    seeds: int = 3
    batch_size: int = 8
    rank: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    rs2_ratio: float = 0.5
    chat: bool = False
    max_length: int = 48
    test_pairs: int = 48
    max_new_tokens: int = 32
    evaluate: Literal["test", "validation"] = "test"
    accelerator: Literal["cpu", "gpu", "mps"] = "cpu"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int = 0
    out: str = "runs/self_tokens"

    def validate(self) -> None:
        """Check all options.

        Raises:
            ValueError: one line for each option that breaks its rule.
        """
        others = {"bash", "rac"} & set(self.arms)
        rules: list[Rule] = [
            ("arms", bool(self.arms) and set(self.arms) <= set(NAMES), f"must be some of {', '.join(NAMES)}"),
            ("arms", len(set(self.arms)) == len(self.arms), "names an arm twice"),
            (
                "arms",
                "plain_timed" not in self.arms or ("plain" in self.arms and bool(others)),
                "has plain_timed, which needs plain, and bash or rac, whose time it takes",
            ),
            ("betas", bool(self.betas), "needs at least one share"),
            ("betas", all(0 < beta <= 1 for beta in self.betas), "must be shares in (0, 1]; plain is 0"),
            ("betas", len(set(self.betas)) == len(self.betas), "names a share twice"),
            ("passes", self.passes >= 1, "must be >= 1"),
            ("passes", self.passes == 1 or self.rollout == "parallel", "are of the parallel rollout"),
            ("span", self.span >= 1, "must be >= 1"),
            ("clean_share", 0 <= self.clean_share <= 1, "must be in [0, 1]"),
            ("correct_share", 0 < self.correct_share <= 1, "must be in (0, 1]; plain is 0"),
            ("temperature", 0 <= self.temperature < float("inf"), "must be >= 0"),
            ("refresh_epochs", self.refresh_epochs >= 1, "must be >= 1"),
            ("attempt_epochs", self.attempt_epochs >= 1, "must be >= 1"),
            ("train_pairs", self.train_pairs >= self.batch_size, "must be at least a batch"),
            ("epochs", self.epochs >= 2, "must be >= 2: in the first one nothing is replaced"),
            ("batch_size", self.batch_size >= 1, "must be >= 1"),
            ("rank", self.rank >= 1, "must be >= 1"),
            ("lr", self.lr > 0, "must be > 0"),
            ("weight_decay", self.weight_decay >= 0, "must be >= 0"),
            ("rs2_ratio", 0 < self.rs2_ratio <= 1, "is the share of the pairs in an epoch and must be in (0, 1]"),
            ("max_length", self.max_length >= 8, "must be >= 8"),
            ("test_pairs", self.test_pairs >= 1, "must be >= 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "must be >= 1"),
            ("threads", self.threads >= 0, "must be >= 0; 0 leaves torch's choice"),
        ]
        check_options(self, rules)

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cuda" if self.accelerator == "gpu" else self.accelerator


class Tuner(LightningModule):
    """Trains a language model on the responses to prompts."""

    def __init__(self, model: nn.Module, options: SelfTokensOptions, steps: int, sampler: Any):
        super().__init__()
        self.model, self.options, self.steps = model, options, steps
        self.sampler = sampler  # samplewise

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = response_losses(self.model, batch)
        loss: Tensor = losses.mean()
        loss = self.sampler.observe(batch["sample_id"], losses)  # samplewise
        return loss

    @override
    def configure_optimizers(self) -> Any:
        lr, weight_decay = self.options.lr, self.options.weight_decay
        return warmed_adamw(self, lr=lr, weight_decay=weight_decay, steps=self.steps)


def train(
    model: nn.Module,
    pairs: TokenizedPairs,
    options: SelfTokensOptions,
    steps: int,
    *,
    callbacks: Sequence[Callback] = (),
    sampler: Any = None,
    data: Any = None,
    collate: Any = None,
    refresh: Callback | None = None,
) -> None:
    """Train the model's adapters, in place, for so many optimizer steps.

    Args:
        model: with adapters.
        pairs: what to train on.
        options: of the recipe.
        steps: of the optimizer.
        callbacks: more of them.
        sampler: chooses the pairs.
        data: the pairs, or the pairs with corrections (RAC).
        collate: makes batches, for BASH with the model's own tokens in them.
        refresh: writes the model's own tokens anew, where there are some.
    """
    module = Tuner(model.train(), options, steps, sampler)
    loader: Any = DataLoader(pairs, options.batch_size, shuffle=True, collate_fn=pad_left)
    loader = DataLoader(with_ids(data), options.batch_size, sampler=sampler, collate_fn=collate)  # samplewise
    callbacks = list(callbacks)
    callbacks += [SamplingCallback(sampler), *([refresh] if refresh else [])]  # samplewise
    fit(module, loader, options, steps, callbacks)


def run(options: SelfTokensOptions) -> dict[str, Any]:
    """Train all arms with all seeds, write the results, print the table; gives what `results.json` holds.

    Raises:
        ValueError: wrong options, all of them at once.
        AssetError: the data or the model could not be had, or cannot be used with these options.
    """
    options.validate()
    with surroundings(options.threads):
        begin, arms = perf_counter(), arms_of(options)
        with Bars(len(arms) * options.seeds + 1) as bars:
            try:
                comparison = Comparison(options, train, bars)
            except ValueError as error:
                raise AssetError(f"{options.model}, {options.data}: cannot be used: {error}") from error
            runs = [comparison.untrained(bars)]
            bars.finish(runs[0].line())
            for seed in range(options.seeds):
                for arm in arms:
                    runs.append(comparison.run(arm, seed, runs, bars))
                    bars.finish(runs[-1].line())
        return write_results(runs, comparison, options, perf_counter() - begin, console=bars.console)


if __name__ == "__main__":
    from samplewise.recipes.cli import run_command

    sys.exit(run_command(["self_tokens", *sys.argv[1:]]))

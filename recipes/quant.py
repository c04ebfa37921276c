"""One fine-tuning run for every bit width, against one run for each, on a small language model.

    python -m samplewise.recipes.quant            # SmolLM2-135M writes docstrings, 3 seeds: 51 minutes on 2 cores
    samplewise run quant --data pairs.jsonl --model NAME --accelerator gpu --steps 2000 --batch_size 32

Quantizes the linear layers of a pretrained model group-wise at 2, 3 and 4 bits and trains low-rank adapters: in one run
for each average width (QLoRA's way), and once for all with widths drawn for each layer and step, uniformly or by a
schedule that visits every average width as often, with an adapter for each width or one that all share. All arms take
as many optimizer steps in all. They are tested at 2, 2.5, 3, 3.5 and 4 bits on average, beside weights that are rounded
and not trained. Then the configurations of the once-for-all model are searched for the best one under a budget of bits.

Writes `results.json`, `runs.csv`, `summary.csv`, `search.csv`, `report.html` and `plots/*.png` into `--out`, and prints
a table: loss and perplexity of held-out responses, the share of questions answered rightly (which of four responses
belongs to the prompt), differences to uniform draws paired by seed, and the time of a step.

`Tuner` and `train` are an ordinary training script: delete the lines marked `# samplewise` and it still is one, at the
width that the layers have.
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

from samplewise.callbacks import SamplingCallback, SwitchBits  # samplewise
from samplewise.loaders import collate_with_ids, with_ids  # samplewise
from samplewise.recipes.assets import AssetError
from samplewise.recipes.common import Rule, check_options, surroundings
from samplewise.recipes.fitting import fit, warmed_adamw
from samplewise.recipes.progress import Bars
from samplewise.recipes.quant_arms import ARMS
from samplewise.recipes.quant_results import write_results
from samplewise.recipes.quant_runs import Comparison
from samplewise.recipes.responses import pad_left, response_losses
from samplewise.recipes.text_pairs import TokenizedPairs

Name = Literal[
    "single", "uniform", "balanced", "shared", "adjacent", "gaussian", "loss", "grad_norm", "uniform_shared"
]  # fmt: skip
DEFAULT_ARMS: tuple[Name, ...] = ("single", "uniform", "balanced", "shared")


@dataclass
class QuantOptions:
    """What to compare, on what, and how.

    Args:
        data: signature_to_doc, code_to_doc, doc_to_code (from Python packages), or a .jsonl file with a prompt and a
            response on each line, or a folder with train, validation and test.jsonl
        model: smollm2-135m-instruct, a folder that transformers reads, or a hub name
        bits: the widths, ascending
        averages: average widths that are tested
        group_size: weights with a range of their own
        arms: what is compared, with rounding to nearest without training; others are adjacent and gaussian (balanced by
            other mappings), loss and grad_norm (widths by what they gave so far), uniform_shared
        steps: optimizer steps of each arm in all; single divides them among its runs
        period: of the balanced schedule's wave, in steps; 0: a quarter of the steps
        seeds: number of repeats; repeat s uses seed s for adapters, widths and the order of the pairs
        batch_size: pairs in a batch
        accumulate: batches of an optimizer step
        rank: of the adapters; their alpha is twice that
        lr: highest learning rate, of AdamW with gradients clipped at norm 1; up over 10 % of the steps, then down to 0
        weight_decay: of AdamW
        sampler: what chooses the pairs, in all arms; all but uniform need steps for more than one epoch
        rs2_ratio: RS2: share of the pairs in an epoch, in (0, 1]
        chat: write pairs as the tokenizer's chat template does, not as plain text
        max_length: longer pairs are left out, in tokens
        test_pairs: held-out pairs that losses are measured on
        questions: of four choices each
        budget: average bits of the configuration that is searched for
        search: configurations tried at first, and after the space has shrunk, in the first seed's balanced arm; [0, 0]:
            none
        search_pairs: validation pairs that they are tried on
        evaluate: test, or validation to try settings out
        accelerator: cpu, gpu or mps
        precision: as Lightning calls it
        threads: threads of torch on the CPU; 0 leaves torch's choice
        out: folder for the results
    """

    data: str = "signature_to_doc"
    model: str = "smollm2-135m-instruct"
    bits: list[int] = field(default_factory=lambda: [2, 3, 4])
    averages: list[float] = field(default_factory=lambda: [2, 2.5, 3, 3.5, 4])
    group_size: int = 64
    arms: list[Name] = field(default_factory=lambda: list(DEFAULT_ARMS))
    steps: int = 100
    period: int = 0
    seeds: int = 3
    batch_size: int = 4
    accumulate: int = 1
    rank: int = 16
    lr: float = 1e-3
    weight_decay: float = 0.01
    sampler: Literal["uniform", "rs2", "infobatch", "seta"] = "uniform"
    rs2_ratio: float = 0.1
    chat: bool = False
    max_length: int = 32
    test_pairs: int = 64
    questions: int = 16
    budget: float = 2.5
    search: list[int] = field(default_factory=lambda: [100, 50])
    search_pairs: int = 8
    evaluate: Literal["test", "validation"] = "test"
    accelerator: Literal["cpu", "gpu", "mps"] = "cpu"
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    threads: int = 0
    out: str = "runs/quant"

    def validate(self) -> None:
        """Check all options.

        Raises:
            ValueError: one line for each option that breaks its rule.
        """
        widths = len(self.bits) > 0 and self.bits == sorted(set(self.bits)) and 1 <= self.bits[0] <= self.bits[-1] <= 8
        low, high = (self.bits[0], self.bits[-1]) if widths else (1, 8)
        rules: list[Rule] = [
            ("bits", widths, "must be widths from 1 to 8, ascending, each once"),
            ("averages", bool(self.averages), "needs at least one average width"),
            ("averages", all(low <= a <= high for a in self.averages), f"must be from {low} to {high}, the widths"),
            ("averages", len(set(self.averages)) == len(self.averages), "names an average twice"),
            ("group_size", self.group_size >= 8 and self.group_size % 8 == 0, "must be a multiple of 8"),
            ("arms", bool(self.arms), f"needs at least one of {', '.join(get_args(Name))}"),
            ("arms", len(set(self.arms)) == len(self.arms), "names an arm twice"),
            ("arms", set(self.arms) <= set(get_args(Name)), f"there are {', '.join(get_args(Name))}"),
            ("steps", self.steps >= 2, "must be >= 2"),
            (
                "steps",
                "single" not in self.arms or self.steps % max(1, len(self.averages)) == 0,
                "must be a multiple of the number of averages, among whose runs the arm single divides them",
            ),
            ("period", self.period == 0 or self.period >= 2, "must be >= 2, or 0 for a quarter of the steps"),
            ("batch_size", self.batch_size >= 1, "must be >= 1"),
            ("accumulate", self.accumulate >= 1, "must be >= 1"),
            ("rank", self.rank >= 1, "must be >= 1"),
            ("lr", self.lr > 0, "must be > 0"),
            ("weight_decay", self.weight_decay >= 0, "must be >= 0"),
            ("rs2_ratio", 0 < self.rs2_ratio <= 1, "is the share of the pairs in an epoch and must be in (0, 1]"),
            ("max_length", self.max_length >= 8, "must be >= 8"),
            ("test_pairs", self.test_pairs >= 1, "must be >= 1"),
            ("questions", self.questions >= 0, "must be >= 0"),
            ("budget", low <= self.budget <= high, f"must be from {low} to {high}: no configuration fits below"),
            ("search", len(self.search) == 2 and min(self.search) >= 0, "must be two numbers of configurations"),
            (
                "search",
                len(self.search) != 2 or self.search[0] > 0 or not self.search[1],
                "needs a first number above 0",
            ),
            ("search_pairs", self.search_pairs >= 1, "must be >= 1"),
            ("threads", self.threads >= 0, "must be >= 0; 0 leaves torch's choice"),
        ]
        check_options(self, rules)

    @property
    def wave(self) -> int:
        """Steps of a period."""
        return self.period or max(2, self.steps // 4)

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cuda" if self.accelerator == "gpu" else self.accelerator


class Tuner(LightningModule):
    """Trains a language model on the responses to prompts."""

    def __init__(self, model: nn.Module, options: QuantOptions, steps: int, sampler: Any):
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
    options: QuantOptions,
    steps: int,
    *,
    callbacks: Sequence[Callback] = (),
    sampler: Any = None,
    schedule: Any = None,
) -> None:
    """Train the model's adapters, in place, for so many optimizer steps."""
    module = Tuner(model.train(), options, steps, sampler)
    loader: Any = DataLoader(pairs, options.batch_size, shuffle=True, collate_fn=pad_left)
    loading: dict[str, Any] = {"sampler": sampler, "collate_fn": collate_with_ids(pad_left)}  # samplewise
    loader = DataLoader(with_ids(pairs), options.batch_size, **loading)  # samplewise
    callbacks = list(callbacks)
    callbacks += [SamplingCallback(sampler), SwitchBits(schedule)]  # samplewise
    fit(module, loader, options, steps, callbacks, accumulate_grad_batches=options.accumulate)


def run(options: QuantOptions) -> dict[str, Any]:
    """Train all arms with all seeds, write the results, print the table; gives what `results.json` holds.

    Raises:
        ValueError: wrong options, all of them at once.
        AssetError: the data or the model could not be had, or cannot be used with these options.
    """
    options.validate()
    with surroundings(options.threads):
        begin, arms = perf_counter(), [ARMS[name] for name in options.arms]
        with Bars(len(arms) * options.seeds + 1) as bars:
            try:
                comparison = Comparison(options, train, bars)
            except ValueError as error:
                raise AssetError(f"{options.model}, {options.data}: cannot be used: {error}") from error
            runs = [comparison.untrained(bars)]
            bars.finish(runs[0].line())
            for seed in range(options.seeds):
                for arm in arms:
                    runs.append(comparison.run(arm, seed, bars))
                    bars.finish(runs[-1].line())
        return write_results(runs, comparison, options, perf_counter() - begin, console=bars.console)


if __name__ == "__main__":
    from samplewise.recipes.cli import run_command

    sys.exit(run_command(["quant", *sys.argv[1:]]))

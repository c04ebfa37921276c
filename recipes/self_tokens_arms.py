"""What the recipe of self-generated tokens compares: whose tokens are the context, and which pairs are trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samplewise.loaders import PlannedSampler, collate_with_ids
from samplewise.plugins import (
    RS2,
    BetaSchedule,
    CorrectionDataset,
    SelfTokenMixer,
    TokenBuffer,
    Uniform,
    correction_connector,
)
from samplewise.recipes.responses import pad_left
from samplewise.recipes.text_pairs import TokenizedPairs

if TYPE_CHECKING:
    from samplewise.recipes.self_tokens import SelfTokensOptions


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        name: for files.
        label: for people.
        kind: of the options' arms.
        colour: its number in the plots.
        beta: of BASH: the share of tokens that are replaced in the end.
        timed: of plain fine-tuning: the kind as long as whose slowest arm it takes.
    """

    name: str
    label: str
    kind: str
    colour: int
    beta: float = 0.0
    timed: str = ""


UNTRAINED = Arm("untrained", "As it is", "untrained", 0)


def arms_of(options: "SelfTokensOptions") -> list[Arm]:
    """The arms in the order in which they run; the timed ones are last, since they wait for the others' times."""
    arms: list[Arm] = []
    for kind, label in (("plain", "Plain fine-tuning"), ("rs2", "RS2"), ("bash", "BASH, up to {:g}"), ("rac", "RAC")):
        if kind in options.arms:
            for beta in options.betas if kind == "bash" else [0.0]:
                name = f"bash-{beta:g}" if kind == "bash" else kind
                arms.append(Arm(name, label.format(beta), kind, len(arms) + 1, beta))
    for kind in ("bash", "rac"):
        if kind in options.arms and "plain_timed" in options.arms:
            label = f"Plain, as long as {kind.upper()}"
            arms.append(Arm(f"plain-timed-{kind}", label, "plain_timed", len(arms) + 1, timed=kind))
    return arms


def make_sampler(arm: Arm, size: int, seed: int, options: "SelfTokensOptions") -> PlannedSampler:
    """What chooses the pairs."""
    return RS2(size, ratio=options.rs2_ratio, seed=seed) if arm.kind == "rs2" else Uniform(size, seed=seed)


def make_target(
    arm: Arm, pairs: TokenizedPairs, tokenizer: Any, folder: Path, sampler: PlannedSampler, options: "SelfTokensOptions"
) -> SelfTokenMixer | CorrectionDataset | None:
    """What holds the model's own tokens: a collate (BASH), a data set (RAC), nothing."""
    if arm.kind == "bash":
        beta = BetaSchedule(arm.beta, epochs=options.epochs, shape=options.shape)
        return SelfTokenMixer(
            TokenBuffer(folder, pairs, tokenizer), beta=beta, collate=pad_left, after_error=options.after_error,
            clean_share=options.clean_share, seed=sampler.seed, sampler=sampler,
        )  # fmt: skip
    if arm.kind == "rac":
        return CorrectionDataset(
            TokenBuffer(folder, pairs, tokenizer), correction_connector(tokenizer),
            correct_share=options.correct_share, equal=options.equal, seed=sampler.seed, sampler=sampler,
        )  # fmt: skip
    return None


def refresh_options(arm: Arm, options: "SelfTokensOptions") -> dict[str, Any]:
    """Of the callback that writes the model's own tokens."""
    shared = {"temperature": options.temperature, "batch_size": 2 * options.batch_size, "progress": False}
    if arm.kind == "rac":
        return {"every_n_epochs": options.attempt_epochs, "max_new_tokens": options.max_new_tokens, **shared}
    shared["every_n_epochs"] = options.refresh_epochs
    return {"rollout": options.rollout, "passes": options.passes, "span": options.span, **shared}


def data_and_collate(target: Any, pairs: TokenizedPairs) -> tuple[Any, Callable[[Any], Any]]:
    """What a loader takes."""
    if isinstance(target, SelfTokenMixer):
        return pairs, target
    return target or pairs, collate_with_ids(pad_left)

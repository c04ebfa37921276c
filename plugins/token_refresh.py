"""Writing a token buffer anew while the model learns: which samples, by which rollout, on all ranks at once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from typing_extensions import Unpack

from samplewise.cuda_ext import Ledger
from samplewise.cuda_ext.checks import choice, integer, share
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.seeding import derive
from samplewise.plugins.correction import CorrectionDataset, is_reference
from samplewise.plugins.self_tokens import SelfTokenMixer, lots
from samplewise.plugins.token_buffer import Ints, Sample
from samplewise.plugins.token_rollouts import (
    Job,
    allowed,
    parallel_tokens,
    sequential_tokens,
    undisturbed,
    written_answers,
)
from samplewise.plugins.token_writing import Running, Written, model_of, read_samples, write_version

Rollout = Literal["parallel", "sequential", "span"]
_PROBES = 64
_BENDING = {
    "bad_words_ids", "eos_token_id", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "generation_config", "max_time", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams",
    "num_return_sequences", "repetition_penalty", "sequence_bias", "stop_strings", "stopping_criteria",
    "suppress_tokens",
}  # fmt: skip
"""Options of ``generate`` that decide tokens, or when to end."""


class RefreshOptions(TypedDict, total=False):
    """The options that :func:`refresh_self_tokens` and :func:`refresh_attempts` share."""

    temperature: float
    batch_size: int
    ledger: Ledger | None
    budget: int | None
    generate: Mapping[str, Any] | None
    progress: bool


def refresh_self_tokens(
    model: Any,
    mixer: SelfTokenMixer,
    *,
    rollout: Rollout = "parallel",
    passes: int = 1,
    span: int = 8,
    epoch: int | None = None,
    **options: Unpack[RefreshOptions],
) -> dict[str, float]:
    """Write the next version of a mixer's buffer: the model's own tokens at the places of the responses.

    While it generates the model is in evaluation mode; modes and the global random generators are as before afterwards.
    The caller's autocast applies. With several ranks, call it on all of them: each generates a share, the first one
    writes, and all see the new version when it returns. Where a refresh fails, the version before stays.

    Args:
        model: of transformers, causal or with an encoder and a decoder, also wrapped by peft or DDP.
        mixer: whose buffer, seed, epoch and beta it is for.
        rollout: ``"parallel"``: each token after the references before it, all from one forward; ``"sequential"``: each
            token after the mixed context, one forward a token; ``"span"``: the same with stretches that are replaced
            together, so that the model goes on after its own tokens.
        passes: of the parallel rollout: each pass after the first is a forward of the mixed context.
        span: tokens of a stretch.
        epoch: that the tokens are generated for; None: the mixer's.
        **options: ``temperature``: 0 takes the likeliest token, above 0 they are drawn; ``batch_size``: documents at a
            time, 16; ``ledger``: of the samples' losses, the highest is refreshed first, and samples without a loss
            last, the oldest tokens first; ``budget``: tokens that are refreshed at the most, None: all; ``generate``:
            more options of ``model.generate`` for the sequential rollouts, such as ``{"assistant_model": small}``;
            ``progress``: show a bar on a terminal.

    Returns:
        Of the tokens that were generated: ``agreement``: share of them that are the reference's, special ones aside;
        ``replaced``: share of the response's tokens that are replaced by others at this epoch's beta; ``changed``:
        share that the version before had otherwise, NaN where there was none; ``refreshed``: share of all response
        tokens; ``tokens``: their number; ``seconds``, of this rank.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range, data that are not understood or are not the buffer's.
    """
    owner = "refresh_self_tokens"
    if not isinstance(mixer, SelfTokenMixer):
        raise TypeError(f"{owner}(mixer={type(mixer).__name__}): a SelfTokenMixer is needed.")
    settings, running = refresh_settings(owner, options)
    notes = check_rollout(owner, rollout, passes, span, settings)
    given, epoch = epoch, mixer.epoch if epoch is None else integer(owner, "epoch", epoch, 0)
    beta, special = mixer.beta(epoch), mixer.buffer.special
    if given is None and beta == epoch == 0 and mixer.buffer.version:
        warnings.warn(
            f"{owner}: this is another refresh for epoch 0, in which nothing is replaced: give the mixer the loader's "
            f"sampler, or call mixer.set_epoch(epoch).",
            stacklevel=2,
        )

    def write(inner: Any, ids: Ints, samples: Sequence[Sample]) -> Written:
        targets = Ragged.from_lists([sample.targets for sample in samples])
        replaced = mixer.replaced(ids, targets.lengths, epoch, notes["span"])
        drawn = lots(ids, targets.lengths, derive(mixer.seed, epoch, "own"))
        own = _own_tokens(inner, samples, replaced, drawn, special, {**settings, **notes})
        plain = ~np.isin(targets.values, special)
        stored = np.where(allowed(targets.values, own, special), own, targets.values)
        counts = {
            "tokens": len(own), "plain": int(plain.sum()), "equal": int((plain & (own == targets.values)).sum()),
            "replaced": int((replaced & (stored != targets.values)).sum()),
        }  # fmt: skip
        return Written(Ragged(stored, targets.offsets), replaced, counts)

    meta = {
        "kind": "tokens",
        **notes,
        "temperature": settings["temperature"],
        "seed": mixer.seed,
        "epoch": epoch,
        "beta": beta,
    }
    counts, seconds = write_version(owner, model, mixer.buffer, write, meta=meta, capacity=None, running=running)
    return {
        "agreement": _ratio(counts["equal"], counts["plain"]),
        "replaced": _ratio(counts["replaced"], counts["tokens"]),
        "changed": _ratio(counts["changed"], counts["compared"]),
        "refreshed": _ratio(counts["tokens"], counts["total"]),
        "tokens": float(counts["tokens"]),
        "seconds": seconds,
    }


def refresh_attempts(
    model: Any,
    corrections: CorrectionDataset,
    *,
    max_new_tokens: int = 64,
    epoch: int | None = None,
    **options: Unpack[RefreshOptions],
) -> dict[str, float]:
    """Write the next version of a correction data set's attempts: what the model answers to the prompts, by itself.

    An attempt ends where the model ends it, or before a special token; special tokens that it begins with are left
    out. The model's own settings of ``generate`` apply, but for sampling. See :func:`refresh_self_tokens`, which also
    says how it leaves the model and what ``options`` there are; ``budget`` counts ``max_new_tokens`` for each sample,
    and ``generate`` holds more options of ``model.generate``, an assistant model or beams for example.

    Args:
        model: of transformers.
        corrections: the data set.
        max_new_tokens: tokens of an attempt at the most; the same in every refresh of a buffer.
        epoch: key of the draws at a temperature; None: the data set's.
        **options: see above.

    Returns:
        ``agreement``: share of the attempts that are the reference; ``unfinished``: share that did not end by
        themselves; ``changed``: share of the tokens that were others in the version before; ``refreshed``: share of the
        samples; ``tokens``: generated; ``seconds``, of this rank.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range, no end-of-text token, samples with several responses.
    """
    owner = "refresh_attempts"
    if not isinstance(corrections, CorrectionDataset):
        raise TypeError(f"{owner}(corrections={type(corrections).__name__}): a CorrectionDataset is needed.")
    settings, running = refresh_settings(owner, options)
    most = integer(owner, "max_new_tokens", max_new_tokens, 1)
    epoch = corrections.epoch if epoch is None else integer(owner, "epoch", epoch, 0)
    special, size = corrections.buffer.special, corrections.buffer.size
    ends = np.array(sorted(_ends(model, corrections.buffer.end)), dtype=np.int64)
    if not len(ends):
        raise ValueError(
            f"{owner}: the tokenizer has no end-of-text token, so that no attempt ends; set its eos_token."
        )

    def write(inner: Any, ids: Ints, samples: Sequence[Sample]) -> Written:
        prompts = [_prompt(owner, sample, row, inner) for row, sample in zip(ids.tolist(), samples, strict=True)]
        drawn = lots(ids, np.full(len(ids), most), derive(corrections.seed, epoch, "attempts")).reshape(-1, most)
        answers: list[Ints] = [np.zeros(0, np.int64)] * len(prompts)
        given: dict[str, Any] = {"most": most, "special": special, "temperature": settings["temperature"]}
        last = [sample.targets[-1] for sample in samples]  # a chat's turns may end otherwise than its text
        given["ends"] = np.union1d(ends, np.intersect1d(last, special))
        for rows in _by_length([len(prompt) for prompt in prompts], settings["batch_size"]):
            part = [prompts[row] for row in rows], [drawn[row] for row in rows]
            for row, answer in zip(
                rows, written_answers(inner, *part, **given, options=settings["generate"]), strict=True
            ):
                answers[row] = answer
        equal = sum(is_reference(a, sample.targets, special) for a, sample in zip(answers, samples, strict=True))
        attempts = Ragged.from_lists(answers)
        counts = {
            "tokens": len(attempts.values), "attempts": len(ids), "equal": equal,
            "unfinished": int((attempts.lengths == most).sum()),
        }  # fmt: skip
        return Written(attempts, np.zeros(len(attempts.values), np.bool_), counts)

    meta = {
        "kind": "attempts",
        "temperature": settings["temperature"],
        "seed": corrections.seed,
        "epoch": epoch,
    }
    counts, seconds = write_version(owner, model, corrections.buffer, write, meta=meta, capacity=most, running=running)
    return {
        "agreement": _ratio(counts["equal"], counts["attempts"]),
        "unfinished": _ratio(counts["unfinished"], counts["attempts"]),
        "changed": _ratio(counts["changed"], counts["compared"]),
        "refreshed": counts["attempts"] / size,
        "tokens": float(counts["tokens"]),
        "seconds": seconds,
    }


def token_drift(model: Any, mixer: SelfTokenMixer, *, samples: int = _PROBES, batch_size: int = 16) -> float:
    """Share of a buffer's own tokens that the model would write otherwise now, by the same rollout and draws.

    It looks at samples that were generated, drawn evenly over the data set, the same ones each time. Cheap: with the
    parallel rollout one forward of so many samples. With several ranks each one looks at all of them.

    Args:
        model: see :func:`refresh_self_tokens`.
        mixer: whose buffer it is.
        samples: how many to look at.
        batch_size: documents at a time.

    Returns:
        In [0, 1]; NaN where nothing was generated.
    """
    owner, buffer = "token_drift", mixer.buffer
    integer(owner, "samples", samples, 1)
    settings, _ = refresh_settings(owner, {"batch_size": batch_size})
    meta = buffer.table.snapshot().meta
    there = np.flatnonzero(np.asarray(buffer.table["versions"]) > 0)
    ids = there[np.unique(np.linspace(0, len(there) - 1, min(samples, len(there))).astype(np.int64))]
    if not len(ids):
        return math.nan
    rows, changed, inner = buffer.take(ids), 0, model_of(model)
    for version in np.unique(rows.versions).tolist():  # after a budget some are older, maybe by another rollout
        given, part = meta["settings"][str(version)], np.flatnonzero(rows.versions == version)
        now = buffer.take(ids[part])
        read = read_samples(owner, buffer, ids[part], seq2seq=bool(meta["seq2seq"]))
        key = derive(int(given["seed"]), int(given["epoch"]), "own")
        drawn = lots(ids[part], now.tokens.lengths, key)
        with undisturbed(inner):
            own = _own_tokens(inner, read, now.replaced, drawn, buffer.special, {**settings, **given})
        targets = np.concatenate([sample.targets for sample in read])
        changed += int((np.where(allowed(targets, own, buffer.special), own, targets) != now.tokens.values).sum())
    return _ratio(changed, len(rows.tokens.values))


def check_rollout(owner: str, rollout: Rollout, passes: int, span: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The rollout, its passes and its span, 1 unless stretches are replaced together.

    Raises:
        ValueError: options that do not fit together.
    """
    choice(owner, "rollout", rollout, "parallel", "sequential", "span")
    passes = integer(owner, "passes", passes, 1, what="the number of forwards")
    span = integer(owner, "span", span, 1, what="the tokens that are replaced together")
    if passes > 1 and rollout != "parallel":
        raise ValueError(f"{owner}(passes={passes}, rollout={rollout!r}): passes are of the parallel rollout.")
    if bent := sorted(set(settings["generate"]) & _BENDING):
        raise ValueError(
            f"{owner}(generate={{{bent[0]!r}: ...}}): own tokens are the model's at each place; leave out what ends "
            f"generation or bends it."
        )
    if settings["generate"] and rollout == "parallel":
        raise ValueError(f"{owner}(generate=...): the parallel rollout does not generate; give rollout='sequential'.")
    return {"rollout": rollout, "passes": passes, "span": span if rollout == "span" else 1}


def refresh_settings(owner: str, options: Mapping[str, Any]) -> tuple[dict[str, Any], Running]:
    """What generation needs, and what the writing needs."""
    if unknown := sorted(set(options) - set(RefreshOptions.__annotations__)):
        raise TypeError(f"{owner}({unknown[0]}=...): there are {', '.join(RefreshOptions.__annotations__)}.")
    generate = dict(options.get("generate") or {})
    if taken := sorted(
        set(generate) & {"do_sample", "temperature", "max_new_tokens", "logits_processor", "max_length"}
    ):
        raise ValueError(
            f"{owner}(generate={{{taken[0]!r}: ...}}): that is decided here; temperature=0.8 draws tokens."
        )
    temperature = share(owner, "temperature", options.get("temperature", 0.0), high=math.inf, ends="[)")
    batch_size = integer(owner, "batch_size", options.get("batch_size", 16), 1)
    budget, ledger = options.get("budget"), options.get("ledger")
    if ledger is not None and not isinstance(ledger, Ledger):
        raise TypeError(f"{owner}(ledger={type(ledger).__name__}): a Ledger is needed: sampler.ledger.")
    if budget is not None:
        integer(owner, "budget", budget, 1, what="the most tokens that are refreshed")
    if temperature > 0 and "num_beams" in generate:
        raise ValueError(
            f"{owner}(temperature={temperature:g}): beams are searched without one; leave out one of them."
        )
    if "assistant_model" in generate or "prompt_lookup_num_tokens" in generate:
        batch_size = 1  # all that transformers can do with them
    settings = {"temperature": temperature, "batch_size": batch_size, "generate": generate}
    return settings, Running(batch_size, ledger, budget, bool(options.get("progress", True)))


def _own_tokens(
    model: Any, samples: Sequence[Sample], replaced: Any, drawn: Any, special: Ints, settings: Mapping[str, Any]
) -> Ints:
    """The model's own tokens, sample after sample: int64 (M,)."""
    jobs: list[Job] = []
    begin = 0
    for sample in samples:
        for low, high in zip(sample.starts, [*sample.starts[1:], len(sample.tokens)], strict=True):
            inside = (sample.places >= low) & (sample.places < high) if len(sample.starts) > 1 else sample.places >= 0
            end = begin + int(inside.sum())
            tokens, places = sample.tokens[low:high], sample.places[inside] - low
            if end > begin:
                jobs.append(Job(tokens, places, sample.targets[inside], replaced[begin:end], drawn[begin:end]))
            begin = end
    own: list[Ints] = [job.targets for job in jobs]
    given: dict[str, Any] = {"special": special, "temperature": settings["temperature"]}
    for rows in _by_length([len(job.tokens) for job in jobs], settings["batch_size"]):
        batch = [jobs[row] for row in rows]
        if settings["rollout"] == "parallel":
            found = parallel_tokens(model, batch, passes=int(settings["passes"]), **given)
        else:
            found = sequential_tokens(model, batch, options=settings["generate"], **given)
        for row, tokens in zip(rows, found, strict=True):
            own[row] = tokens
    return np.concatenate(own) if own else np.zeros(0, np.int64)


def _by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows of like length, the longest first, so that what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[low : low + batch_size] for low in range(0, len(order), batch_size)]


def _ends(model: Any, end: int | None) -> set[int]:
    """The tokens that end a text, the tokenizer's and those of the model's generation config."""
    own = getattr(getattr(model_of(model), "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [own]
    return {int(token) for token in (end, *listed) if token is not None}


def _prompt(owner: str, sample: Sample, row: int, model: Any) -> Ints:
    if getattr(model.config, "is_encoder_decoder", False):
        return sample.tokens
    if not len(sample.places) or np.diff(sample.places).max(initial=1) > 1 or len(sample.starts) > 1:
        raise ValueError(
            f"{owner}: sample {row} must have one response, in one piece; corrections are of single answers."
        )
    return sample.tokens[: sample.places[0]]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan

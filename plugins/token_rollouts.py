"""What a language model writes at the places of a response: from teacher-forced passes, or token by token.

Both take rows of tokens, of which some are a response, and which of these are replaced by the model's own as context
for the next. ``own_t`` is what the model writes at place t after the context u_1 ... u_(t-1); special tokens are never
context in place of others.

- :func:`parallel_tokens`: one forward of the references gives all own_t at once; each further pass is a forward of
  what the pass before makes of the context.
- :func:`sequential_tokens`: own_t after the mixed context itself, one forward with a cache for each place, by
  ``generate`` of transformers.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from samplewise.cuda_ext.checks import optional_import
from samplewise.plugins.token_buffer import Bools, Ints

_ROWS = 128  # rows of logits that are sampled from in float64 at a time
NEVER = -1  # no token has this id


@dataclass(frozen=True, eq=False)
class Job:
    """One document whose response the model is to write.

    Attributes:
        tokens: int64 (T,), the reference; with an encoder and a decoder the encoder's input.
        places: int64 (R,), ascending, where in ``tokens`` the response is, all > 0; with a decoder of its own unused.
        targets: int64 (R,), the response's reference tokens.
        replaced: bool (R,), which become context.
        lots: float64 (R,) in [0, 1), what each token is sampled with.
    """

    tokens: Ints
    places: Ints
    targets: Ints
    replaced: Bools
    lots: NDArray[np.float64]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Has the model in evaluation mode, without gradients.

    Afterwards each module's mode is as before, and so are the states of the global random generators of Python, numpy
    and torch, also on the model's devices.
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = {parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"}
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  (they are put back, not used)
    for module, _ in modes:  # not by eval(): what a module of the user's does in it would not be undone
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        for module, mode in modes:
            module.training = mode


def choose(logits: Tensor, lots: Tensor, temperature: float) -> Tensor:
    """A token for each row of logits: the likeliest, or, at a temperature > 0, one drawn by its lot.

    The draw is ``min {k: p_0 + ... + p_k > lot}`` with p = softmax(logits / temperature) and its sums in float64, so
    that no token is lost in a large vocabulary.

    Args:
        logits: (n, V).
        lots: float64 (n,) in [0, 1), on any device.
        temperature: 0: the likeliest.

    Returns:
        int64 (n,).

    Raises:
        ValueError: a row of logits that holds NaN or infinity, or is all minus infinity.
    """
    best, tokens = logits.max(-1)
    if not bool(best.isfinite().all()):  # NaN is in the maximum
        raise ValueError(
            "the model's logits are NaN or infinite; nothing was written. Check its weights, or the precision."
        )
    if temperature == 0:
        return tokens
    device = torch.device("cpu") if logits.device.type == "mps" else logits.device  # which has no float64
    chosen = []
    for part, lot in zip(logits.split(_ROWS), lots.to(device).split(_ROWS), strict=True):
        sums = (part.to(device).double() / temperature).softmax(-1).cumsum(-1)
        places = torch.searchsorted(sums, (lot[:, None] * sums[:, -1:]), right=True)[:, 0]
        chosen.append(places.clamp_max(part.shape[1] - 1))
    return torch.cat(chosen).to(tokens.device) if chosen else tokens


def parallel_tokens(
    model: Any, jobs: Sequence[Job], *, special: Ints, passes: int = 1, temperature: float = 0.0
) -> list[Ints]:
    """The model's own tokens from teacher-forced forwards.

    Args:
        model: of transformers, in evaluation mode.
        jobs: a batch of them.
        special: int64, tokens that are never context in place of others.
        passes: forwards; the first is of the references, the next of the context that the one before makes.
        temperature: see :func:`choose`.

    Returns:
        For each job its own tokens, int64 (R,).
    """
    contexts = [job.targets for job in jobs]
    own: list[Ints] = []
    for _ in range(passes):
        own = _forward(model, jobs, contexts, temperature)
        contexts = [
            np.where(job.replaced & allowed(job.targets, tokens, special), tokens, job.targets)
            for job, tokens in zip(jobs, own, strict=True)
        ]
    return own


def allowed(targets: Ints, own: Ints, special: Ints) -> Bools:
    """Where an own token may stand in place of the reference's: neither is special."""
    answer: Bools = ~(np.isin(targets, special) | np.isin(own, special))
    return answer


def _forward(model: Any, jobs: Sequence[Job], contexts: Sequence[Ints], temperature: float) -> list[Ints]:
    device, decoder = model.device, bool(getattr(model.config, "is_encoder_decoder", False))
    counts = [len(job.targets) for job in jobs]
    if not sum(counts):
        return [job.targets for job in jobs]
    rows = np.repeat(np.arange(len(jobs)), counts)
    inputs: dict[str, Tensor] = {}
    if decoder:
        inputs = _padded([job.tokens for job in jobs], device)
        start = _decoder_start(model)
        fed = [np.concatenate(([start], context[:-1]))[: len(context)] for context in contexts]
        inputs["decoder_input_ids"] = _padded(fed, device)["input_ids"]
        columns = np.concatenate([np.arange(count) for count in counts])
        logits = model(**inputs, use_cache=False).logits
    else:
        texts = [job.tokens.copy() for job in jobs]
        for text, job, context in zip(texts, jobs, contexts, strict=True):
            text[job.places] = context
        inputs = _padded(texts, device)
        columns = np.concatenate([job.places for job in jobs]) - 1  # the logits at t - 1 are of the token at t
        kept = np.arange(columns.min(), columns.max() + 1)
        if _takes(model, "logits_to_keep"):
            logits = model(**inputs, use_cache=False, logits_to_keep=torch.from_numpy(kept).to(device)).logits
            columns = columns - kept[0]
        else:
            logits = model(**inputs, use_cache=False).logits
    wanted = logits[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)]
    lots = torch.from_numpy(np.concatenate([job.lots for job in jobs]))
    tokens: Ints = choose(wanted, lots, temperature).cpu().numpy()
    return np.split(tokens, np.cumsum(counts)[:-1])


def _padded(rows: Sequence[Ints], device: Any) -> dict[str, Tensor]:
    """Padded on the right, where no position of a causal model sees it."""
    tensors = [torch.from_numpy(row) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in tensors], batch_first=True)
    ids = pad_sequence(tensors, batch_first=True)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _layers(model: Any) -> list[Any]:
    """The model and what it wraps: torch.compile's and peft's wrappers, the model of transformers last."""
    layers = [model]
    while True:
        if "_orig_mod" in layers[-1]._modules:
            layers.append(layers[-1]._orig_mod)
        elif hasattr(layers[-1], "get_base_model") and layers[-1].get_base_model() is not layers[-1]:
            layers.append(layers[-1].get_base_model())
        else:
            return layers


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(_layers(model)[-1].forward).parameters


def _decoder_start(model: Any) -> int:
    for config in (model.generation_config, model.config):
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise ValueError(
        f"{type(model).__name__}: its configuration has no decoder_start_token_id, the first token that its decoder is "
        f"fed; set model.generation_config.decoder_start_token_id."
    )


class _Writing:
    """A logits processor of ``generate`` that decides each token, and keeps what the model would have written.

    For each step s and row it gets the model's logits after the context so far; the token that becomes context is the
    own one where ``replaced``, else the reference's. It is a function of the step alone, so that candidates of an
    assistant model go through it too; what is kept is what came last, the model's own.
    """

    def __init__(self, begin: int, forced: Tensor, replaced: Tensor, lots: Tensor, special: Tensor, temperature: float):
        self.begin, self.forced, self.replaced, self.lots = begin, forced, replaced, lots
        self.special, self.temperature = special, temperature
        self.own = torch.full_like(forced, NEVER)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.begin
        own = choose(scores, self.lots[:, step], self.temperature)
        self.own[:, step] = own
        forced = self.forced[:, step]
        taken = self.replaced[:, step] & ~torch.isin(own, self.special)
        token = torch.where(taken, own, forced)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def sequential_tokens(
    model: Any,
    jobs: Sequence[Job],
    *,
    special: Ints,
    temperature: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> list[Ints]:
    """The model's own tokens, each after the mixed context so far.

    Args:
        model: as for :func:`parallel_tokens`, and so are
        jobs: a batch of them,
        special: the special tokens, and
        temperature: the temperature.
        options: more for ``generate``, such as ``{"assistant_model": small}``, for a job at a time.

    Returns:
        For each job its own tokens, int64 (R,).
    """
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    begins = [0 if decoder or not len(job.places) else int(job.places[0]) for job in jobs]
    texts = [job.targets if decoder else job.tokens[begin:] for job, begin in zip(jobs, begins, strict=True)]
    inside = [
        np.arange(len(job.targets)) if decoder else job.places - begin for job, begin in zip(jobs, begins, strict=True)
    ]
    steps = max((int(places[-1]) + 1 for places in inside if len(places)), default=0)
    if not steps:
        return [job.targets for job in jobs]
    shape = len(jobs), steps
    forced, replaced, lots = np.zeros(shape, np.int64), np.zeros(shape, np.bool_), np.zeros(shape)
    for row, (job, text, places) in enumerate(zip(jobs, texts, inside, strict=True)):
        forced[row, : len(text)] = text[:steps]
        replaced[row, places] = job.replaced & ~np.isin(job.targets, special)
        lots[row, places] = job.lots
    prompts = [job.tokens if decoder else job.tokens[:begin] for job, begin in zip(jobs, begins, strict=True)]
    device = model.device
    inputs = _padded(prompts, device) if decoder else _padded_left(prompts, device)
    begin = 1 if decoder else inputs["input_ids"].shape[1]
    given, taken, kept = (torch.from_numpy(array).to(device) for array in (forced, replaced, special))
    writing = _Writing(begin, given, taken, torch.from_numpy(lots), kept, temperature)
    with _own_decisions(model, decoder):
        model.generate(**inputs, max_new_tokens=steps, do_sample=False, logits_processor=[writing], **(options or {}))
    own = writing.own.cpu().numpy()
    found = [own[row, places] for row, places in enumerate(inside)]
    if any((tokens == NEVER).any() for tokens in found):
        raise ValueError(
            "self-generated tokens: generate() ended before the responses did; nothing was written. Leave out what "
            "ends it: stopping criteria, a time limit, eos_token_id."
        )
    return found


def _padded_left(rows: Sequence[Ints], device: Any) -> dict[str, Tensor]:
    tensors = [torch.from_numpy(row) for row in rows]
    ids, mask = (
        pad_sequence(parts, batch_first=True, padding_side="left")
        for parts in (tensors, [torch.ones_like(row) for row in tensors])
    )
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


@contextmanager
def _own_decisions(model: Any, decoder: bool) -> Iterator[None]:
    """Without the model's own settings of ``generate``: nothing ends a row early or bends its logits."""
    generation = optional_import("refresh_self_tokens", "transformers", "hf").GenerationConfig
    plain = generation(pad_token_id=0, decoder_start_token_id=_decoder_start(model) if decoder else None)
    given = [(holder, holder.generation_config) for holder in _layers(model) if "generation_config" in vars(holder)]
    for holder, _ in given:
        holder.generation_config = plain
    try:
        yield
    finally:
        for holder, config in given:
            holder.generation_config = config


def written_answers(
    model: Any,
    prompts: Sequence[Ints],
    lots: Sequence[NDArray[np.float64]],
    *,
    most: int,
    ends: Ints,
    special: Ints,
    temperature: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> list[Ints]:
    """What the model writes after prompts, until it ends by itself: int64 (A,) each, A <= most, no special tokens.

    Those that it begins with, as some decoders do, are left out, and so is all from the next one on.

    Args:
        model: of transformers, in evaluation mode.
        prompts: int64 (P,) each.
        lots: float64 (most,) each, what each token is sampled with.
        most: tokens at the most.
        ends: int64 (E,), the tokens that end generation, at least one.
        special: int64, the special tokens, with these.
        temperature: see :func:`choose`.
        options: more for ``generate``.
    """
    decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    inputs = _padded(prompts, model.device) if decoder else _padded_left(prompts, model.device)
    given = dict(options or {})
    if temperature > 0:
        begin = 1 if decoder else inputs["input_ids"].shape[1]
        count = len(prompts), most
        free = torch.ones(count, dtype=torch.bool, device=model.device)
        drawn = torch.from_numpy(np.stack(lots))
        none = torch.empty(0, dtype=torch.int64, device=model.device)
        given["num_beams"] = 1
        given["logits_processor"] = [_Writing(begin, free.long(), free, drawn, none, temperature)]
    settings = {"max_new_tokens": most, "do_sample": False, "eos_token_id": ends.tolist(), "pad_token_id": int(ends[0])}
    found = model.generate(**inputs, **{**settings, **given})
    found = found[:, 1 if decoder else inputs["input_ids"].shape[1] :].cpu().numpy()
    return [_answer(row, ends, special) for row in found]


def _answer(tokens: Ints, ends: Ints, special: Ints) -> Ints:
    ended, kept = np.isin(tokens, ends), ~np.isin(tokens, special)
    if ended.any():
        tokens, kept = tokens[: ended.argmax()], kept[: ended.argmax()]
    begin = int(kept.argmax()) if kept.any() else len(kept)
    rest = kept[begin:]
    return tokens[begin:] if rest.all() else tokens[begin : begin + int(rest.argmin())]

"""The next version of a token buffer, written by all ranks together: which samples, and what was counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from samplewise.cuda_ext import Ledger
from samplewise.cuda_ext.ranks import gather_rows, rank, world_size
from samplewise.loaders.negatives import fetched
from samplewise.loaders.ragged import Ragged
from samplewise.loaders.seeding import generator
from samplewise.loaders.table import Version
from samplewise.plugins.search import progress_bar
from samplewise.plugins.token_buffer import Bools, Ints, Kind, Sample, TokenBuffer, Writer, digests, read_sample
from samplewise.plugins.token_rollouts import undisturbed

STRETCH = 64  # batches whose documents are sorted by length together
_SCANNED = 4096  # samples at a time

T = TypeVar("T")
Counts = dict[str, int]
"""Sums over samples, of which a refresh's figures are made."""


class Written(NamedTuple):
    """What was generated for some samples.

    Attributes:
        tokens: a row for each.
        replaced: bool (M,), which of them were context for the next.
        counts: sums over them.
    """

    tokens: Ragged
    replaced: Bools
    counts: Counts


class Running(NamedTuple):
    """How a version is written.

    Attributes:
        batch_size: documents at a time.
        ledger: of the samples' losses, None: chance decides who is first.
        budget: tokens that are generated at the most, None: all.
        progress: whether to show bars on a terminal.
    """

    batch_size: int
    ledger: Ledger | None
    budget: int | None
    progress: bool


Write = Callable[[Any, Ints, Sequence[Sample]], Written]
"""From the model in evaluation mode, ids and samples to what the model writes for them."""


def refresh_order(
    lengths: Ints, versions: NDArray[Any], losses: NDArray[Any] | None, *, budget: int | None, rng: np.random.Generator
) -> Ints:
    """Which samples are refreshed: int64 (n,), the most urgent first.

    Those of the highest loss come first, those without one last, and among equals the oldest tokens; then chance
    decides. Samples with nothing to generate are left out.

    Args:
        lengths: int64 (N,), the tokens that each takes.
        versions: int (N,), in which each was generated, 0: never.
        losses: float (N,), NaN where there is none; None: of all.
        budget: the most tokens in all; the order ends before the sample that goes beyond; None: no limit.
        rng: decides among equals.

    Raises:
        ValueError: the first sample alone goes beyond the budget.
    """
    losses = np.full(len(lengths), np.nan) if losses is None else losses
    urgency = np.where(np.isnan(losses), np.inf, -losses)  # ascending: the highest loss first, none last
    order: Ints = np.lexsort((rng.random(len(lengths)), versions, urgency))
    order = order[lengths[order] > 0]
    if budget is None:
        return order
    kept = order[np.cumsum(lengths[order]) <= budget]
    if len(order) and not len(kept):
        raise ValueError(
            f"budget={budget}: the first sample that is due, {order[0]}, takes {lengths[order[0]]} tokens; give more."
        )
    return kept


def write_version(
    owner: str,
    model: Any,
    buffer: TokenBuffer,
    write: Write,
    *,
    meta: Mapping[str, Any],
    capacity: int | None,
    running: Running,
) -> tuple[Counts, float]:
    """Generate for the samples that are due, and make it the buffer's next version. Collective.

    Args:
        owner: function that is called, for errors.
        model: of transformers.
        buffer: with its data.
        write: makes the rows.
        meta: notes of the version, which its rows are found by later; ``seed`` and ``epoch`` of them decide the order.
        capacity: tokens of each row; None: those of its response, which a row that is not generated has until then.
        running: how it is done.

    Returns:
        The counts of all ranks, with ``total``: tokens of all rows, ``compared`` and ``changed``: of those that the
        version before had generated, and those that it had otherwise; and the seconds.
    """
    begin = perf_counter()
    if buffer.data is None:
        raise ValueError(f"{owner}: this buffer is a copy without its data; take the one that was made with them.")
    ledger, shown, epoch = running.ledger, running.progress and rank() == 0, int(meta["epoch"])
    if ledger is not None and ledger.size != buffer.size:
        raise ValueError(f"{owner}(ledger): it has {ledger.size} samples, the data {buffer.size}; give the sampler's.")
    inner = model_of(model)
    seq2seq = bool(getattr(inner.config, "is_encoder_decoder", False))
    before = buffer.table.snapshot() if buffer.version else None
    if before is not None and bool(before.meta["seq2seq"]) != seq2seq:
        raise ValueError(f"{owner}(model): the buffer was written by a model of another kind; take another folder.")
    if before is not None:
        buffer.check_kind(before.meta, str(meta["kind"]))
    if before is None:
        lengths, reference = on_all_ranks(lambda: _scan(owner, buffer, seq2seq, shown))
        versions = np.zeros(buffer.size, np.int32)
    else:
        lengths, reference = np.diff(before.arrays["offsets"]), np.asarray(before.arrays["digests"])
        versions = np.asarray(before.arrays["versions"])
    capacities = lengths if capacity is None else np.full(buffer.size, capacity, np.int64)
    if before is not None and (lengths != capacities).any():
        raise ValueError(
            f"{owner}(max_new_tokens={capacity}): the buffer's rows hold {lengths[0]} tokens; give that, or take "
            f"another folder."
        )
    losses = None if ledger is None else ledger.column("loss_ema").cpu().numpy()
    rng = generator(int(meta["seed"]), epoch, buffer.version, "refresh")
    takes = np.where(reference != 0, capacities, 0)  # the digest of an empty response is 0
    due = on_all_ranks(lambda: refresh_order(takes, versions, losses, budget=running.budget, rng=rng))
    due = np.sort(gather_rows(torch.from_numpy(due if rank() == 0 else due[:0]))[0].numpy())  # ledgers may differ
    notes = {**meta, "seq2seq": seq2seq, "settings": _settings(meta, before, buffer.version + 1)}
    counts: Counts = {}
    bar = progress_bar("self-generated tokens", len(due), shown)
    with undisturbed(inner), ExitStack() as stack:
        stack.callback(bar.close)
        writer = on_first_rank(lambda: stack.enter_context(buffer.writing(capacities, reference, notes)))
        if before is None and capacity is None:
            others = np.setdiff1d(np.arange(buffer.size), due)
            on_first_rank(lambda: _fill(owner, buffer, writer, others, seq2seq))
        stretch = STRETCH * running.batch_size * world_size()
        for ids in np.split(due, range(stretch, len(due), stretch)):
            own = ids[rank() :: world_size()]
            work = partial(_generate, owner, inner, buffer, write, own, reference, seq2seq, meta["kind"])
            everyone, tokens, replaced, found = _gathered(own, on_all_ranks(work))
            counts = {name: counts.get(name, 0) + value for name, value in found.items()}
            on_first_rank(partial(Writer.put, writer, everyone, tokens, replaced))
            bar.update(len(ids))
        on_first_rank(stack.close)  # publishes the version
    counts["total"] = int(capacities.sum())
    return counts, perf_counter() - begin


def _settings(meta: Mapping[str, Any], before: Version | None, number: int) -> dict[str, Any]:
    """Under each version that rows may be of, what it was generated with."""
    if before is None:
        return {str(number): dict(meta)}
    used = {str(version) for version in np.unique(before.arrays["versions"]).tolist()}
    return {**{key: value for key, value in before.meta["settings"].items() if key in used}, str(number): dict(meta)}


def model_of(model: Any) -> Any:
    """The model without its DDP wrapper.

    Raises:
        TypeError: no model of transformers.
        ValueError: one with peft's prompt tuning.
    """
    inner = getattr(model, "module", model) if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
    if not (isinstance(inner, torch.nn.Module) and hasattr(inner, "generate") and hasattr(inner, "config")):
        raise TypeError(
            f"model={type(inner).__name__}: a language model of transformers is needed, with generate() and config; "
            f"of a LightningModule give the model in it."
        )
    if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "model: peft's prompt and prefix tuning put tokens of their own before the text, whose places they shift; "
            "use another adapter, such as LoRA."
        )
    return inner


def on_all_ranks(work: Callable[[], T]) -> T:
    """What ``work`` gives; what goes wrong on one rank is raised on all, since the others would wait. Collective."""
    if world_size() == 1:
        return work()
    fault: Exception | None = None
    try:
        result = work()
    except Exception as error:
        fault = error
    faults: list[str | None] = [None] * world_size()
    dist.all_gather_object(faults, None if fault is None else f"{type(fault).__name__}: {fault}")
    if fault is not None:
        raise fault
    if any(faults):
        raise RuntimeError("; ".join(f"rank {number}: {text}" for number, text in enumerate(faults) if text))
    return result


def on_first_rank(work: Callable[[], T]) -> T:
    """What ``work`` gives on rank 0, which alone does it; on the others nothing that may be used. Collective."""
    return on_all_ranks(work if rank() == 0 else lambda: cast(T, None))


def read_samples(owner: str, buffer: TokenBuffer, ids: Ints, *, seq2seq: bool) -> list[Sample]:
    """Some samples of a buffer's data.

    Raises:
        TypeError, ValueError: items that are not understood, see :func:`~samplewise.plugins.token_buffer.read_sample`.
    """
    items = fetched(buffer.data, ids, "data")
    return [
        read_sample(item, f"{owner}: sample {row}", seq2seq=seq2seq)
        for row, item in zip(ids.tolist(), items, strict=True)
    ]


def _scan(owner: str, buffer: TokenBuffer, seq2seq: bool, progress: bool) -> tuple[Ints, NDArray[np.uint64]]:
    """Lengths int64 (N,) and digests uint64 (N,) of all responses; each sample is checked. Not collective."""
    lengths, reference = np.zeros(buffer.size, np.int64), np.zeros(buffer.size, np.uint64)
    bar = progress_bar("reading the responses", buffer.size, progress)
    for low in range(0, buffer.size, _SCANNED):
        ids = np.arange(low, min(low + _SCANNED, buffer.size))
        targets = Ragged.from_lists([s.targets for s in read_samples(owner, buffer, ids, seq2seq=seq2seq)])
        lengths[ids], reference[ids] = targets.lengths, digests(targets.values, targets.offsets)
        bar.update(len(ids))
    bar.close()
    if not lengths.any():
        raise ValueError(
            f"{owner}: no sample has a response; labels must hold its tokens, and -100 on the prompt only."
        )
    return lengths, reference


def _fill(owner: str, buffer: TokenBuffer, writer: Writer, ids: Ints, seq2seq: bool) -> None:
    """The references of what is not generated yet."""
    for low in range(0, len(ids), _SCANNED):
        part = ids[low : low + _SCANNED]
        samples = read_samples(owner, buffer, part, seq2seq=seq2seq)
        writer.fill(part, Ragged.from_lists([sample.targets for sample in samples]))


def _generate(
    owner: str,
    model: Any,
    buffer: TokenBuffer,
    write: Write,
    ids: Ints,
    reference: NDArray[np.uint64],
    seq2seq: bool,
    kind: Kind,
) -> Written:
    samples = read_samples(owner, buffer, ids, seq2seq=seq2seq)
    targets = Ragged.from_lists([sample.targets for sample in samples])
    differ = digests(targets.values, targets.offsets) != reference[ids]
    if differ.any():
        raise ValueError(
            f"{owner}: the response of sample {ids[int(differ.argmax())]} is not the one that the buffer was made for; "
            f"the data have changed, or are in another order: take another folder for them."
        )
    written = write(model, ids, samples)
    counts = {**written.counts, "compared": 0, "changed": 0}
    if buffer.version:
        rows = buffer.take(ids, kind)
        for place in np.flatnonzero(rows.versions > 0).tolist():
            old, new = rows.tokens[place], written.tokens[place]
            counts["compared"] += len(new)
            counts["changed"] += int((old != new).sum()) if len(old) == len(new) else len(new)
    return Written(written.tokens, written.replaced, counts)


def _gathered(ids: Ints, written: Written) -> tuple[Ints, Ragged, Bools, Counts]:
    """All ranks' rows and the sums of their counts. Collective."""
    lengths = torch.from_numpy(np.diff(written.tokens.offsets))
    everyone, lengths = gather_rows(torch.from_numpy(ids), lengths)
    tokens, replaced = gather_rows(torch.from_numpy(written.tokens.values), torch.from_numpy(written.replaced))
    sums = gather_rows(torch.tensor([list(written.counts.values())]))[0].sum(0).tolist()
    offsets = np.concatenate(([0], np.cumsum(lengths.numpy())))
    counts = dict(zip(written.counts, sums, strict=True))
    return everyone.numpy(), Ragged(tokens.numpy(), offsets), replaced.numpy(), counts

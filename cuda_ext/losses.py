"""Losses and gradient norms of single samples from their logits: the ops, in one place to read, and the user's helper.

The loss of a row of logits z (V,) with label y and the norm of its gradient with respect to z,

    loss = log sum_j exp(z_j) - z_y        norm = ||softmax(z) - onehot(y)||,

come from A = sum_{j != y} exp(z_j) and Q = sum_{j != y} exp(z_j)^2, one pass, with no difference of nearly equal
numbers, so that a confident row keeps all its digits:

    x = A / exp(z_y)     loss = log(1 + x)     1 - p_y = x / (1 + x)     norm = (1 - p_y) sqrt(1 + Q / A^2).

The reference below adds in the order that ``csrc/losses.h`` describes and gives the same bits as the native kernels,
but for those of a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samplewise.cuda_ext.checks import integer
from samplewise.cuda_ext.elementary import (
    LN2_HIGH,
    LN2_LOW,
    LOG2E,
    ROUNDER,
    log1p_positive,
    log_positive,
    power_of_two,
    scaled_exp,
    square_root,
)
from samplewise.cuda_ext.ops import LIBRARY, NAMESPACE

_GROUP, _LANES, _PARTS = 8, 2048, 16  # lanes of a thread, lanes of a row, threads left for the last addition
_FAINT = 62  # a term below 2^-62 of its lane's scale is left out: its square stays a normal number
_SLACK = 30  # a lane's terms may exceed its scale by this power of two before it is scaled anew
_LIMIT = 4096.0  # logits within +-_LIMIT are taken as they are; other rows again, less their maximum
_LOWEST = -5850  # first scale of a lane: terms of logits below about -4096 vanish against it
_PIECE = {"cpu": 1 << 17}  # logits at a time: temporaries that stay in the cache
_LARGE_PIECE = 1 << 22


class SampleLosses(NamedTuple):
    """What :func:`sample_losses` returns: float32 (B,) each.

    Attributes:
        losses: one loss a sample, differentiable.
        norms: norms of the losses' gradients with respect to the sample's logits, not differentiable.
    """

    losses: Tensor
    norms: Tensor


def sample_losses(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, causal: bool = False) -> SampleLosses:
    """Cross entropy of each sample, and the norm of its gradient with respect to the sample's logits, in one pass.

    For a row of logits z with label y: ``loss = log sum_j exp(z_j) - z_y`` and ``norm = ||softmax(z) - onehot(y)||``.
    A sequence's loss is the mean over its T tokens whose label is not ``ignore_index``, and ``norm = sqrt(sum_t
    norm_t^2) / count``; with no such token both are 0. Times a constant of the network, the norm bounds the norm of the
    gradient with respect to all weights: an importance that costs no backward pass (Katharopoulos and Fleuret, "Not All
    Samples Are Created Equal: Deep Learning with Importance Sampling", ICML 2018).

    ::

        losses, norms = sample_losses(model(x), y)
        loss = sampler.observe(ids, losses, scores=norms)
        loss.backward()

    A logit of -inf is a class that cannot be; where it is the label's, the loss is inf. A logit of inf or NaN makes the
    loss and the norm NaN, and so does, on a GPU, a label that is no class (there, raising would wait for the device).

    Args:
        logits: (B, V), or (B, T, V) for sequences; bfloat16, float16 or float32, summed in float32. float64 is rounded
            to float32.
        labels: int64 or int32 (B,) or (B, T); classes in [0, V), or ``ignore_index``.
        ignore_index: label of what counts nowhere: its loss, norm and gradient are 0.
        causal: True for (B, T, V) logits where those at t predict the label at t + 1, as a causal language model's do.
            Shifts the labels, which spares the copy of ``logits[:, :-1]``.

    Raises:
        TypeError: logits that are not floating point, labels that are not int64 or int32.
        ValueError: shapes that do not fit together, no classes, ``causal`` without sequences.
        IndexError: a label that is neither a class nor ``ignore_index`` (CPU; in a compiled function a RuntimeError).
        RuntimeError: a second or a forward-mode derivative is asked for.

    Example:
        >>> losses, norms = sample_losses(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 0]))
        >>> losses
        tensor([6.9315e-01, 1.9287e-22])
        >>> norms
        tensor([7.0711e-01, 2.7277e-22])
    """
    ignore_index = integer("sample_losses", "ignore_index", ignore_index, -(1 << 63), (1 << 63) - 1)
    _check(logits, labels, causal)
    logits = logits.float() if logits.dtype == torch.float64 else logits
    labels = labels.long()
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad.unpack_dual(logits).tangent is not None:
        raise RuntimeError("sample_losses has no forward-mode derivative; use F.cross_entropy(..., reduction='none').")
    if logits.dim() == 2:
        return SampleLosses(*_rows(logits, labels, ignore_index))
    if causal:
        labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    losses, norms = _rows(logits.flatten(0, 1), labels.flatten(), ignore_index)
    count = (labels != ignore_index).sum(1).clamp_min(1)
    return SampleLosses(
        (losses.view(labels.shape).sum(1, dtype=torch.float64) / count).float(),  # in float64 any order gives the same
        torch.linalg.vector_norm(norms.view(labels.shape), dim=1, dtype=torch.float64).float() / count,
    )


def _rows(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    try:
        losses, norms, _ = torch.ops.samplewise.sample_losses(logits, labels, ignore_index)
    except RuntimeError as error:
        if "label" in str(error):
            _check_labels(labels, logits.shape[1], ignore_index)
        raise
    return losses, norms


def _check(logits: Tensor, labels: Tensor, causal: bool) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TypeError(f"sample_losses(logits={_kind(logits)}): logits must be a floating point tensor.")
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"sample_losses(labels={_kind(labels)}): labels must be an int64 or int32 tensor of class numbers; "
            f"soft targets are not supported."
        )
    if logits.dim() not in (2, 3) or labels.shape != logits.shape[:-1] or logits.shape[-1] == 0:
        raise ValueError(
            f"sample_losses: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must be (B, V) and (B,), or "
            f"(B, T, V) and (B, T), with V > 0 classes last."
        )
    if labels.device != logits.device:
        raise ValueError(
            f"sample_losses: logits on {logits.device} and labels on {labels.device} must be on one device."
        )
    if causal and logits.dim() == 2:
        raise ValueError(f"sample_losses(causal=True): logits {tuple(logits.shape)} must be sequences, (B, T, V).")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    bad = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if bad.numel():
        raise IndexError(
            f"sample_losses: label {int(bad[0])} is outside [0, {classes}), the logits' last dimension. "
            f"Mark what must not count with ignore_index={ignore_index}."
        )


# --- sample_losses ----------------------------------------------------------------------------------------------------

LIBRARY.define(
    "sample_losses(Tensor logits, Tensor labels, int ignore_index) -> (Tensor losses, Tensor norms, Tensor state)"
)
# logits (R, V) float32, bfloat16 or float16, any strides; labels int64 (R,); losses, norms float32 (R,);
# state float32 (R, 4), what the gradient needs: shift, origin, inverse and 1 - p_y of each row, with
# softmax(z)_j = exp(z_j - shift) / 2^(ROUNDER - origin) * inverse.


@torch.library.impl(LIBRARY, "sample_losses", "CompositeExplicitAutograd")
def _reference(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    classes = logits.shape[1]
    counted = labels != ignore_index
    if logits.device.type == "cpu":
        _check_labels(labels, classes, ignore_index)
    inside = (labels >= 0) & (labels < classes)
    out = logits.new_empty((logits.shape[0], 6), dtype=torch.float32)
    for rows in _pieces(logits):
        part, index = logits[rows], labels[rows].clamp(0, classes - 1)[:, None]
        own = part.gather(1, index)[:, 0].float()
        shift = torch.zeros_like(own)
        origin, sums, squares = _sums(part, index, shift)
        settled = (sums >= 0) & (origin < ROUNDER - (_LOWEST + 128)) & (own.abs() <= _LIMIT)
        again = (~settled & counted[rows] & inside[rows]).nonzero()[:, 0]
        if again.numel():
            shift[again] = part[again].float().amax(1)
            redone = _sums(part[again], index[again], shift[again])
            origin[again], sums[again], squares[again] = redone
            own = own - shift
        out[rows] = _finished(origin, sums, squares, own.masked_fill(~inside[rows], torch.nan), shift)
    out = out.masked_fill_(~counted[:, None], 0.0)
    losses, norms, state = (part.clone(memory_format=torch.contiguous_format) for part in out.split((1, 1, 4), 1))
    return losses[:, 0], norms[:, 0], state


def _pieces(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows such that a temporary of a lane's width each holds 2^17 (GPU: 2^22) numbers."""
    rows, classes = logits.shape
    width = min(classes, _LANES)
    step = max(1, _PIECE.get(logits.device.type, _LARGE_PIECE) // max(width, 1))
    for begin in range(0, rows, step):
        yield slice(begin, begin + step)


def _sums(logits: Tensor, index: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (as origin), sum and sum of squares of exp(z - shift) over the classes that are not ``index`` (R, 1)."""
    rows, classes = logits.shape
    threads = 1 << max(0, math.ceil(math.log2(min(classes, _LANES) / _GROUP)))
    width = threads * _GROUP
    origin = logits.new_full((rows, width), ROUNDER - _LOWEST, dtype=torch.float32)
    sums, squares = torch.zeros_like(origin), torch.zeros_like(origin)
    for begin in range(0, classes, width):
        z = logits[:, begin : begin + width].float() - shift[:, None]
        own = torch.arange(begin, begin + z.shape[1], device=z.device) == index
        z = z.masked_fill_(own, -torch.inf)
        z = torch.nn.functional.pad(z, (0, width - z.shape[1]), value=-torch.inf)
        grows = ~(z * LOG2E + origin <= ROUNDER + _SLACK)  # NaN too
        if z.device.type != "cpu" or grows.any():
            origin, sums, squares = _raised(z, grows, origin, sums, squares)
        value = scaled_exp(z, origin, _FAINT)
        sums, squares = sums + value, squares + value * value
    parts = min(threads, _PARTS)
    origin, sums, squares = (
        lane.view(rows, threads // parts, parts, _GROUP).permute(3, 1, 2, 0) for lane in (origin, sums, squares)
    )
    for _ in range(3):  # the lanes of a thread; threads t, t + 16, ...; what is left
        origin, sums, squares = _added(origin, sums, squares)
    return _normalised(origin, sums, squares)


def _added(origin: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lanes along the first dimension at the largest scale among them, added in halves."""
    least = origin.amin(0)
    sums, squares = _rescaled(origin, least, sums, squares)
    half = sums.shape[0] // 2
    while half:
        sums, squares = sums[:half] + sums[half : 2 * half], squares[:half] + squares[half : 2 * half]
        half //= 2
    return least, sums[0], squares[0]


def _rescaled(old: Tensor, new: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    scale = power_of_two(new.view(torch.int32) - old.view(torch.int32))
    return sums * scale, squares * scale * scale


def _raised(z: Tensor, grows: Tensor, origin: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lanes that ``grows`` marks at the scale of exp(z); their sums NaN where z is NaN or above the limit."""
    new = ROUNDER - ((z * LOG2E + ROUNDER) - ROUNDER)
    moved, moved_squares = _rescaled(origin, new, sums, squares)
    moved = moved.masked_fill_(~(z <= _LIMIT), torch.nan)
    return torch.where(grows, new, origin), torch.where(grows, moved, sums), torch.where(grows, moved_squares, squares)


def _normalised(origin: Tensor, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The lanes at a scale where the sum lies in [1, 2), unless it is 0."""
    exponent = ((sums.view(torch.int32) >> 23) & 0x1FF) - 127
    new = origin - exponent.float()
    scale = power_of_two(-exponent)
    return new, sums * scale, squares * scale * scale


def _finished(origin: Tensor, sums: Tensor, squares: Tensor, label: Tensor, shift: Tensor) -> Tensor:
    """Columns loss, norm, shift, origin, inverse and 1 - p_y, (R, 6), from the sums over j != y and the label's z.

    With d the power of two that the label's scale is above the others', the smaller term is divided by the larger. A
    shift of -0, the maximum of zeros, becomes 0.
    """
    bounded = torch.where(label < -_LIMIT, -_LIMIT, label)
    own_origin = ROUNDER - ((bounded * LOG2E + ROUNDER) - ROUNDER)
    own = scaled_exp(bounded, own_origin, _FAINT)
    d = origin.view(torch.int32) - own_origin.view(torch.int32)
    likely = d >= 0
    large = torch.where(likely, own, sums)
    small = torch.where(likely, sums, own) * power_of_two(-d.abs())
    x = small / large
    steps = torch.where(likely, 0.0, d.float())
    offset = torch.where(likely, 0.0, log_positive(sums / own)) - steps * LN2_LOW
    loss = (bounded - label) + (log1p_positive(x) + offset - steps * LN2_HIGH)
    complement = torch.where(likely, x, 1.0) / (1.0 + x)
    spread = torch.where(sums > 0, squares / sums / sums, 0.0)
    norm = complement * square_root(1.0 + spread)
    inverse = torch.reciprocal(large + small)
    out = torch.stack((loss, norm, shift + 0.0, torch.where(likely, own_origin, origin), inverse, complement), 1)
    return out.masked_fill_(~((sums >= 0) & (label == label))[:, None], torch.nan)


def _fake(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return rows, torch.empty_like(rows), rows.new_empty((logits.shape[0], 4))


torch.library.register_fake(f"{NAMESPACE}::sample_losses", _fake, lib=LIBRARY)


# --- its gradient -----------------------------------------------------------------------------------------------------

LIBRARY.define(
    "sample_losses_backward(Tensor grad, Tensor logits, Tensor labels, Tensor state, int ignore_index) -> Tensor"
)
# grad float32 (R,): of the losses. Returns (softmax(z) - onehot(y)) grad, (R, V) in the logits' dtype.


@torch.library.impl(LIBRARY, "sample_losses_backward", "CompositeExplicitAutograd")
def _backward_reference(grad: Tensor, logits: Tensor, labels: Tensor, state: Tensor, ignore_index: int) -> Tensor:
    classes = logits.shape[1]
    out = logits.new_empty(logits.shape)
    for rows in _pieces(logits):
        shift, origin, inverse, complement = state[rows, :, None].unbind(1)
        outer, y = grad[rows, None], labels[rows, None]
        coefficient, own = inverse * outer, -complement * outer
        for begin in range(0, classes, _LANES):
            columns = slice(begin, begin + _LANES)
            part = scaled_exp(logits[rows, columns].float() - shift, origin, 125) * coefficient
            at = torch.arange(begin, begin + part.shape[1], device=part.device)
            part = torch.where(at == y, own, part).masked_fill_(y == ignore_index, 0.0)
            out[rows, columns] = part.to(out.dtype)
    return out


def _backward_fake(grad: Tensor, logits: Tensor, labels: Tensor, state: Tensor, ignore_index: int) -> Tensor:
    return logits.new_empty(logits.shape)


torch.library.register_fake(f"{NAMESPACE}::sample_losses_backward", _backward_fake, lib=LIBRARY)


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("sample_losses can be differentiated once only; use F.cross_entropy(..., reduction='none').")


torch.library.register_autograd(f"{NAMESPACE}::sample_losses_backward", _refuse, lib=LIBRARY)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, ctx.ignore_index = inputs
    _, norms, state = output
    ctx.mark_non_differentiable(norms, state)
    ctx.save_for_backward(logits, labels, state)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
    logits, labels, state = ctx.saved_tensors
    grad_logits = torch.ops.samplewise.sample_losses_backward(grad, logits, labels, state, ctx.ignore_index)
    return grad_logits, None, None


torch.library.register_autograd(f"{NAMESPACE}::sample_losses", _backward, setup_context=_setup_context, lib=LIBRARY)

"""Group-wise quantization of weights at any width from 1 to 8 bits, packed without waste.

Of a weight w in a group with the range [low, high], at b bits (asymmetric round-to-nearest, "RTN"):

    scale = (high - low) / (2^b - 1),   code = clamp(round((w - low) / scale), 0, 2^b - 1),   w' = low + scale * code

so that |w - w'| <= scale / 2 for every w in the range, and a little more for what rounding the range to float16 shuts
out.

Kept libraries do not fit under several widths of one layer: torchao spends a byte on each weight of every width below 8
bits, and bitsandbytes has 4 and 8 bits alone. Codes of 2 + 3 + 4 bits take 9 bits a weight here, and a range of 32 bits
for each group; widths with the same range share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from samplewise.cuda_ext.checks import integer

FindRange = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""From weights in groups, float32 ``(O, G, g)``, and a width in bits to ``low`` and ``high``, ``(O, G)`` each."""


def min_max(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The range of round-to-nearest: from the smallest to the largest weight of each group, whatever the width."""
    low, high = groups.aminmax(dim=-1)
    return low, high


def group_ranges(weight: Tensor, bits: int, group_size: int, find: FindRange = min_max) -> Tensor:
    """The range of each group of ``group_size`` inputs.

    Args:
        weight: ``(O, I)``, finite; I is a multiple of ``group_size``.
        bits: the width.
        group_size: g, weights in a group.
        find: how the range is found.

    Returns:
        low and high, float16 ``(2, O, I / g)``.
    """
    groups = weight.detach().float().unflatten(1, (-1, group_size))
    return torch.stack(find(groups, bits)).half()


def encode(weight: Tensor, ranges: Tensor, bits: int) -> Tensor:
    """The nearest codes, uint8 ``(O, I)``, of weights ``(O, I)`` for their groups' ranges ``(2, O, G)``."""
    groups = weight.detach().float().unflatten(1, (ranges.shape[2], -1))
    low, scale = _affine(ranges, bits)
    codes = torch.where(scale > 0, (groups - low) / scale, 0).round_().clamp_(0, 2**bits - 1)
    return codes.flatten(1).to(torch.uint8)


def decode(codes: Tensor, ranges: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights ``(O, I)``, low + scale * code, that codes ``(O, I)`` stand for, rounded to ``dtype``."""
    low, scale = _affine(ranges, bits)
    groups = codes.float().unflatten(1, (ranges.shape[2], -1))
    decoded: Tensor = groups.mul_(scale).add_(low).flatten(1)  # twice as fast as addcmul
    return decoded.to(dtype)


def _affine(ranges: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Low end and step of each group, float32 ``(O, G, 1)``."""
    low, high = ranges.float().unsqueeze(-1)
    return low, (high - low) / (2**bits - 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits in ``bits`` bits each.

    The bits of a code are split into fields of 4, 2 and 1 bits (3 = 2 + 1); each field is packed by itself: a byte has
    the fields of codes that are n / (codes in a byte) apart, so that packing and unpacking are a few long operations.

    Args:
        codes: uint8, n of them in any shape; n is a multiple of 8.
        bits: 1 to 8.

    Returns:
        uint8 ``(n * bits / 8,)``.
    """
    codes, parts, shift = codes.flatten(), [], 0
    for field in _fields(bits):
        values = (codes >> shift) & (2**field - 1)
        rows = values.view(8 // field, -1)
        packed = rows[0].clone()
        for place, row in enumerate(rows[1:], start=1):
            packed |= row << (place * field)
        parts.append(packed)
        shift += field
    return torch.cat(parts)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes, uint8 ``(n,)``, of what :func:`pack` gave."""
    count = packed.numel() * 8 // bits
    codes, shift, begin = torch.empty(0), 0, 0
    for field in _fields(bits):
        part = packed[begin : begin + count * field // 8]
        values = torch.empty(8 // field, part.numel(), dtype=torch.uint8, device=packed.device)
        for place, row in enumerate(values):
            torch.bitwise_right_shift(part, place * field, out=row).bitwise_and_(2**field - 1)
        codes = values.flatten() if shift == 0 else codes.bitwise_or_(values.flatten().bitwise_left_shift_(shift))
        shift += field
        begin += part.numel()
    return codes


def _fields(bits: int) -> list[int]:
    """The binary digits of ``bits``, largest first: 3 -> [2, 1]."""
    return [field for field in (8, 4, 2, 1) if bits & field]


def check_bits(owner: str, bits: Sequence[int]) -> tuple[int, ...]:
    """Widths in bits, ascending and distinct, each in [1, 8]."""
    if isinstance(bits, int | str):
        raise TypeError(f"{owner}(bits={bits!r}): must be a list of widths, such as ({bits},).")
    widths = tuple(integer(owner, "bits", width, 1, 8, what="a list of widths") for width in bits)
    if not widths or list(widths) != sorted(set(widths)):
        raise ValueError(f"{owner}(bits={tuple(bits)!r}): must name at least one width, in ascending order, each once.")
    return widths

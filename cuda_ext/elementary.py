"""Elementary functions of float32 tensors that give the same bits as ``csrc/elementary.h``, operation for operation.

They are built from additions, multiplications, divisions and moves of bits alone, each of which IEEE 754 rounds in one
way: no library's ``exp`` or ``log``, and no fused multiply-add, whose last bits differ from machine to machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

LN2_HIGH, LN2_LOW = 0.693145752, 1.42860677e-06
LOG2E = 1.44269504
ROUNDER = 12582912.0
"""1.5 * 2^23: the floats around it are the integers, so adding it rounds to one."""


def log_positive(x: Tensor) -> Tensor:
    """Natural logarithm of positive, normal, finite values, float32 of any shape, to within 2 ulp.

    With x = 2^e m, m in [sqrt(1/2), sqrt(2)) and s = (m - 1) / (m + 1): e log 2 + 2 (s + s^3/3 + s^5/5 + ...).
    """
    bits = x.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).view(torch.float32) - 1.0
    s = f / (2.0 + f)
    z = s * s
    series = z * (2 / 3 + z * (2 / 5 + z * (2 / 7 + z * (2 / 9))))
    scale = e.to(torch.float32)
    return scale * LN2_HIGH + (scale * LN2_LOW + (s * 2.0 + s * series))


def log1p_positive(x: Tensor) -> Tensor:
    """``log(1 + x)`` of values in [0, 2^100], float32 of any shape, to within 4 ulp.

    The logarithm of the rounded 1 + x, and to first order what the rounding took.
    """
    u = 1.0 + x
    return log_positive(u) + (x - (u - 1.0)) / u


def square_root(x: Tensor) -> Tensor:
    """The float32 nearest to the square root, of any shape. Not every vector library rounds it right; float64 does."""
    return torch.sqrt(x.double()).float()


def power_of_two(d: Tensor) -> Tensor:
    """``2^d`` as float32, of int32 values d <= 127 of any shape; 0 below the normal numbers."""
    return ((d + 127) << 23).view(torch.float32).masked_fill(d < -126, 0.0)


def scaled_exp(z: Tensor, origin: Tensor, faint: int) -> Tensor:
    """``exp(z) / 2^K`` to within 2.5e-7 of itself, float32; 0 where it is below ``2^-faint``.

    With k the integer nearest to z / log 2 and f = z - k log 2, it is exp(f) 2^(k - K), exp(f) a polynomial on
    [-0.35, 0.35].

    Args:
        z: float32 of any shape; in [-4096, 4096], or smaller than what ``faint`` allows (-inf too).
        origin: ``ROUNDER - K`` with an integer K in [-8192, 8192], float32, of a shape that broadcasts to z's. The
            result lies below 2^31.
        faint: at most 125.
    """
    r = z * LOG2E + origin  # k - K in its last bits
    k = r - origin
    f = (z - k * 0.693359375) - k * -2.12194440e-4
    series = 0.49999225 + f * (0.1666712 + f * (0.04189128 + f * 0.0083123986))
    power = (1.0 + f * (1.0 + f * series)).view(torch.int32) + (r.view(torch.int32) << 23)
    return power.view(torch.float32).masked_fill(r < ROUNDER - faint, 0.0)

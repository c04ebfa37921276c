"""Elementary functions of float32 tensors that give the same bits as ``csrc/elementary.h``, operation for operation.

They are built from additions, multiplications, divisions and moves of bits alone, each of which IEEE 754 rounds in one
way: no library's ``exp`` or ``log``, and no fused multiply-add, whose last bits differ from machine to machine.
"""

from __future__ import annotations

import torch
from torch import Tensor

LN2_HIGH, LN2_LOW = 0.693145752, 1.42860677e-06


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

"""Linear layers that hold their frozen weights at several bit widths, of which each uses one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from samplewise.cuda_ext.checks import integer
from samplewise.plugins.quantize import FindRange, check_bits, decode, encode, group_ranges, min_max, pack, unpack


class MultiBitLinear(nn.Linear):
    """A frozen linear layer at several bit widths, of which one, ``width``, is in use.

    It holds the codes of each width, ``bits / 8`` bytes a weight, and the ranges of the groups: see
    :mod:`samplewise.plugins.quantize`. Neither full-precision weights nor, between forward and backward, decoded ones
    are kept: the backward pass decodes them once more, at the width that the forward pass had.

    Args:
        linear: the layer to take the place of; it is left as it is.
        bits: the widths, ascending.
        group_size: weights of a row with a range of their own; a divisor of the inputs, and a multiple of 8.
        name: of the layer, in its model: what configurations call it.
        find: how a group's range is found.

    Attributes:
        width: the width in use, one of ``bits``; the largest at first.
    """

    def __init__(
        self, linear: nn.Linear, *, bits: Sequence[int], group_size: int, name: str = "", find: FindRange = min_max
    ):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size, self.name = tuple(bits), group_size, name
        self.width, self.weight_dtype = self.bits[-1], linear.weight.dtype
        self.bias: Any = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), False)
        ranges = [group_ranges(linear.weight, width, group_size, find) for width in self.bits]
        for width, found in zip(self.bits, ranges, strict=True):
            self.register_parameter(f"codes_{width}", _frozen(pack(encode(linear.weight, found, width), width)))
        same = all(torch.equal(found, ranges[0]) for found in ranges)
        kept = torch.stack(ranges[:1] if same else ranges)
        self.ranges = _frozen(kept.view(torch.uint8))  # as bytes: module.to(bfloat16) would round them
        self.train(linear.training)

    def range_of(self, width: int) -> Tensor:
        """Low and high of each group at a width, float16 ``(2, O, G)``."""
        own = self.ranges[self.bits.index(width) if len(self.ranges) > 1 else 0]
        return own.view(torch.float16)

    def decoded(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights at a width, ``(O, I)``."""
        codes = unpack(getattr(self, f"codes_{width}"), width).view(self.out_features, self.in_features)
        return decode(codes, self.range_of(width), width, dtype)

    @property
    def weight(self) -> Tensor:
        """The weights at the width in use, decoded anew: ``(O, I)``."""
        return self.decoded(self.width, self.weight_dtype)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise AttributeError(f"{self.name or type(self).__name__}: quantized weights cannot be replaced")

    @property
    def stored_bits(self) -> int:
        """Bits that codes and ranges of all widths take."""
        parts = [getattr(self, f"codes_{width}") for width in self.bits]
        return sum(8 * part.numel() * part.element_size() for part in [*parts, self.ranges])

    @override
    def forward(self, x: Tensor) -> Tensor:
        """``x @ W_width.T + bias``; under autocast in its dtype, else in that of ``x`` ``(..., I)``."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y: Tensor = _Product.apply(x.to(dtype), self, self.width)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(dtype)

    @override
    def extra_repr(self) -> str:
        widths = "+".join(map(str, self.bits))
        return f"{self.in_features}, {self.out_features}, bits={widths}, group_size={self.group_size}"


class _Product(torch.autograd.Function):
    """x W', with gradients for x alone; W is decoded anew in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: MultiBitLinear, width: int) -> Tensor:
        ctx.layer, ctx.width = layer, width
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, layer.decoded(width, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.layer.decoded(ctx.width, grad.dtype), None, None


def quantize_model(
    model: nn.Module,
    *,
    bits: Sequence[int] = (2, 3, 4),
    group_size: int = 64,
    targets: Sequence[str] | None = None,
    find: FindRange = min_max,
) -> list[str]:
    """Replace a model's linear layers by :class:`MultiBitLinear`, in place, one at a time.

    Args:
        model: with its pretrained weights.
        bits: the widths, ascending, each in [1, 8].
        group_size: weights of a row with a range of their own, a multiple of 8.
        targets: names of layers, or their last parts (``"q_proj"``); None: all linear layers but the output embedding.
        find: how a group's range is found; another one than round-to-nearest's may be given.

    Returns:
        The layers' names, in the model's order: what :class:`~samplewise.plugins.BitSchedule` takes.

    Raises:
        ValueError: widths that are none, inputs that groups do not divide, weights that are not finite, or targets that
            name no linear layer. The model is left as it was.
    """
    bits = check_bits("quantize_model", bits)
    group_size = integer("quantize_model", "group_size", group_size, 8, what="the number of weights that share a range")
    if group_size % 8:
        raise ValueError(f"quantize_model(group_size={group_size}): must be a multiple of 8, for whole bytes of codes.")
    found = _targets(model, targets)
    for name, linear in found.items():
        if linear.weight.is_meta or not linear.weight.numel():
            raise ValueError(f"quantize_model(model): {name} has no weights; load them first.")
        if linear.in_features % group_size:
            raise ValueError(
                f"quantize_model(group_size={group_size}): {name} has {linear.in_features} inputs, which groups of "
                f"{group_size} do not divide; take a divisor, or leave the layer out of targets."
            )
        if not bool(linear.weight.isfinite().all()):
            raise ValueError(f"quantize_model(model): {name} has weights that are not finite.")
        if float(linear.weight.detach().abs().max()) > torch.finfo(torch.float16).max:
            raise ValueError(f"quantize_model(model): {name} has weights beyond float16, which ranges are kept in.")
    aliases: dict[int, list[str]] = {id(linear): [] for linear in found.values()}
    for name, module in model.named_modules(remove_duplicate=False):  # a layer may be registered under several names
        if id(module) in aliases:
            aliases[id(module)].append(name)
    for name, linear in found.items():
        new = MultiBitLinear(linear, bits=bits, group_size=group_size, name=name, find=find)
        for other in aliases[id(linear)]:
            parent, _, own = other.rpartition(".")
            setattr(model.get_submodule(parent), own, new)
    return list(found)


def _targets(model: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Linear]:
    if any(hasattr(module, "lora_A") for module in model.modules()):
        raise ValueError("quantize_model(model): it has adapters; quantize the model first, then add_adapters(model).")
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    if targets is None:
        getters = [getattr(module, "get_output_embeddings", lambda: None) for module in model.modules()]
        outputs = {id(getter()) for getter in getters}
        found = {name: module for name, module in linear.items() if id(module) not in outputs}
        if not found:
            again = any(isinstance(module, MultiBitLinear) for module in model.modules())
            reason = "its linear layers are quantized already" if again else "it has no linear layers (torch.nn.Linear)"
            raise ValueError(f"quantize_model(model): {reason}.")
        return found
    if isinstance(targets, str):
        raise TypeError(f"quantize_model(targets={targets!r}): must be a list of names: targets=[{targets!r}].")
    if not targets:
        raise ValueError("quantize_model(targets=[]): must name at least one linear layer; None takes all.")
    for target in targets:
        if not any(_is_named(name, target) for name in linear):
            known = linear if "." in target else {name.rpartition(".")[2] for name in linear}
            raise ValueError(
                f"quantize_model(targets): there is no linear layer {target!r}{near(target, sorted(known))}."
            )
    return {name: module for name, module in linear.items() if any(_is_named(name, target) for target in targets)}


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def near(name: str, known: Iterable[str]) -> str:
    """For an error: the name of ``known`` that is most like a wrong one."""
    known = list(known)
    like = get_close_matches(name, known, n=1)
    return f"; did you mean {like[0]!r}" if like else f"; there are {len(known)}, such as {known[:1]}"


def _frozen(values: Tensor) -> nn.Parameter:
    """A parameter that is not trained; DDP would send a buffer from rank 0 in every forward pass."""
    return nn.Parameter(values, requires_grad=False)

"""One model at several bit widths, with low-rank adapters: which width each layer uses, and with it which adapter.

The model of "One QuantLLM for ALL" (Yi et al., ACL 2025, LLM-QFA): per linear layer frozen weights W_b, quantized
group-wise at every width b, and an adapter of its own for each width (decoupled):

    y = x W_b'  +  (alpha / r) (x A_b') B_b'  +  bias

`set_bits` chooses b for every layer without allocating anything. Adapters are peft's (one named after each width), so
that what peft has works on them: dropout, rank patterns, saving, loading. peft switches the adapters of a whole
model; here each layer has its own switch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samplewise.cuda_ext.checks import integer, optional_import
from samplewise.loaders.seeding import derive
from samplewise.plugins.multi_bit import MultiBitLinear, near

SHARED = "shared"
_REFUSED = {"use_dora", "lora_bias", "bias", "modules_to_save", "target_modules", "target_parameters", "fan_in_fan_out"}


@dataclass(frozen=True)
class Site:
    """A quantized layer in a model, and the peft layer with its adapters around it, where there is one."""

    linear: MultiBitLinear
    lora: Any = None

    @property
    def adapters(self) -> Mapping[str, tuple[nn.Parameter, ...]]:
        """The trainable parameters of each adapter, under its name."""
        if self.lora is None:
            return {}
        parts = [getattr(self.lora, part) for part in self.lora.adapter_layer_names]
        return {
            name: tuple(p for part in parts if name in part for p in part[name].parameters())
            for name in self.lora.lora_A
        }

    @property
    def in_use(self) -> str:
        """The name of the adapter that belongs to the width in use."""
        return SHARED if self.lora is not None and SHARED in self.lora.lora_A else adapter_name(self.linear.width)


def adapter_name(width: int) -> str:
    """What peft calls the adapter of a width."""
    return f"bits{width}"


def add_adapters(
    model: nn.Module, *, rank: int = 16, alpha: float = 32, shared: bool = False, seed: int = 0, **lora: Any
) -> nn.Module:
    """Put peft's low-rank adapters around a model's quantized layers: one for each width, or one for all of them.

    Args:
        model: what :func:`quantize_model` was called on.
        rank: r of the adapters.
        alpha: their outputs are multiplied by alpha / r.
        shared: one adapter for all widths of a layer in place of one for each.
        seed: their first values depend on it and on nothing else; all widths of a layer start alike.
        **lora: more of peft's ``LoraConfig``, such as ``lora_dropout``; nothing that adds to B A, or changes W.

    Returns:
        peft's model around ``model``; nothing but the adapters is trainable.

    Raises:
        ImportError: without peft.
        ValueError: the model has no quantized layers, or has adapters already.
    """
    peft = optional_import("add_adapters", "peft", "quant")
    rank = integer("add_adapters", "rank", rank, 1)
    if wrong := sorted(set(lora) & _REFUSED):
        raise ValueError(f"add_adapters({wrong[0]}=...): cannot be had here, where an adapter is B A and nothing else.")
    if lora.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(
            f"add_adapters(init_lora_weights={lora['init_lora_weights']!r}): changes the weights, which are packed; "
            f"take True, False, 'gaussian' or 'orthogonal'."
        )
    sites = find_layers(model)
    if any(site.lora is not None for site in sites.values()):
        raise ValueError("add_adapters(model): it has adapters already.")
    names = [SHARED] if shared else [adapter_name(width) for width in _widths(sites)]
    places = [name for name, module in model.named_modules() if isinstance(module, MultiBitLinear)]
    targets = "|".join(map(re.escape, places))  # peft takes a list for ends of names, a pattern for whole names
    given = {"r": rank, "lora_alpha": alpha, "target_modules": targets, **lora}
    wrapped: Any = None
    for name in names:
        config = peft.LoraConfig(**given)
        with torch.random.fork_rng(_cuda_devices(model)):
            torch.manual_seed(derive(seed, "adapters"))
            if wrapped is None:
                wrapped = peft.get_peft_model(model, config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
    wrapped.merge_and_unload = wrapped.merge_adapter = _refuse_merge
    set_bits(wrapped, {name: max(site.linear.bits) for name, site in sites.items()})
    return wrapped  # type: ignore[no-any-return]


def _refuse_merge(*_: Any, **__: Any) -> None:
    raise RuntimeError("peft cannot merge adapters into quantized layers; call merged(model, config) for a plain copy.")


def _widths(sites: Mapping[str, Site]) -> list[int]:
    return sorted({width for site in sites.values() for width in site.linear.bits})


def _cuda_devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})


def find_layers(model: nn.Module) -> dict[str, Site]:
    """A model's quantized layers under their names, whatever is wrapped around the model.

    Raises:
        ValueError: there are none, or two have the same name.
    """
    wrapped = {
        id(module.base_layer): module
        for module in model.modules()
        if isinstance(getattr(module, "base_layer", None), MultiBitLinear)
    }
    found: dict[str, Site] = {}
    for linear in model.modules():
        if isinstance(linear, MultiBitLinear):
            if linear.name in found:
                raise ValueError(f"find_layers(model): two quantized layers have the name {linear.name!r}.")
            found[linear.name] = Site(linear, wrapped.get(id(linear)))
    if not found:
        raise ValueError("find_layers(model): it has no quantized layers; call quantize_model(model) first.")
    return found


Model = nn.Module | Mapping[str, Site]
"""A model, or, so that it need not be searched in each step, what `find_layers` found in it."""


def set_bits(model: Model, config: int | Mapping[str, int]) -> None:
    """Choose every layer's width, and with it its adapter; nothing is allocated or copied.

    Call it between optimizer steps: checkpointed activations are recomputed at the widths that are in use then.

    Args:
        model: with quantized layers; or, in a loop, what :func:`find_layers` gave, which saves a search in each step.
        config: one width for all layers, or a width for each layer's full name; layers that it does not name stay as
            they are.

    Raises:
        ValueError: an unknown layer or a width that a layer does not have. Nothing is changed then.
    """
    sites = _sites(model)
    chosen = config if isinstance(config, Mapping) else dict.fromkeys(sites, config)
    for name, width in chosen.items():
        if name not in sites:
            raise ValueError(f"set_bits(config): there is no quantized layer {name!r}{near(name, sites)}.")
        if width not in sites[name].linear.bits:
            has = ", ".join(map(str, sites[name].linear.bits))
            raise ValueError(f"set_bits(config): {name} is to have {width!r} bits, and is quantized at {has}.")
        site = sites[name]
        if site.lora is not None and not {SHARED, adapter_name(width)} & set(site.lora.lora_A):
            raise ValueError(f"set_bits(config): {name} has no adapter for {width} bits; load or add it.")
    for name, width in chosen.items():
        site = sites[name]
        site.linear.width = int(width)
        if site.lora is not None and site.lora.active_adapters != [site.in_use]:
            site.lora.set_adapter(site.in_use)
            # peft freezes the others. They are out of the graph and need no freezing, which DDP would not see either.
            site.lora.set_requires_grad(list(site.lora.lora_A), True)


def get_bits(model: Model) -> dict[str, int]:
    """The width in use of every quantized layer."""
    return {name: site.linear.width for name, site in _sites(model).items()}


def drop_unsampled_gradients(model: Model) -> None:
    """Set the gradients of all adapters that are not in use to None, so that no optimizer moves them.

    An optimizer leaves a parameter without a gradient alone; one with a gradient of zeros moves by momentum and weight
    decay. Call it before the optimizer's step where gradients may be zeros: after ``zero_grad(set_to_none=False)``, and
    with DDP.
    """
    for site in _sites(model).values():
        for name, parameters in site.adapters.items():
            if name != site.in_use:
                for parameter in parameters:
                    parameter.grad = None


def gradient_norms(model: Model) -> dict[str, Tensor]:
    """The norm of the gradient of every layer's adapter in use, 0 where it has none; nothing waits for a GPU."""
    norms = {}
    for name, site in _sites(model).items():
        grads = [p.grad for p in site.adapters.get(site.in_use, ()) if p.grad is not None]
        norms[name] = (
            torch.nn.utils.get_total_norm(grads) if grads else torch.zeros((), device=site.linear.ranges.device)
        )
    return norms


def layer_sizes(model: Model) -> dict[str, int]:
    """The number of weights of every quantized layer: what averages over weights, not layers, need."""
    linears = {name: site.linear for name, site in _sites(model).items()}
    return {name: linear.in_features * linear.out_features for name, linear in linears.items()}


def stored_bits_per_weight(model: Model) -> float:
    """Bits that the quantized layers' weights take, codes and ranges of all widths, for each weight."""
    sites = _sites(model)
    return sum(site.linear.stored_bits for site in sites.values()) / sum(layer_sizes(sites).values())


def merged(model: nn.Module, config: int | Mapping[str, int], *, dtype: torch.dtype | None = None) -> nn.Module:
    """A plain copy of the model at one configuration: ordinary linear layers with the decoded weights plus B A.

    Args:
        model: with quantized layers, with or without adapters, also wrapped by peft; it is left as it is.
        config: the widths, as in :func:`set_bits`.
        dtype: of the new layers' weights; None: what they had before they were quantized.

    Returns:
        What the model was before :func:`quantize_model`, with other weights: transformers can save it, for example. Its
        parameters are not trainable.
    """
    with pinned(model, config) as sites:
        plain: dict[int, Any] = {}
        for site in sites.values():
            plain[id(site.linear if site.lora is None else site.lora)] = _plain(site, dtype)
        base: nn.Module = getattr(model, "get_base_model", lambda: model)()
        copied = copy.deepcopy(base, plain)  # which takes what stands for an object in the memo instead of copying it
        copied.__dict__.pop("peft_config", None)  # peft leaves its mark on the model that it wraps
        return copied


@torch.no_grad()
def _plain(site: Site, dtype: torch.dtype | None) -> nn.Linear:
    layer, name = site.linear, site.in_use
    weight = layer.decoded(layer.width)
    if site.lora is not None:
        weight += site.lora.get_delta_weight(name).float()
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype or layer.weight_dtype), False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().clone().to(dtype or layer.weight_dtype), False)
    return linear.train(layer.training)


def _sites(model: Model) -> Mapping[str, Site]:
    return find_layers(model) if isinstance(model, nn.Module) else model


@contextmanager
def pinned(model: Model, config: int | Mapping[str, int]) -> Iterator[Mapping[str, Site]]:
    """A context in which the model has one configuration; afterwards it has the one from before again."""
    sites = _sites(model)
    before = get_bits(sites)
    set_bits(sites, config)
    try:
        yield sites
    finally:
        set_bits(sites, before)

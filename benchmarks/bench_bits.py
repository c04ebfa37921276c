"""Training at several bit widths: a step once for all against one at a single width and against plain LoRA; switching.

`--hidden`, `--layers`, `--batch` and `--length` change the model and the batch; `--device cuda` runs it on a GPU.
"""

import argparse
import itertools
from collections.abc import Callable

import torch
from timing import best_of_each, header, judged, table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from samplewise.loaders import FixedSchedule, Schedule
from samplewise.plugins import BitSchedule, add_adapters, quantize_model, set_bits
from samplewise.plugins.bit_adapters import find_layers, stored_bits_per_weight
from samplewise.plugins.quantize import decode, encode, group_ranges, pack, unpack


def llama(args: argparse.Namespace) -> nn.Module:
    """Random weights."""
    config = LlamaConfig(
        hidden_size=args.hidden, intermediate_size=args.hidden * 8 // 3 // 64 * 64, num_hidden_layers=args.layers,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=1024,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config).to(args.device)
    return model


def stepper(model: nn.Module, schedule: Schedule | None, ids: Tensor) -> Callable[[], None]:
    """One optimizer step a call, bookkeeping of the schedule included."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    sites = find_layers(model) if schedule is not None else {}
    numbers = itertools.count()

    def step() -> None:
        number = next(numbers)
        if schedule is not None:
            set_bits(sites, schedule.draw(number))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.record(number, loss=loss)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return step


def steps(args: argparse.Namespace) -> None:
    """Whole training steps; they take turns."""
    import peft

    ids = torch.randint(0, 1024, (args.batch, args.length), device=args.device)
    models = {name: llama(args) for name in ("once for all, balanced", "once for all, uniform", "one width: 3 bits")}
    calls: dict[str, Callable[[], None]] = {}
    for name, model in models.items():
        layers = quantize_model(model)
        mapping = {"once for all, balanced": "maxent", "once for all, uniform": "uniform"}.get(name)
        one = FixedSchedule([dict.fromkeys(layers, 3)])
        schedule = one if mapping is None else BitSchedule(layers=layers, mapping=mapping, period=args.repeat)
        calls[name] = stepper(add_adapters(model), schedule, ids)
    plain = llama(args)
    names = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    lora = peft.get_peft_model(plain, peft.LoraConfig(r=16, lora_alpha=32, target_modules=names))
    calls["peft's LoRA on float32 weights"] = stepper(lora, None, ids)
    totals = dict.fromkeys(calls, 0.0)
    best_of_each(calls, repeat=2)  # to warm up
    for _ in range(args.repeat):
        for name, seconds in best_of_each(calls, repeat=1).items():
            totals[name] += seconds / args.repeat  # the mean, since widths differ from step to step
    single = totals["one width: 3 bits"]
    rows = [
        [name, f"{s * 1e3:.1f}", judged(s / single, most=1.15) if name.startswith("once") else f"{s / single:.2f}x"]
        for name, s in totals.items()
    ]
    table(
        [f"{args.layers} blocks of {args.hidden}, {args.batch} x {args.length} tokens", "ms a step", "to one width"],
        rows,
    )


def switching(args: argparse.Namespace) -> None:
    """What a schedule does in a step, for as many layers as a 7B model has."""
    layers = [f"blocks.{block}.{name}" for block in range(32) for name in ("q", "k", "v", "o", "gate", "up", "down")]
    schedules = {
        mapping: BitSchedule(layers=layers, mapping=mapping) for mapping in ("maxent", "adjacent", "uniform", "loss")
    }
    numbers = itertools.count()
    calls: dict[str, Callable[[], object]] = {}
    for mapping, schedule in schedules.items():
        calls[f"draw, {mapping}"] = lambda schedule=schedule: schedule.draw(next(numbers))
        calls[f"record, {mapping}"] = lambda schedule=schedule: schedule.record(next(numbers), loss=1.0)
    linear = nn.ModuleDict({str(i): nn.Linear(64, 64) for i in range(len(layers))})
    quantize_model(linear)
    sites = find_layers(add_adapters(linear))
    drawn = [dict(zip(sites, schedules["uniform"].draw(step).values(), strict=True)) for step in range(8)]
    calls["set_bits"] = lambda: set_bits(sites, drawn[next(numbers) % 8])
    seconds = best_of_each(calls, repeat=5, number=100)
    table([f"{len(layers)} layers", "us a step"], [[name, f"{s * 1e6:.0f}"] for name, s in seconds.items()])


def storage(args: argparse.Namespace) -> None:
    """Bits a weight, and the time to decode one."""
    linear = nn.Sequential(nn.Linear(4096, 1024))
    quantize_model(linear)
    ours = stored_bits_per_weight(linear)
    rows = [
        ["packed: 2 + 3 + 4 bits, groups of 64", f"{ours:.2f}"],
        ["a byte for each width", "24.5"],
        ["bfloat16", "16"],
    ]
    table(["weights at three widths", "bits a weight"], rows)
    weight = torch.randn(1024, 4096, device=args.device)
    calls = {}
    for bits in (2, 3, 4, 8):
        ranges = group_ranges(weight, bits, 64)
        packed = pack(encode(weight, ranges, bits), bits)
        calls[bits] = lambda packed=packed, ranges=ranges, bits=bits: decode(
            unpack(packed, bits).view(1024, 4096), ranges, bits
        )
    seconds = best_of_each(calls, repeat=10)
    table(["decoding", "ns a weight"], [[f"{b} bits", f"{s / weight.numel() * 1e9:.2f}"] for b, s in seconds.items()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    header(__doc__)
    steps(given)
    switching(given)
    storage(given)

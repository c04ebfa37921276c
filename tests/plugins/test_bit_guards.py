"""What goes wrong without a word elsewhere: peft's ways that packed weights cannot follow, layers with two names."""

import numpy as np
import pytest
import torch
from bits_support import tiny_llama, tiny_quantized, token_ids
from torch import nn

from samplewise.loaders import FixedSchedule
from samplewise.plugins import ArmSchedule, BitSchedule, add_adapters, quantize_model, set_bits
from samplewise.plugins.bit_adapters import find_layers, layer_sizes, merged
from samplewise.plugins.bit_search import search_bits
from samplewise.plugins.multi_bit import MultiBitLinear
from samplewise.plugins.quantize import decode, encode, group_ranges


@pytest.mark.parametrize("method", ["merge_and_unload", "merge_adapter"])
def test_peft_cannot_merge_into_packed_weights(method):
    model, _ = tiny_quantized()
    with pytest.raises(RuntimeError, match=r"merged\(model, config\)"):
        getattr(model, method)()


@pytest.mark.parametrize(
    "given",
    [
        {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"]}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    ],
)  # fmt: skip
def test_adapters_that_are_not_b_a_alone_are_refused_and_nothing_changes(given):
    model = tiny_llama()
    quantize_model(model, group_size=32)
    with pytest.raises(ValueError, match=rf"add_adapters\({next(iter(given))}="):
        add_adapters(model, **given)
    assert all(site.lora is None for site in find_layers(model).values())


def test_adapters_are_around_quantized_layers_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.vision = nn.Linear(64, 64), nn.ModuleDict({"proj": nn.Conv2d(3, 8, 1)})

    model = Model()
    quantize_model(model, group_size=32)
    wrapped = add_adapters(model, rank=2)
    assert not any("vision" in name and "lora" in name for name, _ in wrapped.named_parameters())


def test_a_width_without_an_adapter_is_refused():
    model, layers = tiny_quantized()
    model.delete_adapter("bits3")
    with pytest.raises(ValueError, match="has no adapter for 3 bits"):
        set_bits(model, 3)
    set_bits(model, dict.fromkeys(layers, 2))


def test_a_layer_with_two_names_stays_one_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = self.a

    model = Model()
    assert quantize_model(model, group_size=32) == ["a"]
    assert model.a is model.b
    assert isinstance(model.a, MultiBitLinear)


def test_the_output_embedding_of_a_model_within_another_is_left():
    outer = nn.Module()
    outer.model = tiny_llama()
    assert not any("lm_head" in name for name in quantize_model(outer, group_size=32))


def test_order_and_repetition():
    model, _ = tiny_quantized()
    with pytest.raises(ValueError, match="quantize the model first"):
        quantize_model(model, group_size=32)
    plain = nn.Sequential(nn.Linear(64, 64))
    quantize_model(plain, group_size=32)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(plain, group_size=32)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="0 has no weights"):
        quantize_model(empty, group_size=32)


def test_low_precision_rounds_once():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 1e-3
    for bits in (2, 4, 8):
        ranges = group_ranges(weight, bits, 32)
        codes = encode(weight, ranges, bits)
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(decode(codes, ranges, bits, dtype), decode(codes, ranges, bits).to(dtype))


@pytest.mark.parametrize("arms", [np.array([128, 256, 1024]), torch.tensor([128, 256, 1024])], ids=["numpy", "torch"])
def test_numbers_of_numpy_and_torch_are_numbers(arms):
    schedule = ArmSchedule(arms=arms)
    assert schedule.costs.tolist() == [128, 256, 1024]
    schedule.load_state_dict(ArmSchedule(arms=[128, 256, 1024]).state_dict())
    assert FixedSchedule(list(arms)[::-1]).costs.tolist() == [128, 256, 1024]
    with pytest.raises(ValueError, match="ascending"):
        ArmSchedule(arms=np.array([1024, 128]))


@pytest.mark.parametrize(("mapping", "name"), [("loss", "loss"), ("grad_norm", "scores")])
def test_what_draws_depend_on_must_be_recorded(mapping, name):
    schedule = BitSchedule(layers=["a"], mapping=mapping)
    with pytest.raises(ValueError, match=rf"record\({name}=None\)"):
        schedule.record(0)
    assert schedule.step == 0


@pytest.mark.parametrize("change", [{"counts": [[1, 2]]}, {"losses": [[0.0]]}, {"bins": [[0], [0]]}])
def test_a_damaged_state_changes_nothing(change):
    schedule = BitSchedule(layers=["a"])
    schedule.record(0, loss=1.0)
    before = schedule.state_dict()
    with pytest.raises(ValueError, match="damaged"):
        schedule.load_state_dict({**before, "step": 9, **change})
    assert schedule.state_dict() == before


def test_a_search_that_does_not_switch_is_told_of():
    with pytest.warns(UserWarning, match=r"same loss .* call set_bits"):
        search_bits(lambda config: 1.0, layers=["a", "b"], budget=3)


def test_sizes_and_a_budget_over_weights():
    model, layers = tiny_quantized()
    sizes = layer_sizes(model)
    assert list(sizes) == layers
    assert sum(sizes.values()) == sum(p.numel() for n, p in tiny_llama().named_parameters() if "_proj" in n)
    found = search_bits(lambda config: -float(sum(config.values())), layers=layers, sizes=sizes, budget=2.5, first=20)
    for config in found.configs:
        assert sum(sizes[name] * bits for name, bits in config.items()) <= 2.5 * sum(sizes.values()) + 1e-6
    assert merged(model, found.best_config)(input_ids=token_ids()).logits.isfinite().all()

import copy

import numpy as np
import pytest
import torch
from bits_support import tiny_llama, tiny_quantized, token_ids
from torch import nn
from torch.utils.checkpoint import checkpoint

from samplewise.plugins.bit_adapters import (
    add_adapters,
    drop_unsampled_gradients,
    find_layers,
    get_bits,
    gradient_norms,
    merged,
    pinned,
    set_bits,
)
from samplewise.plugins.multi_bit import MultiBitLinear, quantize_model

IDS = token_ids()


@pytest.fixture(scope="module")
def shared_model():
    """For tests that leave it as it was, but for its configuration and gradients."""
    return tiny_quantized()


@pytest.fixture
def tiny(shared_model):
    model, layers = shared_model
    model.zero_grad()
    set_bits(model, 4)
    return model, layers


def mixed(layers, shift=0):
    return {name: 2 + (n + shift) % 3 for n, name in enumerate(layers)}


def loss_of(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def by_hand(model, config):
    """The logits of a plain model in which each weight is W' + (alpha / r) B A."""
    plain = tiny_llama()
    with torch.no_grad():
        for name, site in find_layers(model).items():
            width = config if isinstance(config, int) else config[name]
            adapter = f"bits{width}" if "shared" not in site.lora.lora_A else "shared"
            a, b = site.lora.lora_A[adapter].weight, site.lora.lora_B[adapter].weight
            plain.get_submodule(name).weight.copy_(site.linear.decoded(width) + 32 / a.shape[0] * b @ a)
    return logits(plain)


def adapters_of(model, layers):
    """{(layer, adapter): (A, B)}"""
    sites = find_layers(model)
    return {(name, adapter): pair for name in layers for adapter, pair in sites[name].adapters.items()}


# --- adding them ---


def test_each_width_has_an_adapter(tiny):
    model, layers = tiny
    pairs = adapters_of(model, layers)
    assert set(pairs) == {(name, f"bits{width}") for name in layers for width in (2, 3, 4)}
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for pair in pairs.values() for p in pair}
    assert get_bits(model) == dict.fromkeys(layers, 4)
    assert all(a.shape[0] == 4 and b.shape[1] == 4 for a, b in pairs.values())


def test_shared_adapters():
    model, layers = tiny_quantized(shared=True)
    assert set(adapters_of(model, layers)) == {(name, "shared") for name in layers}
    for config in (2, mixed(layers)):
        set_bits(model, config)
        torch.testing.assert_close(logits(model), by_hand(model, config), atol=1e-5, rtol=1e-5)
    loss_of(model).backward()
    drop_unsampled_gradients(model)
    assert all(p.grad is not None for pair in adapters_of(model, layers).values() for p in pair)


def build(seed, **options):
    model = tiny_llama()
    quantize_model(model, group_size=32)
    return add_adapters(model, rank=4, seed=seed, **options)


def test_first_values_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first, after = build(0), torch.get_rng_state()
    torch.manual_seed(2)
    again, other = build(0), build(1)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), after)
    values = [{n: p for n, p in model.named_parameters() if "lora_" in n} for model in (first, again, other)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert not any(torch.equal(values[0][name], values[2][name]) for name in values[0] if "lora_A" in name)
    for name, value in values[0].items():
        assert torch.equal(value, values[0][name.replace("bits2", "bits4")])
        assert "lora_A" in name or not value.any()


def test_layers_with_widths_of_their_own():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    quantize_model(model, bits=[2, 4], group_size=32, targets=["0"])
    quantize_model(model, bits=[2, 3], group_size=32, targets=["1"])
    wrapped = add_adapters(model, rank=2)
    assert get_bits(wrapped) == {"0": 4, "1": 3}
    assert {name: site.in_use for name, site in find_layers(wrapped).items()} == {"0": "bits4", "1": "bits3"}


def test_errors_of_add_adapters(tiny):
    with pytest.raises(ValueError, match=r"no quantized layers; call quantize_model\(model\) first"):
        add_adapters(tiny_llama())
    with pytest.raises(ValueError, match=r"add_adapters\(model\): it has adapters already"):
        add_adapters(tiny[0])
    for rank, error in ((0, ValueError), (2.0, TypeError)):
        with pytest.raises(error, match=rf"add_adapters\(rank={rank}\)"):
            add_adapters(tiny[0], rank=rank)


def test_two_layers_of_one_name():
    parts = [nn.Sequential(nn.Linear(8, 8)) for _ in range(2)]
    for part in parts:
        quantize_model(part, group_size=8)
    with pytest.raises(ValueError, match="two quantized layers have the name '0'"):
        find_layers(nn.ModuleList(parts))


# --- configurations ---


@pytest.mark.parametrize("config", [2, 3, 4, "mixed"])
def test_outputs_are_those_of_decoded_weights_and_adapters(tiny, config):
    model, layers = tiny
    config = mixed(layers) if config == "mixed" else config
    set_bits(model, config)
    torch.testing.assert_close(logits(model), by_hand(model, config), atol=1e-5, rtol=1e-5)


def test_set_bits_allocates_nothing(tiny):
    model, layers = tiny

    def parameters():
        return {name: (id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()}

    sites, before = find_layers(model), parameters()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for target in (model, sites):
            for config in (2, mixed(layers), 4):
                set_bits(target, config)
                assert parameters() == before
    assert not [event for event in profile.events() if event.name.startswith("aten::")]


def test_part_of_a_configuration(tiny):
    model, layers = tiny
    set_bits(model, {layers[3]: 2})
    assert get_bits(model) == {**dict.fromkeys(layers, 4), layers[3]: 2}
    set_bits(model, {})
    assert get_bits(model)[layers[3]] == 2
    set_bits(model, np.int64(3))
    assert get_bits(model) == dict.fromkeys(layers, 3)


@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (5, "is to have 5 bits, and is quantized at 2, 3, 4"),
        (None, "is to have None bits"),
        ({"model.layers.0.mlp.up_porj": 2}, "no quantized layer .*; did you mean 'model.layers.0.mlp.up_proj'"),
        ({"model.layers.0.mlp.up_proj": 2, "model.layers.1.mlp.up_proj": 8}, "layers.1.mlp.up_proj is to have 8 bits"),
        ({"model.layers.0.mlp.up_proj": 2, "x": 2}, "no quantized layer 'x'; there are 14"),
    ],
)
def test_a_bad_configuration_changes_nothing(tiny, config, rule):
    model, layers = tiny
    set_bits(model, mixed(layers))
    for change in (set_bits, lambda m, c: pinned(m, c).__enter__()):
        with pytest.raises(ValueError, match=r"set_bits\(config\): .*" + rule):
            change(model, config)
        assert get_bits(model) == mixed(layers)


def test_pinned_restores(tiny):
    model, layers = tiny
    set_bits(model, mixed(layers))
    with pinned(model, 2):
        assert set(get_bits(model).values()) == {2}
        assert {site.lora.active_adapters[0] for site in find_layers(model).values()} == {"bits2"}
    assert get_bits(model) == mixed(layers)

    def fail():
        with pinned(model, {layers[0]: 4}):
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert get_bits(model) == mixed(layers)
    assert all(site.lora.active_adapters == [site.in_use] for site in find_layers(model).values())


# --- training ---


def test_gradients_reach_the_sampled_adapters_alone(tiny):
    model, layers = tiny
    for shift in range(3):
        model.zero_grad()
        config = mixed(layers, shift)
        set_bits(model, config)
        loss_of(model).backward()
        for (name, adapter), pair in adapters_of(model, layers).items():
            sampled = adapter == f"bits{config[name]}"
            assert all((p.grad is not None and bool(p.grad.any())) == sampled for p in pair)
            assert sampled or all(p.grad is None for p in pair)
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= {
        n for n, _ in model.named_parameters() if "lora_" in n
    }


def test_norms_are_of_the_adapters_in_use(tiny):
    model, layers = tiny
    assert gradient_norms(model) == dict.fromkeys(layers, 0)
    config = mixed(layers)
    set_bits(model, config)
    loss_of(model).backward()
    norms, pairs = gradient_norms(model), adapters_of(model, layers)
    assert list(norms) == layers
    for name in layers:
        grads = [p.grad.flatten() for p in pairs[name, f"bits{config[name]}"]]
        torch.testing.assert_close(norms[name], torch.cat(grads).norm())


@pytest.mark.parametrize("to_none", [True, False])
def test_unsampled_adapters_stay(to_none):
    """Width 3 is trained first, so that it has momentum; then it is left out for some steps with weight decay."""
    model, layers = tiny_quantized()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)

    def step(config):
        set_bits(model, config)
        optimizer.zero_grad(set_to_none=to_none)
        loss_of(model).backward()
        if not to_none:
            drop_unsampled_gradients(model)
        optimizer.step()

    for _ in range(2):
        step(3)
    before = {key: [p.detach().clone() for p in pair] for key, pair in adapters_of(model, layers).items()}
    configs = [{name: (2, 4)[(n + k) % 2] for n, name in enumerate(layers)} for k in (0, 0, 0)]
    for config in configs:
        step(config)
    for (name, adapter), pair in adapters_of(model, layers).items():
        same = [torch.equal(p, old) for p, old in zip(pair, before[name, adapter], strict=True)]
        assert same == [adapter != f"bits{configs[0][name]}"] * 2


def test_gradients_of_zeros_would_move_them(tiny):
    """Why `drop_unsampled_gradients` is there."""
    model, layers = copy.deepcopy(tiny[0]), tiny[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    set_bits(model, 3)
    loss_of(model).backward()
    optimizer.step()
    before = adapters_of(model, layers)[layers[0], "bits3"][1].detach().clone()
    set_bits(model, 4)
    optimizer.zero_grad(set_to_none=False)
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(adapters_of(model, layers)[layers[0], "bits3"][1], before)


@pytest.mark.parametrize("by", ["transformers", "torch"])
def test_checkpointed_activations(tiny, by):
    model, layers = copy.deepcopy(tiny[0]).train(), tiny[1]
    set_bits(model, mixed(layers))
    loss_of(model).backward()
    plain = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if by == "transformers":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        loss_of(model).backward()
    else:
        embeddings = model.get_input_embeddings()(IDS)
        checkpoint(lambda x: model(inputs_embeds=x, labels=IDS).loss, embeddings, use_reentrant=False).backward()
    again = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_a_trained_model_is_better_at_every_width():
    model, layers = tiny_quantized()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = {}
    for k in range(24):
        config = (2, 3, 4, mixed(layers))[k % 4]
        set_bits(model, config)
        loss = loss_of(model)
        losses.setdefault(str(config), []).append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(values[-1] < values[0] - 0.1 for values in losses.values())


# --- afterwards ---


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("config", [2, 4, "mixed"])
def test_merged(config, shared):
    model, layers = tiny_quantized(shared=shared)
    config = mixed(layers) if config == "mixed" else config
    set_bits(model, 3)
    before, bits = logits(model), get_bits(model)
    plain = merged(model, config)
    assert type(plain) is type(tiny_llama())
    assert not any(isinstance(module, MultiBitLinear) or hasattr(module, "lora_A") for module in plain.modules())
    assert set(plain.state_dict()) == set(tiny_llama().state_dict())
    assert get_bits(model) == bits
    assert torch.equal(logits(model), before)
    set_bits(model, config)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        plain.get_input_embeddings().weight.zero_()
    assert model.get_input_embeddings().weight.any()


def test_merged_without_adapters():
    model = tiny_llama()
    layers = quantize_model(model, group_size=32)
    plain = merged(model, mixed(layers))
    set_bits(model, mixed(layers))
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-5)


def test_merged_is_saved_and_loaded_by_transformers(tiny, tmp_path):
    model, layers = tiny
    plain = merged(model, mixed(layers))
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(plain))
    assert not (tmp_path / "adapter_config.json").exists()
    assert not hasattr(plain, "peft_config")
    assert hasattr(model.get_base_model(), "peft_config")


def test_one_widths_adapter_is_saved_by_peft(tiny, tmp_path):
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    model, layers = tiny
    model.save_pretrained(tmp_path, selected_adapters=["bits3"])
    other = build(7)
    saved = load_file(tmp_path / "bits3" / "adapter_model.safetensors")
    assert len(saved) == 2 * len(layers)
    set_peft_model_state_dict(other, saved, adapter_name="bits3")
    for width, same in ((3, True), (2, False)):
        with pinned(model, width), pinned(other, width):
            assert torch.allclose(logits(model), logits(other), atol=1e-6) == same


def test_peft_loads_an_adapter_from_its_folder(tiny, tmp_path):
    from peft import PeftModel

    model, _ = tiny
    model.save_pretrained(tmp_path, selected_adapters=["bits2"])
    base = tiny_llama()
    quantize_model(base, group_size=32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "bits2", adapter_name="bits2")
    set_bits(loaded, 2)
    set_bits(model, 2)
    torch.testing.assert_close(logits(loaded), logits(model))

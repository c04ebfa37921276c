import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from bits_support import tiny_llama, token_ids
from torch import nn

from samplewise.plugins.bit_adapters import find_layers, get_bits, merged, set_bits, stored_bits_per_weight
from samplewise.plugins.multi_bit import MultiBitLinear, quantize_model
from samplewise.plugins.quantize import decode, encode, group_ranges

BITS = (2, 3, 4)
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def linear(inputs=64, outputs=24, bias=True, seed=0):
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)) / 8)
    return layer


def multi(bits=BITS, group_size=32, **options):
    return MultiBitLinear(linear(**options), bits=bits, group_size=group_size, name="layer")


def chain():
    """What is no transformer: linear layers, one of them in a submodule."""
    return nn.Sequential(linear(64, 32, seed=1), nn.Tanh(), nn.Sequential(linear(32, 64, bias=False, seed=2)))


def inputs(*shape, seed=9, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def expected(layer, width, group=32):
    """The weights of a linear layer at a width, by the pure functions."""
    ranges = group_ranges(layer.weight, width, group)
    return decode(encode(layer.weight, ranges, width), ranges, width)


# --- quantize_model ---


def test_names_of_a_llama():
    model = tiny_llama()
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    head, embedding = model.lm_head, model.get_input_embeddings()
    found = quantize_model(model, group_size=32)
    assert found == names
    assert len(found) == 2 * len(PARTS)
    assert all(type(model.get_submodule(name)) is MultiBitLinear for name in found)
    assert all(model.get_submodule(name).name == name for name in found)
    assert model.lm_head is head
    assert model.get_input_embeddings() is embedding
    assert get_bits(model) == dict.fromkeys(found, 4)


def test_names_of_a_chain():
    model = chain()
    assert quantize_model(model, bits=[1, 8], group_size=16) == ["0", "2.0"]
    assert isinstance(model[0], MultiBitLinear)
    assert model[0].bias is not None
    assert model[2][0].bias is None
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["0.self_attn.k_proj", "lm_head"], ["model.layers.0.self_attn.k_proj", "lm_head"]),
    ],
)
def test_targets(targets, found):
    model = tiny_llama()
    assert quantize_model(model, group_size=32, targets=targets) == found
    assert sum(isinstance(module, MultiBitLinear) for module in model.modules()) == len(found)


def with_bad_weight(value):
    model = chain()
    with torch.no_grad():
        model[2][0].weight[3, 4] = value
    return model


ERRORS = [
    (tiny_llama, {"targets": ["q_prj"]}, ValueError, r"no linear layer 'q_prj'; did you mean 'q_proj'"),
    (
        tiny_llama,
        {"targets": ["q_proj", "model.layers.1.mlp.upproj"]},
        ValueError,
        "'model.layers.1.mlp.upproj'; did you mean 'model.layers.1.mlp.up_proj'",
    ),
    (tiny_llama, {"targets": ["zzz"]}, ValueError, "no linear layer 'zzz'; there are 8, such as"),
    (tiny_llama, {"targets": ["mlp"]}, ValueError, "no linear layer 'mlp'"),
    (tiny_llama, {"targets": []}, ValueError, r"targets=\[\]"),
    (tiny_llama, {"targets": "q_proj"}, TypeError, r"targets=\['q_proj'\]"),
    (tiny_llama, {"group_size": 48}, ValueError, r"group_size=48\): model.layers.0.self_attn.q_proj has 64 inputs"),
    (chain, {"group_size": 64}, ValueError, r"group_size=64\): 2.0 has 32 inputs"),
    (chain, {"group_size": 12}, ValueError, r"group_size=12\): must be a multiple of 8"),
    (chain, {"group_size": 0}, ValueError, r"group_size=0\)"),
    (chain, {"group_size": 32.0}, TypeError, r"group_size=32.0\)"),
    (chain, {"bits": []}, ValueError, r"bits=\(\)"),
    (chain, {"bits": [4, 3]}, ValueError, r"bits=\(4, 3\)"),
    (lambda: with_bad_weight(float("nan")), {}, ValueError, "2.0 has weights that are not finite"),
    (lambda: with_bad_weight(float("inf")), {}, ValueError, "2.0 has weights that are not finite"),
    (lambda: with_bad_weight(1e5), {}, ValueError, "2.0 has weights beyond float16"),
    (lambda: nn.Sequential(nn.Tanh()), {}, ValueError, "no linear layers"),
    (linear, {}, ValueError, "no linear layers"),  # a layer cannot take its own place
]


@pytest.mark.parametrize(("make", "given", "error", "rule"), ERRORS)
def test_errors_leave_the_model_as_it_was(make, given, error, rule):
    model = make()
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())
    with pytest.raises(error, match=r"quantize_model\(.*" + rule):
        quantize_model(model, **{"group_size": 32, **given})
    assert list(model.modules()) == modules
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


# --- one layer ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", BITS)
def test_output_is_that_of_the_decoded_weights(width, bias):
    source = linear(bias=bias)
    layer = MultiBitLinear(source, bits=BITS, group_size=32)
    layer.width = width
    weight = expected(source, width)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.decoded(width), weight)
    for shape in ((64,), (5, 64), (2, 3, 64)):
        x = inputs(*shape)
        torch.testing.assert_close(layer(x), F.linear(x, weight, source.bias))


def test_widths_of_a_model_are_those_of_its_layers():
    source, model = chain(), chain()
    quantize_model(model, group_size=32)
    x = inputs(3, 64)
    for config in (2, 3, {"0": 4, "2.0": 2}):
        set_bits(model, config)
        first, second = get_bits(model).values()
        middle = torch.tanh(F.linear(x, expected(source[0], first), source[0].bias))
        torch.testing.assert_close(model(x), F.linear(middle, expected(source[2][0], second)))


def test_ranges_are_shared_unless_they_differ():
    assert multi().ranges.shape[:3] == (1, 2, 24)

    def by_width(groups, bits):
        return groups.amin(-1) * (1 - 0.1 / bits), groups.amax(-1)

    layer = MultiBitLinear(linear(), bits=BITS, group_size=32, find=by_width)
    assert layer.ranges.shape[:3] == (3, 2, 24)
    for width in BITS:
        ranges = group_ranges(linear().weight, width, 32, by_width)
        assert torch.equal(layer.range_of(width), ranges)
        assert torch.equal(layer.decoded(width), decode(encode(linear().weight, ranges, width), ranges, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    layer, x = multi(), inputs(5, 64, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    weight = layer.decoded(4, torch.bfloat16)
    assert torch.equal(y, F.linear(x.bfloat16(), weight) + layer.bias.bfloat16())
    y.sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, (torch.ones_like(y) @ weight).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_codes_and_ranges(dtype):
    layer, kept = multi(), multi()
    layer.to(dtype)
    for width in BITS:
        assert torch.equal(layer.range_of(width), kept.range_of(width))
        assert torch.equal(layer.decoded(width), kept.decoded(width))
    assert layer.bias.dtype == dtype
    assert layer(inputs(2, 64, dtype=dtype)).dtype == dtype
    model = tiny_llama()
    quantize_model(model, group_size=32)
    logits = model(token_ids()).logits
    model.to(dtype)
    close = model(token_ids()).logits
    assert close.dtype == dtype
    assert (close - logits).abs().max() < 0.05 * logits.abs().max()


def test_state_dict():
    source, other = multi(), MultiBitLinear(linear(seed=5), bits=BITS, group_size=32, name="layer")
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert set(source.state_dict()) == {"bias", "codes_2", "codes_3", "codes_4", "ranges"}
    for width in BITS:
        source.width = other.width = width
        assert torch.equal(source(inputs(2, 64)), other(inputs(2, 64)))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(through):
    layer = multi()
    layer.width = 3
    twin = through(layer)
    assert (twin.width, twin.bits, twin.name) == (3, BITS, "layer")
    assert torch.equal(twin(inputs(2, 64)), layer(inputs(2, 64)))
    twin.width = 2
    assert layer.width == 3
    assert twin.codes_2.data_ptr() != layer.codes_2.data_ptr()


def test_weights_cannot_be_replaced():
    layer = multi()
    with pytest.raises(AttributeError, match="layer: quantized weights cannot be replaced"):
        layer.weight = torch.zeros(24, 64)
    assert "bits=2+3+4, group_size=32" in repr(layer)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_stored_bits(group):
    model = tiny_llama()
    quantize_model(model, group_size=group)
    assert stored_bits_per_weight(model) == 9 + 32 / group
    layer = multi(bits=(1, 5, 8), group_size=group)
    assert layer.stored_bits == (14 + 32 / group) * 64 * 24
    assert layer.stored_bits == 8 * sum(
        p.untyped_storage().nbytes() for name, p in layer.named_parameters() if name != "bias"
    )


# --- gradients ---


@pytest.mark.parametrize("width", BITS)
def test_gradient_of_the_input(width):
    layer, grad = multi(), inputs(4, 24, seed=3)
    layer.width = width
    x, twin = (inputs(4, 64).requires_grad_() for _ in range(2))
    layer(x).backward(grad)
    F.linear(twin, layer.decoded(width), layer.bias).backward(grad)
    torch.testing.assert_close(x.grad, twin.grad)
    assert layer.bias.grad is None
    assert all(p.grad is None for p in layer.parameters())


def test_gradcheck():
    layer = multi(inputs=16, outputs=5, group_size=8).double()
    for width in BITS:
        layer.width = width
        x = inputs(3, 16, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(layer, (x,))
        assert torch.autograd.gradgradcheck(lambda x: layer(x).square(), (x,))


def test_backward_uses_the_width_of_forward():
    layer, x = multi(), inputs(4, 64).requires_grad_()
    layer.width = 2
    y = layer(x)
    layer.width = 4
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(4, 24) @ layer.decoded(2))
    assert not torch.allclose(layer.decoded(2), layer.decoded(4))


def test_no_decoded_weights_are_kept():
    layer, saved = multi(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(inputs(4, 64).requires_grad_())
    assert not saved


# --- merged, without adapters ---


def test_merged_without_adapters():
    model = chain()
    quantize_model(model, group_size=32)
    set_bits(model, 3)
    before, x = get_bits(model), inputs(3, 64)
    for config in (2, {"0": 4, "2.0": 2}, {"0": 2}):
        plain = merged(model, config)
        assert [type(module) for module in plain.modules()] == [type(module) for module in chain().modules()]
        assert get_bits(model) == before
        set_bits(model, config)
        torch.testing.assert_close(plain(x), model(x))
        set_bits(model, before)
    assert merged(model, 2, dtype=torch.bfloat16)[0].weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no quantized layers"):
        find_layers(plain)

import pytest
import torch

from samplewise.plugins.quantize import check_bits, decode, encode, group_ranges, pack, unpack

WIDTHS = range(1, 9)
ROWS, INPUTS = 6, 192


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(rows=ROWS, inputs=INPUTS, seed=0):
    return torch.randn(rows, inputs, generator=generator(seed))


def one_outlier():
    weight = 0.01 * normal()
    weight[:, ::48] = 30
    return weight


WEIGHTS = {
    "normal": normal(),
    "small": 0.02 * normal(),
    "heavy": normal().pow(5),
    "constant": torch.full((ROWS, INPUTS), 0.1),
    "negative": -1 - normal().abs(),
    "zero": torch.zeros(ROWS, INPUTS),
    "tiny": 1e-7 * normal(),
    "outlier": one_outlier(),
    "large": 6e4 * normal().tanh(),
}


# --- packing ---


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [8, 16, 24, 120, 1000, 4096])
def test_pack_and_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=generator(count), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == count * bits
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_survives_in_every_place(bits):
    every = torch.arange(2**bits, dtype=torch.uint8)
    codes = torch.stack([every.roll(shift) for shift in range(8)], dim=1)  # (2^b, 8)
    kept = codes.clone()
    assert torch.equal(unpack(pack(codes, bits), bits).view_as(codes), codes)
    assert torch.equal(codes, kept)


def test_pack_takes_strided_codes():
    codes = torch.randint(0, 8, (16, 24), generator=generator(), dtype=torch.uint8).t()
    assert torch.equal(unpack(pack(codes, 3), 3).view(24, 16), codes)


# --- codes ---


def quantized(weight, bits, group):
    ranges = group_ranges(weight, bits, group)
    codes = encode(weight, ranges, bits)
    return ranges, codes, decode(codes, ranges, bits)


def half_ulp(values):
    """At most this far is a number from its nearest float16: 2^-11 of it, or half of the smallest subnormal, 2^-24."""
    return (2.0**-11 * values.abs()).clamp_min(2.0**-25)


@pytest.mark.parametrize("group", [8, 32, 96, 192])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_error_is_half_a_step(kind, group):
    weight = WEIGHTS[kind]
    groups = weight.unflatten(1, (-1, group)).double()
    for bits in WIDTHS:
        ranges, codes, found = quantized(weight, bits, group)
        assert ranges.shape == (2, ROWS, INPUTS // group)
        assert (ranges.dtype, codes.dtype, found.dtype) == (torch.float16, torch.uint8, torch.float32)
        assert int(codes.max()) < 2**bits
        low, high = ranges.double().unsqueeze(-1)
        widest = torch.maximum(low.abs(), high.abs())
        # Inside [low, high] half a step; outside, where rounding the range shut a weight out, how far it was moved.
        shut_out = torch.maximum(half_ulp(groups.amin(-1)), half_ulp(groups.amax(-1))).unsqueeze(-1)
        bound = torch.maximum((high - low) / (2**bits - 1) / 2, shut_out) + 8 * 2.0**-24 * widest  # of float32's sums
        error = (found.unflatten(1, (-1, group)).double() - groups).abs()
        assert (error <= bound).all()


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_encoding_what_was_decoded_changes_nothing(kind, bits):
    ranges, codes, found = quantized(WEIGHTS[kind], bits, 32)
    assert torch.equal(encode(found, ranges, bits), codes)


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_equal_weights_are_the_low_end(kind):
    weight = WEIGHTS[kind]
    _, codes, found = quantized(weight, 3, 32)
    assert not codes.any()
    assert torch.equal(found, weight.half().float())


@pytest.mark.parametrize("bits", WIDTHS)
def test_equals_fake_quantization(bits):
    """torch's has an integer zero point z: equal where the range begins at -z steps; steps are powers of 2, exact."""
    group, top = 32, 2**bits - 1
    zero = torch.randint(0, top + 1, (20,), generator=generator(bits), dtype=torch.int32)
    scale = 2.0 ** torch.randint(-9, 3, (20,), generator=generator(bits)).float()
    low, high = -zero * scale, (top - zero) * scale
    rows = low[:, None] + (high - low)[:, None] * torch.rand(20, group, generator=generator(bits))
    rows[:, 0], rows[:, -1] = low, high
    expected = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, 0, top)
    _, _, found = quantized(rows.view(4, -1), bits, group)
    torch.testing.assert_close(found.view(20, group), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "factor"), [("normal", 100), ("heavy", 50), ("negative", 100), ("outlier", 1.2)])
def test_more_bits_are_nearer(kind, factor):
    errors = [float((quantized(WEIGHTS[kind], bits, 32)[2] - WEIGHTS[kind]).abs().mean()) for bits in WIDTHS]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / factor


def test_smaller_groups_are_nearer():
    errors = [float((quantized(WEIGHTS["heavy"], 3, g)[2] - WEIGHTS["heavy"]).abs().mean()) for g in (8, 32, 192)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_are_by_row_and_apart(bits):
    weight = normal()
    changed = weight.clone()
    changed[2, 32:64] *= 7
    first, second = quantized(weight, bits, 32)[2], quantized(changed, bits, 32)[2]
    same = torch.ones_like(weight, dtype=torch.bool)
    same[2, 32:64] = False
    assert torch.equal(first[same], second[same])
    assert not torch.equal(first[~same], second[~same])


def test_own_way_to_find_a_range():
    seen = []

    def clipped(groups, bits):
        seen.append((tuple(groups.shape), groups.dtype, bits))
        return -groups.new_ones(groups.shape[:2]), groups.new_ones(groups.shape[:2])

    weight = normal().double()
    ranges = group_ranges(weight, 4, 64, clipped)
    assert seen == [((ROWS, 3, 64), torch.float32, 4)]
    found = decode(encode(weight, ranges, 4), ranges, 4).double()
    assert (found - weight.clamp(-1, 1)).abs().max() <= 1 / 15 + 1e-6
    assert found.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float64, 0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_decode_computes_in_the_type_asked_for(dtype, unit):
    ranges, codes, exact = quantized(normal(), 4, 32)
    found = decode(codes, ranges, 4, dtype)
    assert found.dtype == dtype
    low, high = ranges.float().unsqueeze(-1)
    allowed = 3 * unit * torch.maximum(low.abs(), high.abs()) * 2 + 1e-6  # low, scale, product and sum, rounded each
    assert ((found.float() - exact).abs().unflatten(1, (-1, 32)) <= allowed).all()


# --- widths ---


def test_check_bits():
    assert check_bits("f", [2, 3, 8]) == (2, 3, 8)
    for bad in ([], [3, 2], [2, 2], [0], [9], [2, 16]):
        with pytest.raises(ValueError, match=r"f\(bits="):
            check_bits("f", bad)
    for bad in ([2.0], [True], ["2"], [None]):
        with pytest.raises(TypeError, match=r"f\(bits=.*must be an int"):
            check_bits("f", bad)

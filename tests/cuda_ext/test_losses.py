import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kernel_cases import FLOATS, IGNORED, assert_same_but_for_nan, labelled_logits
from samplewise.cuda_ext import losses as module
from samplewise.cuda_ext.losses import sample_losses
from support import compiled_for_the_cpu, needs_kernels

CLASSES = [1, 2, 3, 7, 8, 9, 10, 17, 100, 256, 257, 2048, 2049, 50_257]
OP, BACKWARD = torch.ops.samplewise.sample_losses.default, torch.ops.samplewise.sample_losses_backward.default
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def adversarial(classes, dtype):
    """A row for each thing that may go wrong, and some ordinary ones."""
    logits, labels = labelled_logits(40, classes, dtype)
    logits[0], logits[1], logits[2] = 0, torch.inf, -torch.inf
    logits[3, classes // 2] = torch.nan
    logits[4, labels[4]] = -torch.inf
    logits[5, ::2] = -torch.inf
    logits[6] *= 1e-42 if dtype == torch.float32 else 1e-6  # denormal
    logits[7], logits[8], logits[9] = logits[7] * 2000, logits[8] * 9000, logits[9] - 9000
    logits[10], logits[11] = -10_000, torch.linspace(-60, 60, classes)
    logits[12], logits[13] = torch.linspace(4000, 4095, classes), torch.linspace(-4200, -4050, classes)
    logits[14], logits[14, labels[14]] = torch.finfo(dtype).min, 1
    logits[15] = torch.finfo(dtype).max
    logits[16, labels[16]], logits[17, labels[17]] = 60, -60
    logits[18, labels[18]], logits[19, labels[19]] = torch.nan, torch.inf
    logits[20], labels[20] = torch.nan, IGNORED
    labels[21:24] = IGNORED
    logits[24, 0], logits[25, -1] = 9000, -9000
    return logits, labels


def exact(logits, labels):
    """Loss, norm and gradient in float64, without cancellation."""
    z = logits.double()
    z = z - z.amax(1, keepdim=True)
    own = F.one_hot(labels, z.shape[1]).bool()
    others, y = z.exp().masked_fill(own, 0), z[own].exp()
    total = others.sum(1)
    complement = total / (total + y)
    p = others / (total + y)[:, None]
    # log(1 + others / y) where y is likely; where it underflows, by the logarithms
    loss = torch.where(y > 0.1, torch.log1p(total / y), (total + y).log() - z[own])
    return loss, (complement.square() + p.square().sum(1)).sqrt(), p - own * complement[:, None]


# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 10, 2049])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", FLOATS)
def test_opcheck(rows, classes, dtype):
    logits, labels = labelled_logits(rows, classes, dtype)
    labels[:1] = IGNORED
    for differentiable in (False, True):
        torch.library.opcheck(OP, (logits.requires_grad_(differentiable), labels, IGNORED))
    state = OP(logits.detach(), labels, IGNORED)[2]
    torch.library.opcheck(BACKWARD, (torch.rand(rows), logits.detach(), labels, state, IGNORED))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("scale", [0.01, 3, 30])
def test_against_float64(classes, dtype, scale):
    logits, labels = labelled_logits(64 if classes < 3000 else 4, classes, dtype, scale)
    logits.requires_grad_()
    losses, norms = sample_losses(logits, labels)
    losses.sum().backward()
    loss, norm, gradient = exact(logits.detach(), labels)
    torch.testing.assert_close(losses.double(), loss, rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(norms.double(), norm, rtol=1e-6, atol=1e-37)
    rounding = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-6 + rounding, atol=max(tiny, 1e-37))


@pytest.mark.parametrize("gap", [5, 27.6, 60, 80])
@pytest.mark.parametrize("classes", [2, 10, 3000])
def test_confident_rows_keep_their_digits(classes, gap):
    logits = torch.zeros(1, classes)
    logits[0, 1] = gap  # 27.6: 1 - p = 1e-12
    labels = torch.tensor([1])
    losses, norms = sample_losses(logits, labels)
    loss, norm, _ = exact(logits, labels)
    torch.testing.assert_close(losses.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(norms.double(), norm, rtol=1e-6, atol=0)
    textbook = (logits.softmax(1) - F.one_hot(labels, classes)).norm(dim=1)
    assert gap < 40 or classes > 10 or textbook < 0.8 * norm  # what the textbook form loses


@pytest.mark.parametrize(
    ("logits", "loss", "norm"),
    [
        ([3.0], 0, 0),
        ([0.0, 0.0], np.log(2), np.sqrt(0.5)),
        ([0.0, -np.inf], 0, 0),
        ([-np.inf, 0.0], np.inf, np.sqrt(2)),
        ([-np.inf, 0.0, 0.0], np.inf, np.sqrt(1.5)),
        ([0.0, 10_000.0], 10_000, np.sqrt(2)),
        ([0.0, -3e38], 0, 0),
        ([-3e38, 0.0], 3e38, np.sqrt(2)),
        ([1e30, 1e30], np.log(2), np.sqrt(0.5)),
        ([-np.inf, -np.inf], np.nan, np.nan),
        ([np.inf, 0.0], np.nan, np.nan),
        ([0.0, np.inf], np.nan, np.nan),
        ([0.0, np.nan], np.nan, np.nan),
        ([np.nan, 0.0], np.nan, np.nan),
        ([np.nan], np.nan, np.nan),
    ],
)
def test_special_rows(logits, loss, norm):
    losses, norms = sample_losses(torch.tensor([logits]), torch.tensor([0]))
    np.testing.assert_allclose(losses.numpy(), [loss], rtol=1e-6)
    np.testing.assert_allclose(norms.numpy(), [norm], rtol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", CLASSES)
def test_ignored_rows_are_zero(classes, dtype):
    logits, labels = adversarial(classes, dtype)
    logits.requires_grad_()
    losses, norms = sample_losses(logits, labels)
    losses.sum().backward()
    ignored = labels == IGNORED
    assert ignored.sum() == 4
    for tensor in (losses, norms, logits.grad):
        assert tensor[ignored].count_nonzero() == 0


def test_views_of_any_stride():
    logits, labels = labelled_logits(6, 40)
    wanted = sample_losses(logits, labels)
    wide = torch.randn(6, 3, 41)
    wide[:, 1, 1:] = logits
    for view in (wide[:, 1, 1:], logits.t().contiguous().t(), logits[:, None].expand(6, 2, 40)[:, 1]):
        assert not view.is_contiguous() or view.stride() == (40, 1)
        assert_same_but_for_nan(sample_losses(view, labels), wanted)
    assert_same_but_for_nan(sample_losses(logits, labels.repeat_interleave(2)[::2]), wanted)
    assert_same_but_for_nan(sample_losses(logits, labels.int()), wanted)
    assert_same_but_for_nan(
        sample_losses(logits[:1].expand(6, 40), labels[:1].expand(6)), [part[:1].expand(6) for part in wanted]
    )


# --- the same bits everywhere -----------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", CLASSES)
def test_native_kernel_gives_the_references_bits(classes, dtype):
    for logits, labels in (
        adversarial(classes, dtype),
        *(labelled_logits(9, classes, dtype, scale) for scale in (0.1, 3, 40)),
    ):
        for view in (logits, F.pad(logits, (1, 2))[:, 1:-2]):
            wanted = module._reference(view, labels, IGNORED)
            assert_same_but_for_nan(OP(view, labels, IGNORED), wanted)
            grad = torch.linspace(-1, 1, len(labels))
            arguments = (grad, view, labels, wanted[2], IGNORED)
            assert_same_but_for_nan([BACKWARD(*arguments)], [module._backward_reference(*arguments)])


@needs_kernels
@pytest.mark.parametrize("classes", [10, 3000])
def test_number_of_threads_changes_nothing(classes):
    logits, labels = labelled_logits(600_000 // classes, classes)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(OP(logits, labels, IGNORED))
    finally:
        torch.set_num_threads(before)
    assert_same_but_for_nan(results[1], results[0])
    assert_same_but_for_nan(results[2], results[0])


@needs_kernels
@pytest.mark.parametrize("wrong", [0, 1, 2, 3])
def test_native_kernels_refuse_what_would_corrupt_memory(wrong):
    logits, labels = labelled_logits(4, 5)
    arguments = [torch.ones(4), logits, labels, OP(logits, labels, IGNORED)[2]]
    with pytest.raises(RuntimeError, match="sample_losses"):
        BACKWARD(*(part[:3] if i == wrong else part for i, part in enumerate(arguments)), IGNORED)
    if wrong in (1, 2):
        with pytest.raises(RuntimeError, match="sample_losses"):
            OP(*(part[:3] if i == wrong else part for i, part in enumerate(arguments) if i in (1, 2)), IGNORED)


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    """The CUDA kernels, compiled to run on the CPU."""
    return compiled_for_the_cpu(Path(__file__).with_name("phases_losses.cpp"), tmp_path_factory.mktemp("phases"))


def emulated(phases, logits, labels, grad, state, threads):
    pointer, number = lambda tensor: ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64
    rows, classes = logits.shape
    shape = [number(rows), number(classes), number(logits.stride(0)), pointer(labels), number(IGNORED)]
    head = [FLOATS.index(logits.dtype), threads, ctypes.c_uint64(7)]
    out = torch.empty(rows), torch.empty(rows), torch.empty(rows, 4)
    gradient = torch.empty(rows, classes, dtype=logits.dtype)
    phases.forward(*head, pointer(logits), *shape, *map(pointer, out))
    phases.backward(*head, pointer(grad), number(1), pointer(logits), *shape, pointer(state), pointer(gradient))
    return [*out, gradient]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [classes for classes in CLASSES if classes < 50_000] + [9000])
def test_cuda_kernels_give_the_references_bits(phases, classes, dtype):
    for logits, labels in (adversarial(classes, dtype), labelled_logits(9, classes, dtype, 40)):
        for view in (logits, F.pad(logits, (1, 2))[:, 1:-2]):
            wanted = module._reference(view, labels, IGNORED)
            grad = torch.linspace(-1, 1, len(labels))
            gradient = module._backward_reference(grad, view, labels, wanted[2], IGNORED)
            for threads in (32, 256) if classes <= 256 else (256,):
                assert_same_but_for_nan(emulated(phases, view, labels, grad, wanted[2], threads), [*wanted, gradient])


@gpu
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", CLASSES)
def test_gpu_gives_the_references_bits(classes, dtype):
    logits, labels = adversarial(classes, dtype)
    wanted = module._reference(logits, labels, IGNORED)
    assert_same_but_for_nan([part.cpu() for part in OP(logits.cuda(), labels.cuda(), IGNORED)], wanted)
    arguments = (torch.linspace(-1, 1, len(labels)), logits, labels, wanted[2])
    ours = BACKWARD(*(part.cuda() for part in arguments), IGNORED)
    assert_same_but_for_nan([ours.cpu()], [module._backward_reference(*arguments, IGNORED)])


@gpu
@pytest.mark.cuda
def test_gpu_marks_a_label_outside_with_nan():
    losses, norms = sample_losses(torch.zeros(3, 4).cuda(), torch.tensor([0, 4, -1]).cuda())
    assert losses.isnan().tolist() == norms.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("seed", range(8))
def test_rows_with_many_nan_and_extremes(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4096, generator=generator) * 10.0 ** torch.randint(-3, 5, (2, 4096), generator=generator)
    logits[torch.rand(2, 4096, generator=generator) < 0.07] = torch.nan
    labels = torch.tensor([5, 4000])
    assert_same_but_for_nan(OP(logits, labels, IGNORED), module._reference(logits, labels, IGNORED))
    assert sample_losses(logits, labels).losses.isnan().all()

"""The helper sample_losses: what it gives, its gradient, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from kernel_cases import FLOATS, IGNORED, assert_same_but_for_nan, labelled_logits
from samplewise.cuda_ext.losses import sample_losses


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_classification_is_torchs_cross_entropy(dtype):
    logits, labels = labelled_logits(32, 10, dtype)
    labels[::5] = IGNORED
    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()
    weights = torch.rand(32)
    losses, norms = sample_losses(ours, labels)
    reference = F.cross_entropy(theirs, labels, reduction="none")
    assert losses.dtype == norms.dtype == torch.float32
    assert not norms.requires_grad
    torch.testing.assert_close(losses, reference, rtol=1e-5, atol=1e-6)
    (losses * weights).sum().backward()
    (reference * weights).sum().backward()
    assert ours.grad.dtype == dtype
    rtol = max(1e-4, torch.finfo(dtype).eps)
    torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=rtol, atol=1e-6)


def sequences(causal):
    logits, _ = labelled_logits(4 * 6, 11)
    labels = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(1))
    labels[0, 4:] = labels[1, :3] = labels[2] = IGNORED  # padding, a prompt, nothing that counts
    if causal:
        labels[3, 1:] = IGNORED  # predicts nothing, as the first label has no logits
    return logits.view(4, 6, 11), labels


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_are_masked_means(causal):
    logits, labels = sequences(causal)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses, norms = sample_losses(ours, labels, causal=causal)
    predicted, targets = (theirs[:, :-1], labels[:, 1:]) if causal else (theirs, labels)
    token_losses = F.cross_entropy(predicted.transpose(1, 2), targets, reduction="none")
    wanted = token_losses.sum(1) / (targets != IGNORED).sum(1).clamp_min(1)
    torch.testing.assert_close(losses, wanted)
    losses.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(norms, theirs.grad.flatten(1).norm(dim=1))
    nothing = (targets != IGNORED).sum(1) == 0
    assert nothing.tolist() == [False, False, True, causal]
    assert losses[nothing].count_nonzero() == norms[nothing].count_nonzero() == ours.grad[nothing].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (2, 0, 5)])
def test_nothing_at_all(shape):
    logits = torch.zeros(shape, requires_grad=True)
    losses, norms = sample_losses(logits, torch.zeros(shape[:-1], dtype=torch.int64))
    assert losses.shape == norms.shape == (shape[0],)
    losses.sum().backward()
    assert logits.grad.shape == shape


def test_without_gradients_and_under_autocast():
    logits, labels = labelled_logits(4, 10)
    wanted = sample_losses(logits, labels)
    layer = torch.nn.Linear(10, 10)
    with torch.no_grad():
        assert_same_but_for_nan(sample_losses(logits.requires_grad_(), labels), wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(logits)
        losses, norms = sample_losses(out, labels)
    assert (out.dtype, losses.dtype, norms.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    losses.mean().backward()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_compiled_whole_and_opaque(causal):
    logits, labels = sequences(False)
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def step(logits, labels):
        losses, norms = sample_losses(logits * 2, labels, causal=causal)
        return losses.sum(), norms

    wanted = step(logits, labels)
    for compiler in (backend, "aot_eager"):
        mine = logits.clone().requires_grad_()
        loss, norms = torch.compile(step, backend=compiler, fullgraph=True)(mine, labels)
        assert_same_but_for_nan([loss.detach(), norms], wanted)
        loss.backward()
        assert mine.grad.isfinite().all()
    assert any("samplewise.sample_losses" in target for target in targets)


LOGITS, LABELS = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "error", "match"),
    [
        (LOGITS.long(), LABELS, {}, TypeError, r"logits=torch.int64.* floating point"),
        (LOGITS, LOGITS, {}, TypeError, r"labels=torch.float32.* soft targets"),
        (LOGITS, [0, 0], {}, TypeError, r"labels=list"),
        (LOGITS, LABELS[:1], {}, ValueError, r"\(2, 3\) and labels \(1,\)"),
        (LOGITS[0], LABELS[0], {}, ValueError, r"\(B, T, V\)"),
        (LOGITS[None, None], LABELS[None, None], {}, ValueError, r"\(B, V\)"),
        (LOGITS[:, :0], LABELS, {}, ValueError, r"V > 0"),
        (LOGITS, LABELS, {"causal": True}, ValueError, r"sequences"),
        (LOGITS, LABELS, {"ignore_index": 0.5}, TypeError, r"ignore_index"),
        (LOGITS, LABELS + 3, {}, IndexError, r"label 3 is outside \[0, 3\)"),
        (LOGITS, LABELS - 1, {}, IndexError, r"label -1 is outside .* ignore_index=-100"),
    ],
)
def test_errors(logits, labels, options, error, match):
    with pytest.raises(error, match=match):
        sample_losses(logits, labels, **options)


# --- what it does not do ----------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused():
    logits, labels = labelled_logits(4, 7)
    weights = torch.ones(4, requires_grad=True)
    loss = (sample_losses(logits.requires_grad_(), labels).losses * weights).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    for leaf in (logits, weights):
        with pytest.raises(RuntimeError, match="differentiated once only"):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)


def test_a_forward_mode_derivative_is_refused():
    logits, labels = labelled_logits(4, 7)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: sample_losses(z, labels).losses, (logits,), (torch.ones(4, 7),))


def test_labels_elsewhere_are_refused():
    with pytest.raises(ValueError, match="logits on cpu and labels on meta"):
        sample_losses(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64, device="meta"))


def test_causal_sequences_of_no_tokens():
    losses, norms = sample_losses(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64), causal=True)
    assert losses.tolist() == norms.tolist() == [0, 0]


def test_a_sequences_loss_does_not_depend_on_the_order_of_its_tokens():
    logits, labels = labelled_logits(8 * 101, 13)
    logits, labels = logits.view(8, 101, 13), labels.view(8, 101)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(2))
    ours, shuffled = sample_losses(logits, labels), sample_losses(logits[:, order], labels[:, order])
    assert_same_but_for_nan(shuffled, ours)

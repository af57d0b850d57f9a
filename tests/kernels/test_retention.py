"""Gated retention's chunked form against its recurrence, token by token in fp64."""

import pytest
import torch
import torch.nn.functional as F

from cllm.kernels.retention import gated_retention, gated_retention_reference

B, H, D, E = 2, 3, 4, 5


def inputs(length: int):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, length, H, D), (B, length, H, D), (B, length, H, E), (B, length, H))
    q, k, v, gate = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.requires_grad_() for x in (q, k, v, F.logsigmoid(gate) / 4)]


def recurrence(q, k, v, log_decay, scale, documents=None):
    """S_t = γ_t S_{t-1} + k_tᵀ v_t, cleared where a document begins; o_t = scale q_t S_t."""
    q, k, v, log_decay = (x.double() for x in (q, k, v, log_decay))
    rows = []
    for b in range(B):
        state, outputs = torch.zeros(H, D, E, dtype=torch.float64), []
        for t in range(q.shape[1]):
            if documents is not None and t > 0 and documents[b, t] != documents[b, t - 1]:
                state = torch.zeros_like(state)
            state = log_decay[b, t].exp()[:, None, None] * state + k[b, t][:, :, None] * v[b, t][:, None, :]
            outputs.append(scale * (q[b, t][:, None, :] @ state)[:, 0])
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def document_ids(length: int) -> torch.Tensor:
    """Documents of 1, 2, 3, ... tokens, and of 5 tokens each."""
    growing = torch.repeat_interleave(torch.arange(length), torch.arange(1, length + 1))[:length]
    return torch.stack((growing, torch.arange(length) // 5))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 64])
@pytest.mark.parametrize("length", [1, 8, 13])
def test_chunks_compute_the_recurrence(documents, chunk, length):
    args = inputs(length)
    ids = document_ids(length) if documents else None
    out = gated_retention_reference(*args, scale=0.5, document_ids=ids, chunk=chunk)
    torch.testing.assert_close(out.double(), recurrence(*args, 0.5, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("documents", [False, True])
def test_gradients_are_those_of_the_recurrence(documents):
    args = inputs(11)
    ids = document_ids(11) if documents else None
    out = gated_retention_reference(*args, scale=0.5, document_ids=ids, chunk=4)
    expected = recurrence(*args, 0.5, ids)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * probe).sum(), args)
    for grad, wanted in zip(grads, torch.autograd.grad((expected * probe).sum(), args), strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-5)


def test_strong_decay_over_a_long_chunk_stays_finite():
    q, k, v, _ = inputs(200)
    log_decay = torch.full((B, 200, H), -3.0)
    out = gated_retention_reference(q, k, v, log_decay, scale=1.0)
    torch.testing.assert_close(out.double(), recurrence(q, k, v, log_decay, 1.0), atol=1e-5, rtol=1e-5)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_on_a_cpu_the_plain_form_is_used():
    args = inputs(9)
    ids = document_ids(9)
    expected = gated_retention_reference(*args, scale=0.5, document_ids=ids)
    assert torch.equal(gated_retention(*args, scale=0.5, document_ids=ids), expected)


def test_computes_in_fp32_under_autocast():
    args = inputs(13)
    expected = gated_retention_reference(*args, scale=0.5, chunk=4)
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_retention_reference(*args, scale=0.5, chunk=4)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_output_has_the_dtype_of_the_values():
    q, k, v, log_decay = inputs(9)
    out = gated_retention_reference(q.bfloat16(), k.bfloat16(), v.bfloat16(), log_decay, scale=0.5)
    assert out.dtype == torch.bfloat16

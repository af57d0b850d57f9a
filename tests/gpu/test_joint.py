"""One softmax over several slots on a GPU, by every kernel that returns a log-sum-exp, against fp32 maths."""

from __future__ import annotations

import pytest
import torch

from cllm.kernels.attention import Mask
from cllm.kernels.backends import BACKENDS, document_boundaries
from cllm.kernels.decode import Stored, Visible
from cllm.kernels.joint import DecodePart, JointPart, joint_attention, joint_decode
from cllm.kernels.merge import merge

NAMES = [name for name, backend in BACKENDS.items() if backend.returns_lse]
B, T, H, D = 2, 333, 4, 64


def definition(q, parts, sink):
    """One softmax over the keys of all parts side by side, and over the sink."""
    scores, values = [], []
    for k, v, mask in parts:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        z = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        scores.append(z.masked_fill(~mask.dense(q.shape[1], k.shape[1], q.device), -torch.inf))
        values.append(v)
    scores.append(sink.to(q.dtype)[None, :, None, None].expand(*scores[0].shape[:3], 1))
    values.append(torch.zeros_like(q[:, :1]))
    return torch.einsum("bhts,bshd->bthd", torch.cat(scores, -1).softmax(-1), torch.cat(values, 1))


def with_gradients(compute, inputs):
    out = compute(*inputs)
    probe = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
    grads = torch.autograd.grad(out, inputs, probe.bfloat16().to(out.dtype))
    return [x.detach().float() for x in (out, *grads)]


@pytest.mark.parametrize("form", ["causal", "documents", "more keys"])
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_computes_its_part_of_one_softmax(gpu, name, form):
    """Twice the error of plain maths in bf16 (three times for gradients), and two roundings of the largest value."""
    if reason := BACKENDS[name].unavailable():
        pytest.skip(reason)
    generator = torch.Generator(gpu).manual_seed(0)
    ids = (torch.arange(T, device=gpu) >= 100).long().expand(B, -1) if form == "documents" else None
    documents = None if ids is None else document_boundaries(ids)
    size = T + 40 if form == "more keys" else T

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=gpu, dtype=torch.bfloat16, generator=generator).requires_grad_()

    inputs = [normal(B, T, H, D), *(normal(B, size, H, D) for _ in range(2)), *(normal(B, T, 2, D) for _ in range(2))]
    inputs.append(torch.randn(H, device=gpu, generator=generator).requires_grad_())
    masks = (Mask(None, False, ids, documents), Mask(50, False, ids, documents))

    def parts(far_k, far_v, near_k, near_v):
        return [JointPart(far_k, far_v, masks[0]), JointPart(near_k, near_v, masks[1])]

    def ours(q, *tensors):
        return joint_attention(q, parts(*tensors[:4]), tensors[4], backend=name)

    def plain(q, *tensors):
        return definition(q, parts(*tensors[:4]), tensors[4])

    found, half = with_gradients(ours, inputs), with_gradients(plain, inputs)
    exact = with_gradients(plain, [x.detach().float().requires_grad_() for x in inputs])
    for n, (got, rounded, wanted) in enumerate(zip(found, half, exact, strict=True)):
        allowed = (3 if n else 2) * (rounded - wanted).abs().max() + 2 * 2**-8 * wanted.abs().max() + 1e-3
        assert (got - wanted).abs().max() <= allowed, n


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_compiled_it_computes_the_same(gpu, name, n):
    """Of several windows, in bf16, with keys that are rotated before and gradients that are added after it."""
    if name is not None and (reason := BACKENDS[name].unavailable()):
        pytest.skip(reason)
    torch.compiler.reset()  # the cases before are versions of the same function
    generator = torch.Generator(gpu).manual_seed(0)
    shapes = [(B, T, H, D)] * (1 + 2 * n)
    tensors = [torch.randn(s, device=gpu, dtype=torch.bfloat16, generator=generator) for s in shapes]
    inputs = [*(x.requires_grad_() for x in tensors), torch.randn(H, device=gpu, generator=generator).requires_grad_()]

    def attend(q, *rest):
        *slots, sink = rest
        q = torch.cat((q[..., D // 2 :], -q[..., : D // 2]), -1).float() * 1.25
        parts = [JointPart(*slots[i : i + 2], Mask(40 * (i + 1) if i else None)) for i in range(0, 2 * n, 2)]
        return joint_attention(q.bfloat16(), parts, sink, backend=name or "auto")

    found, wanted = (with_gradients(f, inputs) for f in (torch.compile(attend, fullgraph=True), attend))
    for i, (got, expected) in enumerate(zip(found, wanted, strict=True)):
        assert (got - expected).abs().max() <= 2**-7 * expected.abs().max(), i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_are_merged_by_triton(gpu, dtype):
    """Against plain torch in fp64: as kernels return tensors, in other layouts, and where parts see nothing."""
    generator = torch.Generator(gpu).manual_seed(0)
    for b, t, h, d, n in ((2, 4096, 16, 64, 2), (1, 1000, 3, 96, 3), (3, 1, 16, 128, 2), (2, 77, 5, 256, 1)):
        for turned in (False, True):
            outs = [
                torch.randn(b, h, t, d, device=gpu, generator=generator).to(dtype).transpose(1, 2) for _ in range(n)
            ]
            lses = [6 * torch.randn(h, b, t, device=gpu, generator=generator).transpose(0, 1) for _ in range(n)]
            lses[0][..., ::3] = -torch.inf
            for lse in lses:
                lse[..., -1] = -torch.inf
            if not turned:
                outs, lses = [x.contiguous() for x in outs], [x.contiguous() for x in lses]
            for sink in (None, torch.randn(h, device=gpu, generator=generator)):
                out, lse = merge(outs, lses, sink, torch.float32, "triton")
                exact = merge([x.double() for x in outs], [x.double() for x in lses], sink, torch.float64, "reference")
                torch.testing.assert_close(out.double(), exact[0], atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(lse.double(), exact[1], atol=1e-6, rtol=1e-6)
                assert torch.equal(merge(outs, lses, sink, dtype, "triton")[0], out.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_attends_to_rings_of_different_sizes(gpu, dtype):
    """By the Triton kernels, against plain torch."""
    torch.manual_seed(0)
    q, sink = torch.randn(B, H, D, device=gpu, dtype=dtype), torch.randn(H, device=gpu)
    column, first = torch.tensor([700], device=gpu), torch.tensor([0, 690], device=gpu)
    parts = []
    for size, groups, window in ((1024, H, None), (128, 2, 128), (1024, 1, 16)):
        k, v = (Stored(torch.randn(B, size, groups, D, device=gpu, dtype=dtype)) for _ in range(2))
        parts.append(DecodePart(k, v, Visible(column, first, window, False)))
    found = joint_decode(q, parts, sink, scale=D**-0.5, kernel="triton")
    wanted = joint_decode(q, parts, sink, scale=D**-0.5, kernel="reference")
    torch.testing.assert_close(found, wanted, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-3)

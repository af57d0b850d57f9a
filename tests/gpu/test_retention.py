"""flash-linear-attention's kernel against the plain recurrence, forward and backward."""

from __future__ import annotations

import pytest
import torch

from cllm.kernels.retention import gated_retention, gated_retention_from, gated_retention_reference

pytest.importorskip("fla", reason="flash-linear-attention is not installed")


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [256, 300])
def test_library_kernel_is_the_reference(gpu: torch.device, documents: bool, length: int) -> None:
    torch.manual_seed(0)
    heads, dim = 4, 64
    inputs = [torch.randn(2, length, heads, dim, device=gpu, dtype=torch.bfloat16) for _ in range(3)]
    decay = torch.nn.functional.logsigmoid(torch.randn(2, length, heads, device=gpu)) / 16
    ids = (torch.arange(length, device=gpu)[None] // 100).expand(2, -1).contiguous() if documents else None
    weight = torch.randn(2, length, heads, dim, device=gpu)
    found = []
    for function in (gated_retention, gated_retention_reference):
        leaves = [t.detach().clone().requires_grad_() for t in (*inputs, decay)]
        out = function(*leaves, scale=dim**-0.5, document_ids=ids)
        (out.float() * weight).sum().backward()
        found.append([out, *(t.grad for t in leaves)])
    for ours, theirs in zip(*found, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 2e-2, "bf16 operands"


@pytest.mark.parametrize("lengths", [[200, 56], [64, 1, 1, 190]])
def test_library_kernel_continues_from_a_state(gpu: torch.device, lengths: list[int]) -> None:
    torch.manual_seed(0)
    heads, dim, length = 4, 64, sum(lengths)
    q, k, v = (torch.randn(2, length, heads, dim, device=gpu, dtype=torch.bfloat16) for _ in range(3))
    decay = torch.nn.functional.logsigmoid(torch.randn(2, length, heads, device=gpu)) / 16
    whole = gated_retention_reference(q, k, v, decay, scale=dim**-0.5)
    state, parts = torch.zeros(2, heads, dim, dim, device=gpu), []
    for inputs in zip(*(t.split(lengths, dim=1) for t in (q, k, v, decay)), strict=True):
        out, state = gated_retention_from(state, *inputs, scale=dim**-0.5)
        parts.append(out)
    error = (torch.cat(parts, 1).float() - whole.float()).norm() / whole.float().norm()
    assert error < 1e-2, "bf16 operands"

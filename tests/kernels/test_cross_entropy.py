"""Cross-entropy whose gradient overwrites the logits."""

import pytest
import torch
import torch.nn.functional as F

from cllm.kernels import cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_and_gradient_are_those_of_torch(dtype):
    draw = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(20, 50, generator=draw)).to(dtype)
    labels = torch.randint(50, (20,), generator=draw)
    labels[[3, 4, 19]] = -100
    leaf = logits.float().clone().requires_grad_()
    wanted = F.cross_entropy(leaf, labels, ignore_index=-100, reduction="none")
    wanted.sum().backward()
    nats = cross_entropy.by_torch(logits, labels, -100)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, wanted.detach())
    torch.testing.assert_close(logits, leaf.grad.to(dtype))
    assert not logits[3].any()


def test_quack_is_not_for_a_cpu():
    assert cross_entropy.unavailable(torch.device("cpu"), 64, torch.float32) == "needs a CUDA device"

"""All split-KV decoding kernels have the parameters of `SplitCall`, in its order."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from cllm.kernels import gluon_latent, triton_decode, triton_tied
from cllm.kernels.split_call import SplitCall

KERNELS = {
    "split_dot": triton_decode.split_dot,
    "split_elementwise": triton_decode.split_elementwise,
    "split_tied": triton_tied.split_tied,
    "split_latent": gluon_latent.split_latent,
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_arguments_are_in_the_order_of_every_kernel(kernel: Any) -> None:
    """Triton's interpreter does not run Gluon: in `split_latent` a wrong order would show on a GPU only."""
    call = SplitCall(
        column=torch.tensor([3]), first=torch.tensor([1]), length=17, window=5, exclude_self=True, log2_scale=0.25,
        partial=torch.zeros(1, 2, 3, 4), log_sums=torch.zeros(1, 2, 3),
    )  # fmt: skip
    names = list(inspect.signature(getattr(kernel, "fn", kernel)).parameters)
    own = [name for name in names if name == "S" or hasattr(call, name)]
    together = names[names.index(own[0]) :][: len(own)]
    assert own == together, "side by side"
    taken = [call.length if name == "S" else getattr(call, name) for name in own]
    assert len(taken) == len(call.arguments) == 7
    assert all(a is b for a, b in zip(taken, call.arguments, strict=True))
    assert "EXCLUDE_SELF" in names

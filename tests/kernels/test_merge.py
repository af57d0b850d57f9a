"""Parts of one softmax merged as one kernel, against the formula in fp64.

Run as a program, this file tests the Triton kernel, interpreted on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.kernels import merge as merging
from cllm.kernels.merge import merge

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1, 1, 1), (3, 1, 5, 24), (2, 70, 3, 64), (1, 300, 2, 16), (2, 9, 1, 520))
"""B, T, H, E: lengths and widths that are no multiples of a tile, and one of several tiles."""


def parts(
    shape: tuple[int, int, int, int], n: int, dtype: torch.dtype, *, contiguous: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and log-sum-exps of n parts. The second sees nothing in every third token, all nothing in the last.

    Or outputs of heads before tokens, and log-sum-exps of heads before sequences, as kernels return them.
    """
    batch, length, heads, width = shape
    draw = torch.Generator().manual_seed(n)
    outs, lses = [], []
    for part in range(n):
        out = torch.randn(batch, heads, length, width + 8, generator=draw).to(dtype)[..., :width].transpose(1, 2)
        lse = 6 * torch.randn(heads, batch, length, generator=draw).transpose(0, 1)
        if part == 1:
            lse[..., ::3] = -torch.inf
        lse[..., -1] = -torch.inf
        outs.append(out.contiguous() if contiguous else out)
        lses.append(lse.contiguous() if contiguous else lse)
    return outs, lses


def formula(outs: list[Tensor], lses: list[Tensor], sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(L_p) of small L_p as they are, in fp64: Σ exp(L_p) o_p / Z and log Z, where Z = Σ exp(L_p) + exp(s)."""
    weights = [lse.double().exp() for lse in lses]
    total = sum(weights) + (0 if sink is None else sink.double().exp()[:, None])
    out = sum(weight.transpose(1, 2)[..., None] * out.double() for out, weight in zip(outs, weights, strict=True))
    return out / total.masked_fill(total == 0, 1).transpose(1, 2)[..., None], total.log()


def cases() -> Iterator[tuple[list[Tensor], list[Tensor], Tensor | None]]:
    for shape in SHAPES:
        for n, contiguous, with_sink in ((1, True, True), (2, True, False), (2, False, True), (3, False, False)):
            sink = torch.linspace(-2, 2, shape[2]) if with_sink else None
            for dtype in DTYPES:
                yield *parts(shape, n, dtype, contiguous=contiguous), sink


def compare(kernel: str) -> None:
    """Outputs in fp32, and in the dtype of the parts: that is the fp32 output, rounded once."""
    for outs, lses, sink in cases():
        out, lse = merge(outs, lses, sink, torch.float32, kernel)
        wanted, wanted_lse = formula(outs, lses, sink)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        assert lse.dtype == torch.float32
        torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(lse.double(), wanted_lse, atol=1e-6, rtol=1e-6)
        if sink is None:
            assert (out[:, -1] == 0).all()
            assert (lse[..., -1] == -torch.inf).all()
        rounded, _ = merge(outs, lses, sink, outs[0].dtype, kernel)
        if kernel == "triton" and rounded.dtype == torch.bfloat16:  # the interpreter rounds it towards zero
            torch.testing.assert_close(rounded, out.bfloat16(), atol=0, rtol=2**-7)
        else:
            assert torch.equal(rounded, out.to(outs[0].dtype))


def large(kernel: str) -> None:
    """Log-sum-exps whose exponentials do not exist in fp32, sinks of 16 bits, and numbers that are not finite."""
    outs, lses = parts((1, 5, 2, 16), 2, torch.bfloat16, contiguous=True)
    sink = torch.tensor([1.5, -1.5])
    out, lse = merge(outs, lses, sink, torch.float32, kernel)
    for shift in (-1000.0, 1000.0):
        shifted, moved = merge(outs, [x + shift for x in lses], (sink + shift).bfloat16(), torch.float32, kernel)
        nearest = merge(outs, lses, (sink + shift).bfloat16().float() - shift, torch.float32, kernel)
        torch.testing.assert_close(shifted, nearest[0], atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(moved, nearest[1] + shift, atol=1e-3, rtol=0)
    lses[0][0, 0, 1] = torch.nan
    found, total = merge(outs, lses, sink, torch.float32, kernel)
    assert found[0, 1, 0].isnan().all(), "a fault of a part must not disappear"
    assert total[0, 0, 1].isnan()
    found[0, 1, 0], total[0, 0, 1] = out[0, 1, 0], lse[0, 0, 1]
    torch.testing.assert_close((found, total), (out, lse))


def test_plain_torch_is_the_formula() -> None:
    compare("reference")
    large("reference")


def test_double_precision_stays_double() -> None:
    outs, lses = parts((2, 7, 3, 16), 2, torch.float32, contiguous=False)
    outs, lses = [out.double() for out in outs], [lse.double() for lse in lses]
    torch.testing.assert_close(merge(outs, lses, None, torch.float64), formula(outs, lses, None), atol=1e-14, rtol=0)


def test_what_the_kernel_cannot_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    outs, lses = parts((1, 3, 2, 16), 2, torch.bfloat16, contiguous=True)
    with pytest.raises(
        UserError, match=r"merge: kernel is \"triton\", which cannot: (the tensors are on the CPU|triton)"
    ):
        merge(outs, lses, None, torch.bfloat16, "triton")
    monkeypatch.setattr(merging.triton_decode, "MISSING", None)
    monkeypatch.setattr(merging.triton_decode, "INTERPRETED", True)
    monkeypatch.setattr(merging.triton_decode, "TYPES", dict.fromkeys(DTYPES))
    assert merging._unsupported(outs, lses) is None
    assert merging._unsupported([outs[0], outs[1].double()], lses) == "does not compute float64"
    assert merging._unsupported(outs, [lses[0], lses[1].double()]) == "needs log-sum-exps in float32"
    turned = outs[1].transpose(2, 3).contiguous().transpose(2, 3)
    assert merging._unsupported([outs[0], turned], lses) == "the channels of a tensor are not contiguous"


def test_triton_kernel_interpreted_is_the_formula(run_interpreted) -> None:
    run_interpreted(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare("triton")
    large("triton")

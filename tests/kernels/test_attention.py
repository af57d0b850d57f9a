"""Attention against loops over batch, heads, queries and keys in fp64."""

import itertools
import math

import pytest
import torch

from cllm.errors import UserError
from cllm.kernels.attention import Mask, attention

B = 2


def inputs(t: int, s: int, h: int, g: int, d: int, e: int):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, t, h, d), (B, s, g, d), (B, s, g, e))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def naive(q, k, v, *, window, exclude_self, documents, scale=None):
    """The definition: query t has key position S - T + t."""
    (batch, t_len, heads, d), (s_len, groups), e = q.shape, k.shape[1:3], v.shape[-1]
    scale = 1 / math.sqrt(d) if scale is None else scale
    out = torch.zeros(batch, t_len, heads, e, dtype=torch.float64)
    for b, t, h in itertools.product(range(batch), range(t_len), range(heads)):
        position, g = s_len - t_len + t, h * groups // heads
        seen = [
            s
            for s in range(s_len)
            if s <= position
            and not (exclude_self and s == position)
            and (window is None or position - s < window)
            and (documents is None or documents[b, s] == documents[b, position])
        ]
        if seen:
            weights = torch.stack([q[b, t, h].double() @ k[b, s, g].double() * scale for s in seen]).softmax(0)
            out[b, t, h] = sum(w * v[b, s, g].double() for w, s in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("t", "s"), [(7, 7), (3, 7), (1, 7)])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("d", "e"), [(6, 6), (6, 4)])
def test_attention_is_softmax_over_what_the_mask_admits(documents, exclude_self, window, t, s, heads, groups, d, e):
    q, k, v = inputs(t, s, heads, groups, d, e)
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [4, 4, 5, 5, 5, 5, 5]]) if documents else None
    mask = Mask(window=window, exclude_self=exclude_self, document_ids=ids)
    out = attention(q, k, v, mask)
    with torch.no_grad():
        expected = naive(q, k, v, window=window, exclude_self=exclude_self, documents=ids)
    assert out.shape == (B, t, heads, e)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_gradients_are_those_of_the_definition(exclude_self):
    q, k, v = inputs(5, 7, 4, 2, 6, 4)
    ids = torch.tensor([[0, 0, 0, 1, 2, 2, 2], [4, 4, 5, 5, 5, 5, 5]])
    out = attention(q, k, v, Mask(window=3, exclude_self=exclude_self, document_ids=ids))
    expected = naive(q, k, v, window=3, exclude_self=exclude_self, documents=ids)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for grad, wanted in zip(
        torch.autograd.grad((out * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        assert grad.isfinite().all()
        torch.testing.assert_close(grad, wanted, atol=1e-5, rtol=1e-5)


def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient():
    q, k, v = inputs(4, 4, 2, 2, 6, 6)
    ids = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3]])
    out = attention(q, k, v, Mask(exclude_self=True, document_ids=ids))
    blind = torch.tensor([[True, False, True, False], [True, True, True, True]])
    assert (out[blind] == 0).all()
    assert (out[~blind] != 0).all()
    out.sum().backward()
    assert (q.grad[blind] == 0).all()
    assert (v.grad[1] == 0).all()


def test_scale_replaces_the_default():
    q, k, v = inputs(5, 5, 2, 2, 6, 6)
    expected = naive(q, k, v, window=None, exclude_self=False, documents=None, scale=0.9)
    torch.testing.assert_close(attention(q, k, v, Mask(), scale=0.9).double(), expected, atol=1e-5, rtol=1e-5)


def test_one_mask_serves_several_lengths():
    mask = Mask(window=3)
    for t, s in ((1, 7), (7, 7), (3, 5)):
        q, k, v = inputs(t, s, 2, 2, 6, 6)
        expected = naive(q, k, v, window=3, exclude_self=False, documents=None)
        torch.testing.assert_close(attention(q, k, v, mask).double(), expected, atol=1e-5, rtol=1e-5)


def test_backend_by_name_is_what_auto_computes():
    q, k, v = inputs(5, 5, 2, 2, 6, 6)
    torch.testing.assert_close(attention(q, k, v, Mask(), backend="sdpa"), attention(q, k, v, Mask()))


def test_unknown_backend_is_refused_by_its_key():
    q, k, v = inputs(2, 2, 2, 2, 4, 4)
    with pytest.raises(UserError, match=r'attention\.backend is "nosuch"; allowed: auto, .*sdpa'):
        attention(q, k, v, Mask(), backend="nosuch")

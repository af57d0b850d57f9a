"""Attention backends against the definition: those that run on a CPU, and the calls of the others' kernels."""

import itertools
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from cllm.kernels.attention import Mask, attention, document_boundaries
from cllm.kernels.backends import BACKENDS, Case, FlashBackend, flash4, max_documents, sdpa

IDS = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2], [4, 4, 5, 5, 5, 5, 5, 6]])
MASKS = [
    Mask(window=window, exclude_self=exclude_self, document_ids=ids)
    for window, exclude_self, ids in itertools.product((None, 1, 3, 100), (False, True), (None, IDS))
]
CUDA = torch.device("cuda")


def name_of(mask: Mask) -> str:
    rules = {"window": mask.window, "exclude_self": mask.exclude_self, "documents": mask.document_ids is not None}
    return "-".join(f"{rule}{value}" for rule, value in rules.items() if value) or "causal"


def inputs(t=8, s=8, h=4, g=2, d=16, e=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, t, h, d), (2, s, g, d), (2, s, g, e))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def probabilities(q, k, mask, scale):
    """(B, H, T, S), zeros in the rows of queries that see nothing; query t has key position S - T + t."""
    (t_len, heads), (s_len, groups) = q.shape[1:3], k.shape[1:3]
    distance = torch.arange(s_len - t_len, s_len)[:, None] - torch.arange(s_len)
    seen = (distance >= int(mask.exclude_self)) & (distance < (mask.window or s_len))
    seen = seen.expand(q.shape[0], 1, -1, -1)
    if mask.document_ids is not None:
        ids = mask.document_ids
        seen = seen & (ids[:, None, s_len - t_len :, None] == ids[:, None, None])
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(heads // groups, dim=2)) * scale
    return scores.masked_fill(~seen, -1e30).softmax(-1) * seen


def naive(q, k, v, mask, scale):
    """The definition, in the dtype of the inputs."""
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshe->bthe", probabilities(q, k, mask, scale), v)


def naive_backward(d_out, q, k, v, mask, scale):
    """Gradients of `naive` by hand, for code that runs below autograd."""
    group, weights = q.shape[2] // k.shape[2], probabilities(q, k, mask, scale)
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    d_weights = torch.einsum("bthe,bshe->bhts", d_out, values)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * scale
    d_q = torch.einsum("bhts,bshd->bthd", d_scores, keys)
    d_k = torch.einsum("bhts,bthd->bshd", d_scores, q).unflatten(2, (-1, group)).sum(3)
    d_v = torch.einsum("bhts,bthe->bshe", weights, d_out).unflatten(2, (-1, group)).sum(3)
    return d_q, d_k, d_v


def agree(run, mask, tensors, scale=0.3, **tolerance):
    """Outputs and gradients of `run` are those of the definition."""
    probe = torch.randn(1, 1, 1, tensors[2].shape[-1], generator=torch.Generator().manual_seed(1)).double()
    results = []
    for compute in (run, naive):
        out = compute(*tensors, mask, scale)
        results.append((out.detach(), *torch.autograd.grad((out * probe).sum(), tensors)))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, **tolerance)


# Parity on a CPU


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
@pytest.mark.parametrize("shape", [{}, {"g": 4}, {"e": 8}, {"t": 3}, {"t": 1}], ids=str)
def test_sdpa_is_the_definition(mask, shape):
    agree(BACKENDS["sdpa"].run, mask, inputs(**shape))


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
@pytest.mark.parametrize("shape", [{}, {"g": 4}, {"e": 8}, {"t": 3}], ids=str)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_is_the_definition(mask, shape):
    """Only the forward: FlexAttention has no backward on a CPU."""
    q, k, v = (x.detach() for x in inputs(**shape, dtype=torch.float32))
    out = BACKENDS["flex"].run(q, k, v, mask, 0.3)
    torch.testing.assert_close(out, naive(q, k, v, mask, 0.3), atol=1e-5, rtol=1e-5)


class FlashOnCpu(FlashBackend):
    """A kernel as FlashAttention offers it: causal, a window, documents; no `exclude_self`."""

    name = "cpu"

    def unavailable(self):
        return None

    def dense(self, q, k, v, scale, window):
        return naive(q, k, v, Mask(window=window), scale)

    def packed(self, q, k, v, cu_seqlens, max_len, scale, window):
        ids = torch.searchsorted(cu_seqlens, torch.arange(q.shape[0]), right=True)
        return naive(q[None], k[None], v[None], Mask(window=window, document_ids=ids[None]), scale)[0]


@pytest.mark.parametrize("mask", MASKS, ids=name_of)
@pytest.mark.parametrize("shape", [{}, {"e": 8}, {"t": 3}, {"t": 1}], ids=str)
def test_flash_kernels_get_every_mask_that_they_say_they_support(mask, shape):
    """The first token of a document sees nothing under `exclude_self`, and a window of w reaches w - 1 keys back."""
    lengths = {1: "T = 1", 3: "T < S"}.get(shape.get("t", 8), "T = S")
    case = Case(
        device=CUDA,
        capability=(9, 0),
        dtype=torch.bfloat16,
        head_dim=16,
        value_dim=shape.get("e", 16),
        lengths=lengths,
        window=mask.window is not None,
        exclude_self=mask.exclude_self,
        sees_nothing=mask.exclude_self and mask.window == 1,
        documents=mask.document_ids is not None,
    )
    if reason := FlashOnCpu().unsupported(case):
        assert reason in {"no query sees a key", "needs as many queries as keys with documents"}
        assert case.sees_nothing or (case.documents and case.lengths != "T = S")
        return
    agree(FlashOnCpu().run, mask, inputs(**shape))


# Document boundaries


def test_boundaries_hold_every_document_and_then_empty_ones():
    documents = document_boundaries(IDS, limit=10)
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 8, 10, 15, 16, 16, 16, 16, 16]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.max_len == 8
    assert documents.starts[0].tolist() == [True, False, False, True, True, False, False, False]


def test_boundaries_keep_their_shape_from_batch_to_batch():
    shapes = set()
    for seed in range(5):
        ids = (torch.rand(4, 512, generator=torch.Generator().manual_seed(seed)) < 0.02 * seed).cumsum(1)
        documents = document_boundaries(ids)
        shapes.add((documents.cu_seqlens.shape, documents.max_len))
        lengths = documents.cu_seqlens.diff()
        assert (lengths >= 0).all()
        assert lengths.sum() == ids.numel()
        assert (lengths > 0).sum() == documents.starts.sum()
    assert shapes == {((max_documents(4, 512) + 1,), 512)}


def test_rows_are_documents_even_if_their_ids_are_equal():
    assert document_boundaries(torch.zeros(3, 4, dtype=torch.long)).cu_seqlens[:4].tolist() == [0, 4, 8, 12]


def test_a_document_a_token_fits_small_batches_and_too_many_documents_are_an_error():
    ids = torch.arange(6)[None]
    assert document_boundaries(ids).cu_seqlens.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert document_boundaries(ids, limit=6).cu_seqlens[-1] == 6
    with pytest.raises(RuntimeError, match="more than 5 documents in 1 x 6 tokens"):
        document_boundaries(ids, limit=5)


def test_autocast_casts_as_torch_attention_does():
    q, k, v = inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, Mask())
    assert out.dtype == torch.bfloat16


# In compiled code


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_attention_is_one_graph_with_every_mask():
    """Windows, head counts and lengths that differ: what the compiler makes symbolic must not break the choice."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, mask):
        return attention(q * 1.0, k, v, mask, scale=0.3) * 1.0

    with torch._dynamo.config.patch(recompile_limit=64):
        for mask in (Mask(), Mask(window=2), Mask(window=3), Mask(exclude_self=True), Mask(2, True, IDS)):
            agree(lambda q, k, v, mask, scale: step(q, k, v, mask), mask, inputs())
        agree(lambda q, k, v, mask, scale: step(q, k, v, mask), Mask(), inputs(g=4))
        agree(lambda q, k, v, mask, scale: step(q, k, v, mask), Mask(), inputs(g=1, d=24, e=24))
        for t, s in ((5, 5), (6, 6), (3, 9), (4, 7), (1, 7), (1, 1)):
            agree(lambda q, k, v, mask, scale: step(q, k, v, mask), Mask(), inputs(t=t, s=s))
            agree(lambda q, k, v, mask, scale: step(q, k, v, mask), Mask(window=2), inputs(t=t, s=s))


@pytest.mark.usefixtures("fresh_compiler")
def test_documents_that_change_do_not_recompile():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, mask):
        return FlashOnCpu().run(q, k, v, mask, 0.3)

    q, k, v = inputs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids in (IDS, torch.zeros_like(IDS), torch.arange(16).view(2, 8)):
            mask = Mask(exclude_self=True, document_ids=ids, documents=document_boundaries(ids))
            torch.testing.assert_close(step(q, k, v, mask), naive(q, k, v, mask, 0.3))


@pytest.fixture
def mocked_flash4(monkeypatch):
    """The package's two functions, by the definition."""

    def mask_of(q, cu_seqlens, causal, left, right):
        assert causal is (right is None)
        window = None if left is None else left + 1
        if cu_seqlens is None:
            return Mask(window=window)
        ids = torch.searchsorted(cu_seqlens, torch.arange(q.shape[0]), right=True)
        return Mask(window=window, document_ids=ids[None])

    def batched(*tensors):
        return [x if x.ndim == 4 else x[None] for x in tensors]

    def forward(q, k, v, *, softmax_scale, return_lse, causal, window_size_left=None, window_size_right=None, **varlen):
        assert return_lse
        cu_seqlens = varlen.get("cu_seqlens_q")
        assert all(type(varlen[name]) is int for name in varlen if name.startswith("max_seqlen"))
        mask = mask_of(q, cu_seqlens, causal, window_size_left, window_size_right)
        out = naive(*batched(q, k, v), mask, softmax_scale).view(*q.shape[:-1], -1)
        shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens is None else (q.shape[1], q.shape[0])
        return out.contiguous(), torch.zeros(shape), None, None, None

    def backward(
        q, k, v, out, dout, lse, *, softmax_scale, deterministic, dq, dk, dv, causal, window_size_left=None,
        window_size_right=None, **varlen
    ):  # fmt: skip
        assert dout.is_contiguous()
        mask = mask_of(q, varlen.get("cu_seqlens_q"), causal, window_size_left, window_size_right)
        for target, grad in zip(
            (dq, dk, dv), naive_backward(*batched(dout, q, k, v), mask, softmax_scale), strict=True
        ):
            target.copy_(grad.view_as(target))
        return dq, dk, dv

    monkeypatch.setattr(flash4, "_loaded", [SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)])


@pytest.mark.usefixtures("mocked_flash4", "fresh_compiler")
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask.window != 1], ids=name_of)
@pytest.mark.parametrize("compiled", [False, True])
def test_flash4_operators_and_their_gradients(mask, compiled):
    run = BACKENDS["flash4"].run
    if compiled:
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    agree(run, mask, inputs(e=8))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask.window != 1], ids=name_of)
@pytest.mark.parametrize("name", ["flash2", "flash3"])
@pytest.mark.parametrize("compiled", [False, True])
def test_flash2_and_flash3_get_the_arguments_that_they_document(monkeypatch, name, mask, compiled):
    """Their public functions, by the definition: windows are (keys before, keys after), -1 for all."""

    def dense(q, k, v, *, softmax_scale, causal, window_size, deterministic):
        assert (causal, window_size[1], deterministic) == (True, 0, False)
        return naive(q, k, v, Mask(window=None if window_size[0] < 0 else window_size[0] + 1), softmax_scale)

    def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, deterministic):
        assert max_q == max_k == 8
        ids = torch.searchsorted(cu_q, torch.arange(q.shape[0]), right=True)
        window = None if window_size[0] < 0 else window_size[0] + 1
        out = naive(q[None], k[None], v[None], Mask(window=window, document_ids=ids[None]), softmax_scale)[0]
        return (out, None) if name == "flash3" else out  # some releases of 3 return the log-sum-exp too

    package = ModuleType("package")
    package.flash_attn_func, package.flash_attn_varlen_func = dense, varlen
    monkeypatch.setattr(BACKENDS[name], "_module", package)
    run = BACKENDS[name].run
    agree(torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run, mask, inputs(e=8))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mask", [Mask(), Mask(exclude_self=True)], ids=name_of)
def test_cudnn_stays_in_the_graph(monkeypatch, mask):
    """The context manager that picks the kernel, with a kernel that a CPU has."""
    monkeypatch.setattr(sdpa, "SDPBackend", SimpleNamespace(CUDNN_ATTENTION=SDPBackend.MATH))
    for run in (BACKENDS["cudnn"].run, torch.compile(BACKENDS["cudnn"].run, fullgraph=True, backend="aot_eager")):
        agree(run, mask, inputs())


@pytest.mark.usefixtures("mocked_flash4")
@pytest.mark.parametrize("packed", [False, True])
def test_flash4_operators_keep_the_rules_of_operators(packed):
    """Schema, shape functions, autograd registration, ahead-of-time dispatch."""
    q, k, v = inputs(e=8)
    documents = document_boundaries(IDS)
    if packed:
        q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
    cu_seqlens = documents.cu_seqlens if packed else None
    torch.library.opcheck(flash4.flash4_forward, (q, k, v, cu_seqlens, 8, 0.3, 3))
    out, lse = flash4.flash4_forward(q, k, v, cu_seqlens, 8, 0.3, 3)
    tensors = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(flash4.flash4_backward, (*tensors, cu_seqlens, 8, 0.3, 3))

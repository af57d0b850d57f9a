"""Every attention backend that is installed against fp32 maths on a GPU, forward and backward, with every mask.

Tolerance: a kernel may err twice as much as a plain implementation in the same half precision does (three times for
gradients, which pass through more roundings), plus two roundings of the largest value, plus 1e-3 for gradients that are
zero by cancellation. A key too many or too few shows as an error of the order of the values themselves.
"""

import logging
from dataclasses import dataclass, replace

import pytest
import torch

from cllm.kernels.attention import Mask, attention, choose, document_boundaries
from cllm.kernels.backends import BACKENDS, Case
from cllm.kernels.choice import log_once

B = 2


@dataclass(frozen=True)
class Shape:
    """One call; lengths that no tile divides."""

    d: int = 64
    e: int = 64
    h: int = 4
    g: int = 4
    t: int = 333
    s: int = 333
    window: int | None = None
    exclude_self: bool = False
    documents: bool = False

    def __str__(self) -> str:
        default = Shape()
        changed = (f"{name}{value}" for name, value in vars(self).items() if value != getattr(default, name))
        return "-".join(changed) or "causal"


WIDE = {"d": 128, "e": 128}
SHAPES = [
    Shape(),
    Shape(**WIDE),
    Shape(g=2),
    Shape(**WIDE, g=1),
    Shape(d=192, e=128),
    Shape(window=17),
    Shape(**WIDE, window=150),
    Shape(window=1),
    Shape(documents=True),
    Shape(**WIDE, documents=True),
    Shape(g=2, documents=True),
    Shape(documents=True, window=17),
    Shape(exclude_self=True),
    Shape(exclude_self=True, window=17),
    Shape(exclude_self=True, documents=True),
    Shape(exclude_self=True, documents=True, window=17),
    Shape(exclude_self=True, window=1),
    Shape(t=100),
    Shape(t=100, window=17),
    Shape(t=100, exclude_self=True),
    Shape(t=100, documents=True),
    Shape(t=1),
]
# Every new shape costs FlexAttention a compilation: one of each kind.
FLEX = [
    Shape(g=2),
    Shape(d=192, e=128),
    Shape(**WIDE, window=150),
    Shape(documents=True, window=17),
    Shape(exclude_self=True, documents=True, window=17),
    Shape(exclude_self=True, window=1),
    Shape(t=100, documents=True),
]
CALLS = [(name, shape) for name in BACKENDS for shape in (FLEX if name == "flex" else SHAPES)]


def tensors(shape: Shape, device, dtype=torch.bfloat16):
    generator = torch.Generator(device).manual_seed(0)
    sizes = ((B, shape.t, shape.h, shape.d), (B, shape.s, shape.g, shape.d), (B, shape.s, shape.g, shape.e))
    return [torch.randn(size, device=device, dtype=dtype, generator=generator).requires_grad_() for size in sizes]


def mask_of(shape: Shape, device) -> Mask:
    ids = None
    if shape.documents:
        # In the first row documents of 1, 1, 63, 64, 128 and the rest; in the second one document.
        ends = torch.tensor([1, 2, 65, 129, 257], device=device)
        first = torch.searchsorted(ends, torch.arange(shape.s, device=device), right=True)
        ids = torch.stack((first, torch.zeros_like(first)))
    return Mask(shape.window, shape.exclude_self, ids)


def naive(q, k, v, mask: Mask):
    """The definition, in the dtype of the inputs."""
    (t_len, heads), (s_len, groups) = q.shape[1:3], k.shape[1:3]
    keys = torch.arange(s_len, device=q.device)
    distance = keys[s_len - t_len :, None] - keys
    seen = (distance >= int(mask.exclude_self)) & (distance < (mask.window or s_len))
    seen = seen.expand(B, 1, -1, -1)
    if mask.document_ids is not None:
        ids = mask.document_ids
        seen = seen & (ids[:, None, s_len - t_len :, None] == ids[:, None, None])
    k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    return torch.einsum("bhts,bshe->bthe", weights, v)


def with_gradients(compute, inputs):
    """Output and gradients for q, k, v, in fp32."""
    out = compute(*inputs)
    probe = torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(1))
    grads = torch.autograd.grad(out, inputs, probe.bfloat16().to(out.dtype))
    return [x.detach().float() for x in (out, *grads)]


def assert_close(ours, plain, exact):
    """See the module's docstring. `plain` is the plain implementation in half precision, `exact` the one in fp32."""
    for name, got, half, wanted, factor in zip(
        ("out", "d_q", "d_k", "d_v"), ours, plain, exact, (2, 3, 3, 3), strict=True
    ):
        assert got.isfinite().all(), name
        allowed = factor * (half - wanted).abs().max() + 2 * 2**-8 * wanted.abs().max() + 1e-3
        error = (got - wanted).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, largest {wanted.abs().max():.2e}"


def truth(inputs, mask):
    """The plain implementation in the inputs' precision, and in fp32 (TF32 is off by default)."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    return with_gradients(lambda *x: naive(*x, mask), inputs), with_gradients(lambda *x: naive(*x, mask), exact)


def case_of(shape: Shape, device, dtype=torch.bfloat16) -> Case:
    return Case(
        device=device,
        capability=torch.cuda.get_device_capability(device),
        dtype=dtype,
        head_dim=shape.d,
        value_dim=shape.e,
        heads_per_kv_head=shape.h // shape.g,
        lengths="T = 1" if shape.t == 1 else "T = S" if shape.t == shape.s else "T < S",
        window=shape.window is not None,
        exclude_self=shape.exclude_self,
        sees_nothing=shape.exclude_self and shape.window == 1,
        documents=shape.documents,
    )


def need(name: str, shape: Shape, device, dtype=torch.bfloat16) -> None:
    """Skip with the backend's own reason."""
    reason = BACKENDS[name].unavailable() or BACKENDS[name].unsupported(case_of(shape, device, dtype))
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize(("name", "shape"), CALLS, ids=str)
def test_backend_is_the_definition(gpu, name, shape):
    need(name, shape, gpu)
    if name == "flex":
        torch._dynamo.reset()  # otherwise the compiler gives up after 8 shapes
    inputs, mask = tensors(shape, gpu), mask_of(shape, gpu)
    ours = with_gradients(lambda *x: attention(*x, mask, backend=name), inputs)
    assert_close(ours, *truth(inputs, mask))


@pytest.mark.parametrize("name", ["flex", "sdpa"])
def test_fp32_backends_are_the_definition(gpu, name):
    shape = Shape(documents=True, window=17)
    need(name, shape, gpu, torch.float32)
    inputs, mask = tensors(shape, gpu, torch.float32), mask_of(shape, gpu)
    ours = with_gradients(lambda *x: attention(*x, mask, backend=name), inputs)
    for got, wanted in zip(ours, with_gradients(lambda *x: naive(*x, mask), inputs), strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-3, rtol=2e-3)  # Triton may use TF32


@pytest.mark.parametrize("name", ["flash4", "flash3", "flash2", "varlen"])
@pytest.mark.parametrize("limit", [6, 700])
def test_empty_documents_change_nothing(gpu, name, limit):
    """Above 256 documents flash-attn-4 looks them up in another way."""
    shape = replace(Shape(documents=True), **WIDE)
    need(name, shape, gpu)
    inputs, mask = tensors(shape, gpu), mask_of(shape, gpu)
    assert mask.document_ids is not None
    padded = replace(mask, documents=document_boundaries(mask.document_ids, limit + 1))
    ours = with_gradients(lambda *x: attention(*x, padded, backend=name), inputs)
    assert_close(ours, *truth(inputs, mask))


@pytest.mark.parametrize(
    ("name", "documents"),
    [("flash4", False), ("flash4", True), ("cudnn", False), ("varlen", True), ("flex", True)],
)
def test_compiled_once_without_graph_breaks(gpu, name, documents):
    """One graph with elementwise work around the kernel; other documents in the next batch do not recompile."""
    shape = Shape(documents=documents)
    need(name, shape, gpu)
    torch._dynamo.reset()

    def around(q, k, v, mask):
        return attention(q * 1.5, k, v * 0.5, mask, backend=name) * 2

    step = torch.compile(around, fullgraph=True)
    inputs, mask = tensors(shape, gpu), mask_of(shape, gpu)
    batches = [mask]
    if mask.document_ids is not None:
        batches = [
            replace(Mask(document_ids=ids), documents=document_boundaries(ids))
            for ids in (mask.document_ids, mask.document_ids.flip(0), torch.zeros_like(mask.document_ids))
        ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in batches:
            ours = with_gradients(lambda *x, batch=batch: step(*x, batch), inputs)
            plain, exact = truth([inputs[0] * 1.5, inputs[1] * 1, inputs[2] * 0.5], batch)
            factors = (2, 2 * 1.5, 2, 2 * 0.5)  # of the output, and by the chain rule of each gradient
            assert_close(ours, *([f * x for f, x in zip(factors, xs, strict=True)] for xs in (plain, exact)))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["flash4", "varlen", "sdpa", "cudnn"])
def test_under_autocast(gpu, name):
    """fp32 inputs, as they leave an fp32 norm, go through a bf16 kernel."""
    shape = Shape()
    need(name, shape, gpu)
    inputs = [x.detach().float().requires_grad_() for x in tensors(shape, gpu)]

    def ours(*x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return attention(*x, Mask(), backend=name)

    assert ours(*inputs).dtype == torch.bfloat16
    plain, exact = truth([x.detach().bfloat16().requires_grad_() for x in inputs], Mask())
    assert_close(with_gradients(ours, inputs), plain, exact)


@pytest.mark.parametrize("name", ["flash4", "varlen", "cudnn"])
def test_no_device_sync(gpu, name):
    shape = Shape(documents=name != "cudnn")
    need(name, shape, gpu)
    inputs, mask = tensors(shape, gpu), mask_of(shape, gpu)
    run = lambda: attention(*inputs, replace(mask), backend=name).sum().backward()  # noqa: E731
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_flash4_is_deterministic_on_request(gpu):
    shape = Shape(g=2)
    need("flash4", shape, gpu)
    inputs = tensors(replace(shape, t=2000, s=2000), gpu)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients(lambda *x: attention(*x, Mask(), backend="flash4"), inputs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(before)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_auto_logs_its_choice(gpu, caplog):
    """With any packages installed, the chosen backend is correct, and the log gives the reasons (`-s` shows them)."""
    log_once.cache_clear()
    for shape in (Shape(), Shape(documents=True), Shape(d=192, e=128), Shape(exclude_self=True), Shape(t=1)):
        with caplog.at_level(logging.INFO, logger="cllm.kernels.choice"):
            name = choose("auto", case_of(shape, gpu))
        print(caplog.records[-1].getMessage())
        assert f"auto chose {name} for causal" in caplog.records[-1].getMessage()
        inputs, mask = tensors(shape, gpu), mask_of(shape, gpu)
        assert_close(with_gradients(lambda *x, m=mask: attention(*x, m), inputs), *truth(inputs, mask))

"""Random plans: bytes that a decoding step reads and FLOPs of a forward pass, counted as they happen.

More plans, and others every time:

    CLLM_PLANS=300 python -m pytest tests/plan/test_random_costs.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import cllm.kernels.joint
import cllm.model.attention
import cllm.model.joint
from cllm.cache.accounting import kv_bytes
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.kernels import decode
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters, forward_flops_per_token, meta_decoder
from cllm.plan.latent import Latent
from tests.plan.random_plans import GIVEN, PROPERTY, VOCABULARY, File, everything, formed, reshaped

LENGTH = 9


def bytes_read(model: Decoder, ids: torch.Tensor) -> float:
    """Bytes of cached tensors that the last token of `ids` (1, T) reads: of each call, every tensor once."""
    total = 0.0

    def counted(function: Any) -> Any:
        def call(queries: Any, keys: Any, values: Any, visible: Any, **options: Any) -> Any:
            nonlocal total
            for data in {stored.data.data_ptr(): stored.data for stored in (*keys, *values)}.values():
                heads = 1 if data.stride(2) == 0 else data.shape[2]  # one RoPE key for several blocks of a latent
                seen = min(visible.window or data.shape[1], data.shape[1])
                total += seen * heads * data.shape[3] * data.element_size()
            return function(queries, keys, values, visible, **options)

        return call

    cache = KVCache(model.config)
    model(ids[:, :-1], cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("decode_attention", "decode_attention_lse"):
            for module in (cllm.model.attention, cllm.model.joint, cllm.kernels.joint):
                if hasattr(module, name):
                    patch.setattr(module, name, counted(getattr(decode, name)))
        model(ids[:, -1:], cache=cache)
    return total


def flops_of_products(model: Decoder, ids: torch.Tensor, *, batched: bool) -> float:
    """FLOPs of projections and, with `batched`, of fusing by matrices; attention that is one operator has none."""
    with FlopCounterMode(display=False) as counter:
        model(ids)
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    names = ("aten.mm", "aten.addmm", *(("aten.bmm", "aten.baddbmm") if batched else ()))
    return sum(counts.get(name, 0) for name in names)


def flops_of_attention(config: ModelConfig, length: int) -> float:
    """FLOPs of the scores and weighted values that the masks show, layer by layer and query by query."""
    plan, total = config.plan(), 0.0
    for i in range(len(plan)):
        source = plan.source(i)
        for _, window in plan.attended(i):
            seen = sum(min(t + 1, window or length) for t in range(length))
            if isinstance(source, Latent):
                width = source.blocks * (source.qk_nope_head_dim + source.qk_rope_head_dim + source.v_head_dim)
            else:
                width = 2 * source.head_size(config.resolved_head_dim)
            total += 2 * config.n_heads * width * seen
    return total


@settings(PROPERTY, max_examples=int(GIVEN or 40))
@given(section=st.one_of(everything(), reshaped(formed())))
def test_costs_are_those_that_are_measured(section: dict[str, Any], random_model) -> None:
    try:
        config = validate(File, {"model": section}).model
    except UserError:
        return
    plan = config.plan()
    if any(plan.owned(j).is_state for j in plan.owners) or plan.cyclic_spans():
        return
    event("accepted")
    model = random_model(config).eval().requires_grad_(False)
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    assert kv_bytes(config, context=LENGTH, bytes_per_element=4).read * LENGTH == pytest.approx(bytes_read(model, ids))
    assert count_parameters(meta_decoder(config)) == len(torch.cat([p.flatten() for p in model.parameters()]))
    # Attention to latents and to several slots is computed by batched products too.
    apart = all(plan.source(i).is_plain and not plan.reads_at_once(i) for i in range(len(plan)))
    if apart or not any(plan.read_flops(i, config.resolved_head_dim) for i in range(len(plan))):
        event("accepted, FLOPs")
        expected = flops_of_products(model, ids, batched=apart) + flops_of_attention(config, LENGTH)
        assert forward_flops_per_token(model, LENGTH) * LENGTH == pytest.approx(expected)

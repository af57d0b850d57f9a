"""A load test of transformers' continuous batching in this process, for machines without vLLM."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import cllm
from benchmarks.serve_load import DTYPES, Load, Most, Result, Timing, export, make_result
from cllm.errors import UserError

PAGE = 32
"""Tokens of a page."""
PATIENCE = 300.0
"""Seconds without a token after which the test fails."""


def measure(design: str, sizes: dict[str, Any], load: Load, dtype: str, device: str, work: Path) -> Result:
    """Generate the answers of a load, at most `load.concurrency` at once.

    Raises:
        UserError: for a cache that is smaller than a request, if a request fails, or if nothing comes for `PATIENCE`
            seconds.
    """
    exported = export(design, sizes, work / design)
    model: Any = cllm.load(work / design, device=device).to(getattr(torch, dtype)).eval()
    plan, head_dim = model.model.plan, model.model.config.resolved_head_dim
    block = sum(2 * plan.owned(owner).kv_heads * head_dim * PAGE * DTYPES[dtype] for owner in plan.owners)
    blocks = load.cache_bytes // block
    if blocks * PAGE < load.context:
        raise UserError(
            f"{design}: a cache of {load.cache_bytes:,} bytes has room for {blocks * PAGE} tokens; allowed: for "
            f"{load.context}, those of a request, or more"
        )
    options: dict[str, Any] = {
        _page_option(): PAGE,
        "num_blocks": blocks,
        "max_batch_tokens": load.chunk,
        "max_requests_per_batch": load.concurrency,
        "allow_block_sharing": False,
    }
    batching = ContinuousBatchingConfig(**options)
    config = GenerationConfig(do_sample=False, max_new_tokens=load.new, eos_token_id=-1)
    vocabulary = exported[0].vocab_size or 0
    evicted, offload = [0], OffloadingManager.offload_requests

    def counting(self: OffloadingManager) -> bool:
        before = len(self.scheduler.active_requests)
        done = offload(self)
        evicted[0] += before - len(self.scheduler.active_requests)
        return done

    manager = model.init_continuous_batching(config, batching)
    with patch.object(OffloadingManager, "offload_requests", counting), torch.inference_mode():
        manager.start()
        try:
            manager.add_request([1] * load.prompt, max_new_tokens=2)  # warm up
            _next(manager)
            if device == "cuda":
                _send(manager, replace(load, requests=load.concurrency, new=min(16, load.new)), vocabulary)
                evicted[0] = 0
            start = time.monotonic()
            timings, most = _send(manager, load, vocabulary)
            seconds = time.monotonic() - start
            cached = manager.batch_processor.cache.num_blocks * PAGE
        finally:
            manager.stop(block=True)
    return make_result(
        design, exported, load, timings, seconds, dtype, cached=cached, most=most, preemptions=evicted[0]
    )


def _page_option() -> str:
    """The option for the tokens of a page, which transformers 5.17 names otherwise than later versions."""
    names = {field.name for field in fields(ContinuousBatchingConfig)}
    return "page_size" if "page_size" in names else "block_size"


def _send(manager: Any, load: Load, vocabulary: int) -> tuple[list[Timing], Most]:
    """The times of the tokens of each request. A new one is sent when one is answered."""
    prompts = list(enumerate(load.prompts(vocabulary)))[::-1]
    started: dict[str, float] = {}
    times: dict[str, list[float]] = {}
    most, under_way = Most(), 0
    while prompts or under_way:
        while prompts and under_way < load.concurrency:
            number, prompt = prompts.pop()
            name = f"{number:06d}"
            started[name], times[name] = time.monotonic(), []
            manager.add_request(prompt, request_id=name, max_new_tokens=load.new, streaming=True)
            under_way += 1
        output = _next(manager)
        now = time.monotonic() - started[output.request_id]
        come = times[output.request_id]
        come += [now] * (len(output.generated_tokens) - len(come))
        under_way -= output.is_finished()
        active = list(manager.batch_processor.scheduler.active_requests.values())
        most.add(len(active), sum(state.current_len() for state in active))
    return [Timing(times[name]) for name in sorted(times)], most


def _next(manager: Any) -> Any:
    """The next tokens of a request."""
    output = manager.get_result(timeout=PATIENCE)
    if output is None:
        raise UserError(f"continuous batching: no token came for {PATIENCE:.0f} seconds, or it has failed")
    if output.error is not None:
        raise UserError(f"continuous batching: a request failed: {output.error}")
    return output

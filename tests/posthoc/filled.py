"""A cache as a post-hoc method finds it before it compresses it."""

from __future__ import annotations

from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse


def fill(model, ids, spec, calibration, **padding):
    """The engine, a filled cache and the method, calibrated and having watched."""
    engine, method = engine_of(model), parse(spec)
    method.prepare(engine, calibration)
    cache = engine.new_cache()
    with method.watch(engine):
        if padding:
            model.hidden(ids, cache=cache, **padding)
        else:
            engine.hidden(ids, cache)
    return engine, cache, method

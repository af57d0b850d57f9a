"""A plug-in of vLLM: decoders of this package, with one cache entry for each owner of the KV plan.

layout.py      the cache entries of a plan, which layer reads which, and the plans that vLLM cannot serve
attention.py   vLLM's attention layers of those entries and reads
model.py       the decoder, made of vLLM's layers

Imports hub and everything below it. Only attention.py and model.py need vLLM.
"""

from __future__ import annotations

ARCHITECTURE = "CLLMForCausalLM"
"""The name under `architectures` in config.json of exported folders."""


def register() -> None:
    """Make vLLM know the model; it calls this in each of its processes (entry point group `vllm.general_plugins`).

    Its engine and workers end with its server from then on. By themselves they stay when the server is killed, and keep
    their memory.
    """
    from vllm import ModelRegistry

    import cllm.hub.config  # noqa: F401 - transformers' AutoConfig knows the model_type
    from cllm.processes import end_with_parent

    end_with_parent()

    ModelRegistry.register_model(ARCHITECTURE, "cllm.serve.vllm.model:ServedDecoder")

"""A run in numbers before its first step: sizes, costs and settings."""

from __future__ import annotations

from typing import Any

from cllm.cache.accounting import kv_bytes, mha_twin
from cllm.config import Config
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters, training_flops_per_token
from cllm.train.measure import RunFacts


def summarise(config: Config, model: Decoder) -> dict[str, Any]:
    """The content of summary.json: numbers that comparisons of runs need besides metrics, see `cllm/runs/folder.py`."""
    own, twin = kv_bytes(config.model), kv_bytes(mha_twin(config.model))
    resident, read = own.relative_to(twin)
    return {
        "name": config.name,
        "design": config.model.design,
        "parameters": count_parameters(model),
        "parameters_without_embeddings": count_parameters(model, embeddings=False),
        "vocab_size": config.model.vocab_size,
        "context": config.model.max_seq_len,
        "kv_bytes_per_token": {"resident": own.resident, "written": own.written, "read": own.read},
        "kv_vs_mha": {"resident": resident, "read": read},
        "training_flops_per_token": training_flops_per_token(model, config.data.seq_len),
        "steps": config.train.steps,
        "tokens_per_step": config.train.global_batch * config.data.seq_len,
    }


def hyperparameters(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """The flat table of hyperparameters for loggers, such as TensorBoard's HPARAMS tab."""
    flat = {"design": summary["design"], "parameters": summary["parameters"]}
    flat |= {"kv_resident_vs_mha": summary["kv_vs_mha"]["resident"], "kv_read_vs_mha": summary["kv_vs_mha"]["read"]}
    for section in ("init", "uptrain", "model", "data", "optim", "train"):
        for key, value in config.as_yaml_data()[section].items():
            if isinstance(value, int | float | str | bool):
                flat[f"{section}.{key}"] = value
    return flat


def run_facts(config: Config, start_step: int, summary: dict[str, Any], bytes_per_token: dict[str, float]) -> RunFacts:
    """The constants of a run's metrics, from its `summarise` and the bytes a token of its validation sets."""
    train = config.train
    return RunFacts(
        start_step=start_step,
        steps=train.steps,
        log_every=train.log_every,
        tokens_per_step=summary["tokens_per_step"],
        flops_per_token=summary["training_flops_per_token"],
        kv_bytes_per_token=summary["kv_bytes_per_token"]["resident"],
        bytes_per_token=bytes_per_token,
        hyperparameters=hyperparameters(config, summary),
        max_skipped_steps=train.max_skipped_steps,
    )

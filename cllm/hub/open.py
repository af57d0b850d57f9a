"""The config and the weights of the model in any path: a run, a checkpoint, an exported folder, or a foreign one.

transformers, which takes seconds to import, is imported only for Hugging Face folders.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.hub.kind import Kind, identify_model
from cllm.runs import RunFolder, load_run
from cllm.trust import check_model_folder, read_object


def open_config(path: str | Path, *, label: str = "") -> ModelConfig:
    """The config of the model in `path`; no weights are read. `label` precedes the path in messages.

    Raises:
        UserError: if `path` holds no model, or one that the decoder cannot compute.
    """
    path = Path(path)
    kind = identify_model(path, label=label)
    if kind.is_run:
        return RunFolder.of(path).config().model
    if kind is Kind.FOREIGN:
        from cllm.hub.families import read_family

        return read_family(path).config
    from cllm.hub.config import CLLMConfig

    check_model_folder(path)
    try:
        return CLLMConfig.from_dict(read_object(path / "config.json")).model_config
    except UserError as error:
        raise UserError(f"{label}{path}: {error}") from None


def open_weights(path: str | Path, *, label: str = "") -> dict[str, Tensor]:
    """The state dict of the decoder in `path`, in fp32 on the CPU.

    Raises:
        UserError: as `open_config` does, and for weights that are missing, damaged or not the model's.
    """
    path = Path(path)
    kind = identify_model(path, label=label)
    if kind.is_run:
        return load_run(path)[0].state_dict()
    if kind is Kind.FOREIGN:
        from cllm.hub.families import load_family

        return load_family(path, torch.float32)[1]
    from cllm.hub.loading import load_exported

    try:
        return load_exported(path, dtype=torch.float32).model.state_dict()
    except UserError as error:
        raise UserError(f"{label}{path}: its weights cannot be read: {error}") from None

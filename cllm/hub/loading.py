"""Models in checkpoint folders: loaded with transformers, without code, with every tensor accounted for.

transformers draws missing weights at random and only warns. Here missing weights are an error.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from cllm.errors import UserError
from cllm.files import shorten
from cllm.hub.checksums import check_checksums
from cllm.hub.export import quiet
from cllm.hub.kind import is_export
from cllm.model.misfit import describe
from cllm.trust import check_model_folder, read_object, reason

if TYPE_CHECKING:
    from cllm.hub.model import CLLMForCausalLM

log = logging.getLogger(__name__)

_SIZES = (
    ("vocab_size", "hidden_size"),
    ("intermediate_size", "hidden_size"),
    ("num_attention_heads", "head_dim", "hidden_size"),
)
"""Keys of config.json whose product is the number of elements of a tensor."""
_MOST_PER_BYTE = 16
"""Most elements per byte of weights; no quantisation has more."""


def load_model(folder: Path, *, dtype: torch.dtype | str) -> Any:
    """The causal language model in any Hugging Face folder, on the CPU, in evaluation mode.

    Args:
        folder: with config.json and safetensors.
        dtype: of the weights; `auto`: as stored.

    Raises:
        UserError: as `check_model_folder` and `check_checksums` do, for a model that transformers cannot load, and for
            weights that are missing or of another shape.
    """
    config = _checked(folder)
    options = {} if is_export(config) else {"ignore_mismatched_sizes": True}
    model, info = _from_pretrained(AutoModelForCausalLM, folder, dtype=dtype, output_loading_info=True, **options)
    _check_loaded(folder, info)
    return model.eval()


def load_exported(folder: Path, *, dtype: torch.dtype | str) -> CLLMForCausalLM:
    """The model in a folder that cllm wrote (`convert.py export` or `import`), on the CPU, in evaluation mode.

    Raises:
        UserError: as `load_model` does, and for a checkpoint of another family.
    """
    from cllm.hub.model import CLLMForCausalLM

    config = _checked(folder)
    if not is_export(config):
        raise UserError(f"{folder}: is a {shorten(str(config.get('model_type')))} checkpoint already")
    return _from_pretrained(CLLMForCausalLM, folder, dtype=dtype).eval()


def _checked(folder: Path) -> dict[str, Any]:
    check_model_folder(folder)
    config = read_object(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: cannot be loaded: no file named model.safetensors (the folder has no .safetensors weights; "
            "other formats are not read)"
        )
    _check_sizes(folder, config)
    check_checksums(folder)
    return config


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that the weight files cannot hold, before a model of that size is built."""
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for keys in _SIZES:
        values = [config.get(key) for key in keys]
        product = 1
        for value in values:
            product *= value if isinstance(value, int) and value > 0 else 1
        if product > _MOST_PER_BYTE * nbytes:
            sizes = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True) if value is not None)
            raise UserError(
                f"{folder / 'config.json'}: {sizes}: the weight files are too small for it ({nbytes} bytes)"
            )


def _from_pretrained(auto: Any, folder: Path, **options: Any) -> Any:
    # A foreign checkpoint can fail in any way; the user gets one line.
    from cllm.hub.base import without_load_report

    try:
        with quiet(), without_load_report():
            return auto.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, **options
            )
    except UserError as error:
        raise error if str(folder) in str(error) else UserError(f"{folder}: {error}") from None
    except Exception as error:
        raise UserError(f"{folder}: cannot be loaded: {reason(error)}") from None


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    fault = describe(
        missing=info["missing_keys"],
        reshaped=(f"{name} is {list(a)}, not {list(b)}" for name, a, b in info["mismatched_keys"]),
    )
    unknown = describe(unknown=info["unexpected_keys"])
    if fault:
        faults = fault if unknown is None else f"{fault}; {unknown}"
        raise UserError(f"{folder}: the weights are not those of the model in config.json: {faults}")
    if unknown:
        log.warning("%s: tensors are left out: %s", folder, unknown)

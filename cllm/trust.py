"""Safe reading of other people's folders: no code is run, and nothing outside of the folder is read.

Hugging Face folders can ask a program to run Python files in them (`auto_map` in config.json or tokenizer_config.json),
can name weight files outside of the folder, and can be adapters of another model. All of cllm opens such folders
through this module. It checks the files before transformers reads them, calls transformers with
`trust_remote_code=False`, and refuses with one line that names the file and the key.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.errors import UserError
from cllm.files import inside, shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

MESSAGE = 400
"""Characters that are quoted of another program's error, at most."""
_MAX_LAYERS = 10_000
_MAX_DIGITS = 300
"""Of whole numbers in JSON: larger ones overflow a float."""
_CODE = "auto_map"
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys of config.json that may name compiled code on the Hub, as `owner/kernel`."""


def parse_json(text: str) -> Any:
    """The content of a JSON text. Raises `ValueError` for a text that is not JSON or has a number that no float has."""
    return json.loads(text, parse_int=_whole_number)


def _whole_number(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; allowed: {_MAX_DIGITS}")
    return int(digits)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: naming the file, if it cannot be read or is not a JSON object.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read: {shorten(str(error), MESSAGE)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}; allowed: a JSON object")
    return content


def check_model_folder(folder: Path) -> None:
    """Refuse a checkpoint folder that needs its own code, or whose files name paths outside of it.

    If transformers knows the model, its code is not needed: it is ignored with a warning.

    Raises:
        UserError: naming the file and the key.
    """
    file = folder / "config.json"
    config = read_object(file)
    _check_code(file, config)
    for values in _objects(config):
        for key in _KERNELS:
            if isinstance(values.get(key), str) and "/" in values[key]:
                raise UserError(f"{file}: {key} is {shorten(values[key])!r}, code from the Hub; cllm does not run it")
        for key in _LAYERS:
            if isinstance(values.get(key), int | float) and not 0 < values[key] <= _MAX_LAYERS:
                raise UserError(f"{file}: {key} is {shorten(str(values[key]))}; allowed: 1 to {_MAX_LAYERS}")
    if (named := config.get("transformers_weights")) is not None:
        inside(folder, named, written_in=f"{file}: transformers_weights")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder / 'adapter_config.json'}: the folder holds an adapter; merge it into the model first "
            "(`merge_and_unload` in PEFT) and save that"
        )
    for index in sorted(folder.glob("*.index.json")):
        weight_map(index)


def _check_code(file: Path, config: dict[str, Any]) -> None:
    named = config.get(_CODE)
    if not named:
        return
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    what = f"{file}: {_CODE} names Python code ({shorten(json.dumps(named))})"
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{what}, without which transformers does not know the model_type {shorten(repr(model_type))}; cllm never "
            "runs code from a folder"
        )
    log.warning("%s; it is not run: transformers' own %s is used", what, model_type)


def _objects(value: Any) -> list[dict[str, Any]]:
    """Every object in JSON content, the outermost first."""
    found: list[dict[str, Any]] = []
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            found.append(value)
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found


def weight_map(index: Path) -> dict[str, str]:
    """Tensor to file name, from an index of shards such as `model.safetensors.index.json`.

    Raises:
        UserError: for an index that cannot be read, and for names that are not files of the same folder.
    """
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map is {shorten(json.dumps(names))}; allowed: an object, tensor to file")
    for name in sorted(set(map(_text, names.values()))):
        if "/" in name:
            raise UserError(
                f"{index}: weight_map names {shorten(repr(name))}; allowed: names of files in {index.parent}"
            )
        inside(index.parent, name, written_in=f"{index}: weight_map")
    return names


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, or by name from the Hugging Face Hub, without running its code.

    For a folder only local files are read.

    Raises:
        UserError: for a tokenizer that needs its own code or cannot be loaded.
    """
    folder = Path(source)
    is_folder = folder.is_dir()
    if is_folder:
        _check_tokenizer_folder(folder)
    from transformers import AutoTokenizer

    # Exceptions of many types can occur here; all are reported in one line.
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=is_folder)
    except Exception as error:
        raise UserError(f"{source}: its tokenizer cannot be loaded: {reason(error)}") from None
    if named := tokenizer.init_kwargs.get(_CODE):
        raise UserError(_tokenizer_code(f"{source}: tokenizer_config.json", named))
    return tokenizer


def _check_tokenizer_folder(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = read_object(file) if file.exists() else {}
    if config.get(_CODE):
        raise UserError(_tokenizer_code(str(file), config[_CODE]))
    for name in _listed(config.get("fast_tokenizer_files")):
        inside(folder, name, written_in=f"{file}: fast_tokenizer_files")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tokenizer_code(where: str, named: Any) -> str:
    return (
        f"{where}: {_CODE} names Python code ({shorten(json.dumps(named))}); cllm never runs code from a folder; if "
        "tokenizer.json says all that the code does, save the folder without that key"
    )


def reason(error: Exception) -> str:
    """Describe another program's exception in at most `MESSAGE` characters, without line breaks."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return f"it needs Python code of its own ({_CODE} in its config files); cllm never runs code from a folder"
    return shorten(f"{type(error).__name__}: {text}", MESSAGE)

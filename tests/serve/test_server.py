"""vLLM's server with an exported folder: answers, faults, and a server that is killed. Needs CLLM_VLLM=1."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif("CLLM_VLLM" not in os.environ, reason="needs CLLM_VLLM=1 and vLLM")
ROOT = Path(__file__).resolve().parents[2]


class Server:
    """A process of `cllm serve`, and its address."""

    def __init__(self, folder: Path, log: Path, *options: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        words = ["--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--block-size", "32",
                 "--max-model-len", "256", "--kv-cache-memory-bytes", str(2**23), "--skip-tokenizer-init",
                 "--served-model-name", "model", *options]  # fmt: skip
        environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self.words = [sys.executable, "-m", "cllm", "serve", str(folder), *words]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                self.words, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        self.environment = environment
        end = time.monotonic() + 400
        while time.monotonic() < end:
            assert self.process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise AssertionError("not ready")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return answer.read().decode()

    def post(self, body: bytes) -> Any:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(asked, timeout=120)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        with self.post(request(prompt, n)) as answer:
            return json.load(answer)["choices"][0]["token_ids"]

    def kill(self) -> None:
        """End the server and its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


def request(prompt: Any, n: int, **more: Any) -> bytes:
    body = {"model": "model", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    return json.dumps({**body, "return_token_ids": True, "detokenize": False, **more}).encode()


@pytest.fixture(scope="module")
def exported(export_tiny) -> Any:
    return export_tiny({"preset": "fusedkv"})


@pytest.fixture(scope="module")
def server(exported, tmp_path_factory) -> Iterator[Server]:
    started = Server(exported.folder, tmp_path_factory.mktemp("server") / "log", "--num-gpu-blocks-override", "10")
    yield started
    started.kill()


def test_faults_are_answered_and_the_server_goes_on(server, exported, prompts) -> None:
    expected = exported.greedy(prompts, 40)
    for body, status in [
        (b"{", 400),
        (b"[]", 400),
        (request(prompts[0], 4, temperature="hot"), 400),
        (request(prompts[0], -4), 400),
        (request([[1, 2], "text"], 4), 400),
        (request([1] * 400, 4), 400),
        (request([1] * 250, 40), 400),
        (request(prompts[0], 4, model="other"), 404),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post(body)
        assert refused.value.code == status, body
        assert json.loads(refused.value.read())["error"]["message"]
    with ThreadPoolExecutor(len(prompts)) as pool:  # the cache holds few of them, so some are preempted
        assert list(pool.map(lambda prompt: server.tokens(prompt, 40), prompts)) == expected


def test_a_second_server_on_its_port_is_refused_in_one_line(server) -> None:
    done = subprocess.run(server.words, env=server.environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: port {server.port} of 127.0.0.1: cannot be used")


def test_the_stream_of_a_killed_server_ends(server, prompts) -> None:
    """Last in this file: it ends the server."""
    answer = server.post(request(prompts[1], 200, stream=True))
    assert answer.readline().startswith(b"data: ")
    server.kill()
    with contextlib.suppress(ConnectionError, http.client.IncompleteRead):
        while answer.readline():
            pass

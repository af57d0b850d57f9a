"""The commands of docs/serving.md, from a run to `curl`, and the faults of a server. Needs CLLM_VLLM=1.

The commands make one server with a small cache; the tests that follow use it, and the last one ends it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shlex
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
import torch

from cllm.config import Config
from cllm.hub.model import CLLMForCausalLM
from cllm.runs import RunFolder

pytestmark = pytest.mark.skipif("CLLM_VLLM" not in os.environ, reason="needs CLLM_VLLM=1 and vLLM")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
SMALL = ["--max-model-len", "256", "--num-gpu-blocks-override", "10", "--kv-cache-memory-bytes", str(2**23)]
"""Options of the server besides the page's: room for 320 tokens, so that requests are preempted."""


def page_commands() -> list[list[str]]:
    """The words of the commands in the page's first block."""
    block = re.search(r"```bash\n(.*?)```", (ROOT / "docs/serving.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True) for line in block[1].splitlines()]


class Server:
    """A process of `cllm serve`, and its address."""

    def __init__(self, words: list[str], folder: Path, log: Path):
        self.words, self.folder = words, folder
        self.port = int(words[words.index("--port") + 1])
        self.environment = {**os.environ, **ENVIRONMENT}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                words, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        end = time.monotonic() + 400
        while time.monotonic() < end:
            assert self.process.poll() is None, log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                self.get("/health")
                return
            time.sleep(0.5)
        raise AssertionError("not ready")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=300) as answer:
            return answer.read().decode()

    def post(self, body: bytes) -> Any:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(asked, timeout=300)

    def complete(self, prompt: Any, n: int) -> dict[str, Any]:
        with self.post(request(prompt, n)) as answer:
            return json.load(answer)["choices"][0]

    def kill(self) -> None:
        """End the server and its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(300)


def request(prompt: Any, n: int, **more: Any) -> bytes:
    body = {"model": "served/fusedkv", "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True}
    return json.dumps({**body, "return_token_ids": True, **more}).encode()


@pytest.fixture(scope="module")
def project(tmp_path_factory, random_model) -> Path:
    """A folder with a run of random weights, runs/fusedkv, and the tokenizer of a few sentences."""
    from cllm.data.prepare.build import prepare
    from cllm.data.prepare.recipe import Recipe

    folder = tmp_path_factory.mktemp("project")
    (folder / "notes.md").write_text("\n\n".join(f"def main({n}): number {n} is naïve and {n * n}" for n in range(80)))
    source = {"kind": "files", "paths": [str(folder / "notes.md")]}
    recipe = {"name": "small", "out": str(folder / "small"), "source": source, "workers": 1,
              "tokenizer": {"train": {"vocab_size": 300}}, "validation": {"paths": source["paths"]}}  # fmt: skip
    data = prepare(Recipe.model_validate(recipe)).folder
    sizes = {"vocab_size": 320, "d_model": 64, "n_layers": 4, "n_heads": 2, "head_dim": 32, "d_ff": 96}
    config = Config.model_validate(
        {
            "name": "fusedkv",
            "runs_dir": str(folder / "runs"),
            "model": {**sizes, "max_seq_len": 256, "kv": {"preset": "fusedkv"}},
            "data": {"path": str(data), "seq_len": 64},
        }
    )
    run = RunFolder(folder / "runs" / "fusedkv")
    run.write_config(config)
    run.checkpoint_folder.mkdir()
    state = random_model(config.model).state_dict()
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, run.checkpoint_path(10))
    return folder


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[Server]:
    """The server that the page's commands make of the run."""
    install, export, serve, _ = page_commands()
    check = re.search(r"<<'END'\n(.*?)^END", (ROOT / install[0]).read_text(), re.DOTALL | re.MULTILINE)
    assert check is not None
    environment = {**os.environ, **ENVIRONMENT}
    subprocess.run([sys.executable, "-c", check[1]], check=True, env=environment, cwd=project)
    assert export[0] == serve[0] == "cllm"
    cllm = [sys.executable, "-m", "cllm"]
    subprocess.run([*cllm, *export[1:]], check=True, env=environment, cwd=project)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = Server([*cllm, *[port if word == "8000" else word for word in serve[1:]], *SMALL], project,
                     project / "log")  # fmt: skip
    yield started
    started.kill()


@pytest.fixture(scope="module")
def reference(server: Server) -> tuple[CLLMForCausalLM, Any]:
    """The model and the tokenizer of the exported folder in transformers."""
    from transformers import AutoTokenizer

    folder = server.folder / "served/fusedkv"
    return CLLMForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def greedy(reference: tuple[CLLMForCausalLM, Any], text: str, n: int, eos: int | None = None) -> list[int]:
    """The tokens with which transformers continues a text."""
    model, tokenizer = reference
    ids = torch.tensor([tokenizer(text).input_ids])
    made = model.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=0)
    return made[0, ids.shape[1] :].tolist()


def test_curl_gets_the_text_that_transformers_generates(server, reference) -> None:
    words = page_commands()[-1]
    asked = json.loads(words[words.index("-d") + 1])
    exact = json.dumps({**asked, "temperature": 0, "return_token_ids": True})
    words = [exact if word.startswith("{") else word for word in words]
    words = [word.replace(":8000/", f":{server.port}/") for word in words]
    done = subprocess.run(words, capture_output=True, check=True, timeout=300)
    expected = greedy(reference, asked["prompt"], asked["max_tokens"], eos=0)
    answer = json.loads(done.stdout)["choices"][0]
    assert answer["token_ids"] == expected
    text = reference[1].decode(expected, skip_special_tokens=True)
    assert answer["text"] == text.rstrip("\ufffd"), "vLLM keeps the bytes of a character that has not ended"


def test_a_folder_is_compared_with_transformers(server) -> None:
    words = [sys.executable, "-m", "benchmarks.serve_parity", "served/fusedkv", "--new", "16", "--cache-mib", "8"]
    done = subprocess.run(words, env=server.environment, cwd=server.folder, capture_output=True, text=True, timeout=300)
    rows = done.stdout.splitlines()[2:-1]
    assert done.returncode == 0, done.stderr[-1000:]
    assert len(rows) == 7
    assert all("| yes | 16 | 16 |" in row for row in rows)


def test_faults_are_answered(server, reference) -> None:
    long = [1] * 257
    for body, status in [
        (b"{", 400),
        (b"[]", 400),
        (b"\xff\xfe", 400),
        (request("a", 4, temperature="hot"), 400),
        (request("a", -4), 400),
        (request("a", 300), 400),
        (request("", 4), 400),
        (request([], 4), 400),
        (request([[1, 2], "text"], 4), 400),
        (request([320], 4), 400),
        (request([-1], 4), 400),
        (request(long, 4), 400),
        (request("a", 4, stop_token_ids=[1000]), 400),
        (request("a", 4, model="other"), 404),
    ]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            server.post(body)
        assert refused.value.code == status, body
        assert json.loads(refused.value.read())["error"]["message"]
    assert len(server.complete(long[:250], 40)["token_ids"]) == 6, "as many as fit into the context"


def test_no_request_gets_the_text_of_another_under_preemption(server, reference) -> None:
    """Every prompt repeats a word that no other has; the cache holds few requests, so that some are evicted."""
    canaries = [f"q{letter}{letter.upper()}z" for letter in "abcdefgh"]
    prompts = [f"def main({n}): " + f"{word} " * 12 for n, word in enumerate(canaries)]
    expected = [greedy(reference, prompt, 60) for prompt in prompts]
    for _ in range(2):  # the second time with parts of the prompts in the prefix cache
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: server.complete(prompt, 60), prompts))
        assert [answer["token_ids"] for answer in answers] == expected
        for n, answer in enumerate(answers):
            assert not [word for m, word in enumerate(canaries) if m != n and word in answer["text"]]
    counted = re.search(r"^vllm:num_preemptions_total{.*} ([0-9.]+)$", server.get("/metrics"), re.MULTILINE)
    assert counted is not None
    assert float(counted[1]) > 0


def test_a_second_server_on_its_port_is_refused_in_one_line(server) -> None:
    done = subprocess.run(server.words, env=server.environment, cwd=server.folder, capture_output=True, text=True,
                          timeout=300)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: port {server.port} of 127.0.0.1: cannot be used")
    server.get("/health")


def streamed(answer: Any) -> Iterator[str]:
    """The events of a stream, up to its end or that of its connection."""
    with contextlib.suppress(ConnectionError, http.client.IncompleteRead):
        for line in answer:
            if line.strip():
                yield line.decode().removeprefix("data: ").strip()


def test_a_terminated_server_completes_its_streams(server, reference) -> None:
    """Ends the server, and starts it once more for the last test."""
    psutil = pytest.importorskip("psutil")
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert processes
    events = streamed(server.post(request("def main", 200, stream=True)))
    first = json.loads(next(events))
    server.process.terminate()
    *others, last = events
    tokens = [t for event in (first, *map(json.loads, others)) for t in event["choices"][0]["token_ids"] or []]
    assert last == "[DONE]"
    assert tokens == greedy(reference, "def main", 200)
    assert server.process.wait(300) == 0
    _, alive = psutil.wait_procs(processes, timeout=300)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def again(server: Server, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A second server in place of the first, whose port it has."""
    server.kill()
    started = Server(server.words, server.folder, server.folder / f"{request.node.name}.log")
    yield started
    started.kill()


def test_the_stream_of_a_killed_server_ends(again) -> None:
    events = streamed(again.post(request("def main", 240, stream=True)))
    json.loads(next(events))
    again.kill()
    assert "[DONE]" not in list(events)


def test_the_engine_ends_when_only_the_server_was_killed(again) -> None:
    psutil = pytest.importorskip("psutil")
    children = psutil.Process(again.process.pid).children(recursive=True)
    assert any("EngineCore" in " ".join(child.cmdline()) for child in children)
    again.process.kill()
    again.process.wait(300)
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

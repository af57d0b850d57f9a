"""`transformers serve`, with and without continuous batching. Needs `transformers[serving]`; skipped without it."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import cllm  # noqa: F401 - makes the server know the class

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("accelerate")
NEW = 6
SECONDS = 300
"""The longest wait for a server or an answer."""
PROMPT = "w3 w14 w15 w9 w2 w6"
PLANS: dict[str, dict[str, Any]] = {
    "fusedkv": {"preset": "fusedkv"},
    "fusedkv_complex": {"preset": "fusedkv", "keys": "complex", "values": "matrix"},
    "kv_tie": {"preset": "kv_tie"},
    "swiftkv": {"preset": "swiftkv"},
    "yoco_pp": {"preset": "yoco_pp", "window": 24},
    "yoco_u": {"preset": "yoco_u", "window": 24},
    "ced": {"preset": "ced"},
    "hysparse": {"preset": "hysparse", "n_gated": 3},
    "lckv": {"preset": "lckv"},
    "mlra": {"preset": "mlra"},
    "retention": {"preset": "yoco", "lower": "retention"},
}
REFUSED = {
    "ced": "layer 4 is computed by JointAttention",
    "hysparse": "layer 1 is computed by GatedAttention",
    "lckv": "read from above",
    "mlra": "layer 0 stores a latent",
    "retention": "layer 0 stores a recurrent state",
}
"""Plans that continuous batching refuses, and a part of the reason."""


@pytest.fixture(scope="module")
def folders(export_tiny) -> dict[str, Any]:
    """Exported models with a tokenizer of 512 words."""
    made = {name: export_tiny(kv, n_heads=4) for name, kv in PLANS.items()}
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(512)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    for exported in made.values():
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(exported.folder)
    return made


@pytest.fixture
def serve(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Callable[..., tuple[int, Any]]]]:
    """`ask = serve(batching)`, then `ask(folder, prompt)`: status and answer of a server on 127.0.0.1."""
    from transformers.cli.serve import Serve

    started: list[Any] = []

    def start(batching: bool, port: int = 0) -> Callable[..., tuple[int, Any]]:
        """At port 0 the server takes a free one."""
        options = {"cb_num_blocks": 32, "cb_max_batch_tokens": 64} if batching else {}
        server: Any = Serve(continuous_batching=batching, host="127.0.0.1", port=port, non_blocking=True, device="cpu",
                            **options)  # fmt: skip
        started.append(server)
        deadline = time.monotonic() + SECONDS
        while not server.server.started:
            ended = not server._thread.is_alive()
            if ended or time.monotonic() > deadline:
                log = "".join(capfd.readouterr())
                raise AssertionError(f"the server {'has ended' if ended else 'is not ready'}: {log[-2000:]}")
            time.sleep(0.1)
        port = server.server.servers[0].sockets[0].getsockname()[1]

        def ask(folder: Path, prompt: str, **more: Any) -> tuple[int, Any]:
            body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, json.loads(error.read())

        return ask

    yield start
    for server in started:
        server.kill_server()


def test_a_server_that_cannot_start_is_reported_with_its_log(serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AssertionError, match=r"(?s)the server has ended: .*address already in use"):
            serve(batching=False, port=port)


@pytest.mark.parametrize("batching", [True, False])
def test_a_server_gives_the_text_of_generate_or_the_reason(batching: bool, folders, serve) -> None:
    ask = serve(batching)
    for name, exported in folders.items():
        status, answer = ask(exported.folder, PROMPT)
        if batching and name in REFUSED:
            assert status == 400, name
            assert REFUSED[name] in answer["error"]["message"]
            continue
        assert status == 200, answer
        prompt = [int(word[1:]) for word in PROMPT.split()]
        (expected,) = exported.greedy([prompt], NEW)
        assert answer["choices"][0]["text"].split() == [f"w{token}" for token in expected], name


@pytest.mark.parametrize("batching", [True, False])
def test_a_prompt_that_is_too_long_is_answered_with_the_reason(batching: bool, folders, serve) -> None:
    ask = serve(batching)
    folder = folders["fusedkv"].folder
    status, answer = ask(folder, "w1 " * 300)
    assert status == 400
    assert "context (model.max_seq_len)" in answer["error"]["message"]
    assert ask(folder, PROMPT)[0] == 200, "the server goes on"

"""`cllm serve`: what is refused before vLLM starts, and vLLM's command line."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cllm.commands.serve import main
from cllm.hub.checksums import write_checksums
from cllm.serve import launch


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, Any]]:
    """`serve("folder", "--port", "80")`: the exit status, what is printed, and the process that would start."""
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, words: started.append(words))
    monkeypatch.setattr(launch, "_check_installed", lambda: None)

    def run(*words: object) -> tuple[int, str, Any]:
        status = main([str(word) for word in words])
        printed = capsys.readouterr()
        return status, printed.out + printed.err, started[-1] if started else None

    return run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_folder_is_checked_and_vllm_gets_all_other_options(serve, export_tiny) -> None:
    folder, port = export_tiny({"preset": "fusedkv"}, n_layers=4).folder, free_port()
    words = ["--host", "127.0.0.1", "--port", str(port), "--skip-tokenizer-init", "--kv-cache-memory-bytes", "99"]
    _, _, started = serve(folder, *words)
    assert started[:3] == [sys.executable, "-m", launch.SERVER]
    assert started[3:7] == ["--model", str(folder), "--enforce-eager", "--shutdown-timeout=30"]
    assert started[7:] == words
    words += ["--no-enforce-eager", "--shutdown-timeout", "5"]
    _, _, started = serve(folder, *words)
    assert started[3:] == ["--model", str(folder), *words]
    status, printed, _ = serve(folder, "--check")
    assert status == 0
    assert "2 entries, 512 numbers" not in printed, "4 heads, not 2"
    assert "1 entries, 512 numbers a token" in printed, "owners 0 and 1, 4 heads of 32, keys and values"
    assert "keys and values of 0, 1: 4 heads of 64" in printed


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ([], ["--enforce-eager", "--shutdown-timeout=30", "--kv-cache-memory-bytes=2147483648"]),
        (["-tp", "2"], ["--enforce-eager", "--shutdown-timeout=30", "--kv-cache-memory-bytes=1073741824"]),
        (["--gpu_memory_utilization=0.5"], ["--enforce-eager", "--shutdown-timeout=30"]),
        (["--config", "vllm.yaml"], ["--shutdown-timeout=30"]),
    ],
)
def test_without_a_gpu_the_cache_takes_what_is_there(options, ours, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory. What the options or their file set is not set again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_memory", lambda: [2**34, 2**32])
    (tmp_path / "vllm.yaml").write_text("enforce-eager: false\nkv-cache-memory-bytes: 1000\n")
    command = launch.server_command(Path("served"), options, cuda=False)
    assert command[3:] == ["--model", "served", *ours, *options]
    monkeypatch.setattr(launch, "_memory", lambda: [])
    assert "--kv-cache-memory-bytes=4294967296" in launch.server_command(Path("served"), [], cuda=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for cuda in (True, False):
        assert "--kv-cache" not in " ".join(launch.server_command(Path("served"), [], cuda=cuda))


def test_the_memory_is_that_of_the_machine_and_of_the_control_group(tmp_path) -> None:
    meminfo, group = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       24653184 kB\nMemAvailable:   12582912 kB\n")
    assert launch._memory(meminfo, group) == [12 * 2**30]
    group.write_text("max\n")
    assert launch._memory(meminfo, group) == [12 * 2**30]
    group.write_text("2147483648\n")
    assert launch._memory(meminfo, group) == [12 * 2**30, 2**31]
    assert launch._memory(tmp_path / "none", tmp_path / "none") == []


def test_mistakes_are_one_line(serve, export_tiny, tmp_path: Path) -> None:
    exported = export_tiny({"preset": "cla"}, n_layers=4)
    folder = exported.folder
    cyclic = export_tiny({"preset": "pizza_top"}, n_layers=4).folder
    wide = export_tiny({"preset": "fusedkv"}, n_layers=4, head_dim=20).folder
    gated = export_tiny({"preset": "cla"}, n_layers=4, mlp_activation="gelu_tanh").folder
    copies = tuple(tmp_path / name for name in ("llama", "later", "damaged", "written"))
    foreign, later, damaged, written = copies
    for copy in copies:
        copy.mkdir()
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (later / "config.json").write_text(json.dumps({**config, "model": {**config["model"], "n_experts": 8}}))
    (written / "tokenizer.json").write_text("{}")
    write_checksums(damaged)
    with (damaged / "model.safetensors").open("ab") as file:
        file.write(b"more")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        address: list[object] = ["--host", "127.0.0.1", "--port", port]
        cases: list[tuple[list[object], str]] = [
            (["nosuch"], "nosuch: no such run"),
            ([tmp_path], "neither a run"),
            ([foreign], "was not written by cllm"),
            ([later], "model.n_experts"),
            ([damaged], "model.safetensors"),
            ([cyclic], "read from layers above them"),
            ([wide], "2 x 20 = 40 channels"),
            ([gated], "model.mlp_activation is gelu_tanh, which cannot be served with vLLM"),
            ([folder], "has no tokenizer"),
            ([folder, "--tokenizer=other", "--port", "99999"], "--port is 99999"),
            ([folder, "-tp", "3"], "tensor parallel size is 3"),
            ([folder, "--check", "-tp", "3"], "tensor parallel size is 3"),
            ([folder, "other"], f"other: a server has one model, and FOLDER is {folder}"),
            ([folder, "--check", "other"], "other: a server has one model"),
            ([folder, "--port", "80", "--model=other"], "other: a server has one model"),
            ([written, "--uds", "socket", "--config", "nosuch.yaml"], "nosuch.yaml: no such config file"),
            ([folder, "--max-model-len", "257"], "allowed: at most 256"),
            ([folder, "--tensor-parallel-size=many"], "allowed: an integer"),
            (
                [written, *address],
                f"port {port} of 127.0.0.1: cannot be used",
            ),
            ([written, "--port", "99999"], "allowed: 1 to 65535"),
        ]
        _, _, before = serve(written, *address, "--uds", tmp_path / "socket")
        assert before[-2:] == ["--uds", str(tmp_path / "socket")], "a port in use does not matter"
        for words, part in cases:
            status, printed, started = serve(*words)
            assert status == 2
            assert printed.count("\n") == 1
            assert part in printed
            assert started is before


def test_an_environment_without_vllm_is_named(export_tiny, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([str(export_tiny({"preset": "cla"}, n_layers=2).folder), "--skip-tokenizer-init"]) == 2
    assert "scripts/install_vllm_cpu" in capsys.readouterr().err

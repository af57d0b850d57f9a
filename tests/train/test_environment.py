"""What a run says of where it ran."""

from __future__ import annotations

import subprocess

import pytest

from cllm import environment

KERNELS = (
    *("flash-attn-4", "flash-linear-attention", "quack-kernels", "liger-kernel", "litgpt", "torchao", "deepspeed"),
    "triton",
)


def test_versions_of_kernel_libraries_and_peers_are_recorded_where_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "litgpt":
            raise environment.PackageNotFoundError
        return f"{package} 1.2"

    monkeypatch.setattr(environment, "version", version)
    found = environment.environment()
    assert {name: found.get(name) for name in KERNELS} == {
        name: None if name == "litgpt" else f"{name} 1.2" for name in KERNELS
    }


def test_clocks_without_nvidia_smi_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert environment.clocks() == "unknown"

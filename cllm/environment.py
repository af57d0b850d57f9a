"""The environment of a run: versions, commit, hardware; and the device that a command asks for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import cllm
from cllm.errors import UserError

_PACKAGES = (
    *("lightning", "transformers", "datasets", "tokenizers", "numpy", "deepspeed", "torchao", "triton"),
    *("flash-attn-4", "flash-attn-3", "flash-attn", "flash-linear-attention", "liger-kernel", "litgpt"),
    *("quack-kernels", "nvidia-cutlass-dsl"),
)


def _git(*words: str) -> str | None:
    root = Path(cllm.__file__).resolve().parent.parent
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> str | None:
    """The commit of this package's repository; None if it is installed, be it inside another repository."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != Path(cllm.__file__).resolve().parents[1]:
        return None
    return _git("rev-parse", "HEAD")


def clocks() -> str:
    """Clocks, temperature and power of the GPUs as nvidia-smi reports them."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def environment() -> dict[str, str]:
    """Versions, commit, hardware and command line, by name, for `env.txt` and reports."""
    found = {"cllm": cllm.__version__, "python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = str(torch.__version__)  # with the build, which the package's metadata lacks
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if commit := _commit():
        changed = " with local changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
        found["commit"] = commit + changed
    found["cpus"] = str(os.cpu_count())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = ", ".join(names)
        found["cuda"] = str(torch.version.cuda)
    found["command"] = " ".join(sys.argv)
    return found


def versions() -> dict[str, str]:
    """`environment()` without the command line, for results that other commands may repeat."""
    return {name: text for name, text in environment().items() if name != "command"}


def hardware(device: torch.device) -> str:
    """The name of a device, for results: `NVIDIA H100 80GB HBM3` or `CPU, x86_64`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"


def choose_device(option: str, where: str = "--device") -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: beginning with `where`, the option that was given, for `cuda` without a usable GPU.
    """
    usable = torch.cuda.is_available()
    if option == "cuda" and not usable:
        raise UserError(f"{where} cuda: there is no usable GPU; allowed here: cpu")
    return torch.device("cuda" if usable and option != "cpu" else "cpu")

"""What a run ran on: versions, commit, hardware."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import cllm

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


def clocks() -> str:
    """Clocks, temperature and power of the GPUs as nvidia-smi tells them."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def environment() -> dict[str, str]:
    """Name: value, for `env.txt` and for reports."""
    found = {"cllm": cllm.__version__, "python": platform.python_version(), "platform": platform.platform()}
    found["torch"] = str(torch.__version__)  # with the build, which the package's metadata leaves out
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        changed = " with local changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
        found["commit"] = commit + changed
    found["cpus"] = str(os.cpu_count())
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["gpus"] = ", ".join(names)
        found["cuda"] = str(torch.version.cuda)
    found["command"] = " ".join(sys.argv)
    return found

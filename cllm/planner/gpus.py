"""Memory and memory bandwidth of GPUs, from their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cllm.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class GPU:
    """One GPU. Units are decimal, as in data sheets."""

    name: str
    """How `--gpu` calls it."""
    memory: float
    """Bytes of device memory."""
    bandwidth: float
    """Bytes a second between memory and chip, as the data sheet gives them."""
    source: str
    """Where both numbers come from."""
    reported: tuple[str, ...] = ()
    """Names that the driver reports, which `--gpu` takes too. Benchmark records have the first one."""


GB, TB = 1e9, 1e12

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("A100-40GB", 40 * GB, 1.555 * TB, "NVIDIA A100 data sheet, SXM 40 GB", ("NVIDIA A100-SXM4-40GB",)),
        GPU("A100-80GB", 80 * GB, 2.039 * TB, "NVIDIA A100 data sheet, SXM 80 GB", ("NVIDIA A100-SXM4-80GB",)),
        GPU("H100", 80 * GB, 3.35 * TB, "NVIDIA H100 data sheet, SXM", ("NVIDIA H100 80GB HBM3",)),
        GPU("H100-PCIe", 80 * GB, 2.0 * TB, "NVIDIA H100 data sheet, PCIe", ("NVIDIA H100 PCIe",)),
        GPU("H200", 141 * GB, 4.8 * TB, "NVIDIA H200 data sheet, SXM", ("NVIDIA H200",)),
        GPU("B200", 180 * GB, 8.0 * TB, "NVIDIA DGX B200 data sheet, an eighth of the system", ("NVIDIA B200",)),
        GPU("L4", 24 * GB, 0.3 * TB, "NVIDIA L4 data sheet", ("NVIDIA L4",)),
        GPU("L40S", 48 * GB, 0.864 * TB, "NVIDIA L40S data sheet", ("NVIDIA L40S",)),
        GPU("RTX3090", 24 * GB, 0.936 * TB, "NVIDIA Ampere GA102 white paper", ("NVIDIA GeForce RTX 3090",)),
        GPU("RTX4090", 24 * GB, 1.008 * TB, "NVIDIA Ada white paper", ("NVIDIA GeForce RTX 4090",)),
    )
}
"""The GPUs that `--gpu` knows."""

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}


def parse_bytes(text: str, option: str, suffix: str = "") -> float:
    """`80GB`, `16 GiB` or, with the suffix `/s`, `3.35TB/s`, as bytes. Raises `UserError`, naming the option."""
    unit = re.escape(suffix)
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]i?)?B{unit}", text.strip(), re.IGNORECASE)
    value = float(match[1]) * _UNITS[(match[2] or "").lower()] if match else 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{option} is {text!r}; allowed: a positive number with a unit, such as 80GB{suffix} "
                        f"or 75GiB{suffix}")  # fmt: skip
    return value


def _plain(name: str) -> str:
    """A name without case, spaces, hyphens, and its maker's words."""
    return re.sub(r"nvidia|geforce|[\s_-]+", "", name.casefold())


def find_gpu(name: str | None, memory: str | None = None, bandwidth: str | None = None) -> GPU:
    """The GPU called `name`, in the table or by its driver, or one with the given memory and bandwidth; these win over
    the table's.

    Raises:
        UserError: for an unknown name, for a value without its unit, and if memory or bandwidth is not given.
    """
    known = {_plain(text): gpu for gpu in GPUS.values() for text in (gpu.name, *gpu.reported)}
    base = None if name is None else known.get(_plain(name))
    if name is not None and base is None:
        alike = [gpu.name for gpu in GPUS.values() if _plain(gpu.name).startswith(_plain(name))]
        allowed = f"allowed: {' or '.join(alike)}" if alike and _plain(name) else nearest(name, GPUS)
        raise UserError(f"--gpu is {name!r}; {allowed}; or give --memory and --bandwidth")
    size = parse_bytes(memory, "--memory") if memory is not None else base.memory if base else None
    speed = parse_bytes(bandwidth, "--bandwidth", "/s") if bandwidth is not None else base.bandwidth if base else None
    if size is None and speed is None:
        raise UserError(f"--gpu: missing; allowed: {', '.join(GPUS)}; or give --memory and --bandwidth")
    if size is None:
        raise UserError("--memory: missing; give it beside --bandwidth, such as --memory 80GB, or give --gpu")
    if speed is None:
        raise UserError("--bandwidth: missing; give it beside --memory, such as --bandwidth 3.35TB/s, or give --gpu")
    if base is not None and memory is None and bandwidth is None:
        return base
    given = " and ".join(o for o, v in (("--memory", memory), ("--bandwidth", bandwidth)) if v is not None)
    reported = base.reported if base and bandwidth is None else ()
    return GPU(base.name if base else "given", size, speed, f"{given} of the command line", reported)

"""Sizes of base models, plans, the agenda of measurements, and the folders of results."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.files import write_atomic

TEXT_METHODS = ("ridge", "fit", "best", "svd")
"""Methods that depend on the seed of the calibration text. `best` is `fit` with sources that it chooses itself."""
DISTILLED = {"kl": 1.0, "temperature": 2.0, "hidden": 1.0, "next_token": 1.0}
LOSSES: dict[str, dict[str, float]] = {"distilled": DISTILLED, "plain": {}}
"""`uptrain.loss` by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """The base model, how it is pretrained, and how its students are trained."""

    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    vocab_size: int
    """Of the tokenizer, which is trained on the corpus."""
    seq_len: int
    tokens: int
    """Pretraining tokens."""
    batch: int
    """Sequences of a pretraining step."""
    lr: float
    """Peak learning rate of pretraining, with cosine decay to a tenth of it."""
    uptrain_batch: int
    """Sequences of a student's step."""
    uptrain_lr: float
    """Peak learning rate of students. If it is far above the last rate of pretraining, the loss rises by more than a
    few steps can repair."""
    uptrain_kv_lr: float
    """The same if only K/V are trained."""
    validation_sequences: int
    calibration_sequences: int
    corpus_bytes: int | None = None
    """Bytes of the corpus to read; None: all."""
    base_seed: int = 0
    """Of the base model's initial weights and its order of the text."""

    @property
    def steps(self) -> int:
        return max(self.tokens // (self.batch * self.seq_len), 1)

    def uptrain_steps(self, percent: float) -> int:
        """Steps that read `percent` of the pretraining tokens."""
        return max(round(self.tokens * percent / 100 / (self.uptrain_batch * self.seq_len)), 1)


FULL = Size(
    d_model=768,
    n_layers=12,
    n_heads=12,
    d_ff=2048,
    vocab_size=16384,
    seq_len=1024,
    tokens=60_000_000,
    batch=64,
    lr=1e-3,
    uptrain_batch=4,
    uptrain_lr=1.5e-4,
    uptrain_kv_lr=5e-4,
    validation_sequences=256,
    calibration_sequences=64,
)
SMALL = Size(
    d_model=128,
    n_layers=8,
    n_heads=4,
    d_ff=352,
    vocab_size=2048,
    seq_len=256,
    tokens=1_000_000,
    batch=16,
    lr=3e-3,
    uptrain_batch=8,
    uptrain_lr=5e-4,
    uptrain_kv_lr=1e-3,
    validation_sequences=64,
    calibration_sequences=32,
    corpus_bytes=8_000_000,
)
TINY = Size(
    d_model=32,
    n_layers=4,
    n_heads=2,
    d_ff=64,
    vocab_size=300,
    seq_len=32,
    tokens=102_400,
    batch=8,
    lr=1e-2,
    uptrain_batch=4,
    uptrain_lr=5e-4,
    uptrain_kv_lr=1e-3,
    validation_sequences=8,
    calibration_sequences=4,
    corpus_bytes=1_000_000,
)


def plans(size: Size) -> dict[str, dict[str, Any]]:
    """`model.kv` of every plan; all but the first one need half of the cache or less.

    The latent of mla, with its rotated channels, is half as wide as a layer's keys and values.
    """
    head_dim = size.d_model // size.n_heads
    rope_dim = head_dim // 2
    return {
        "mha": {"preset": "mha"},
        "fusedkv": {"preset": "fusedkv"},
        "fusedkv_lite": {"preset": "fusedkv_lite"},
        "cla": {"preset": "cla", "factor": 2},
        "yoco": {"preset": "yoco", "window": size.seq_len // 4},
        "mla": {
            "preset": "mla",
            "kv_lora_rank": size.d_model - rope_dim,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": rope_dim,
            "v_head_dim": head_dim,
        },
    }


METHODS = {
    "fusedkv": ("copy", "mean", "aligned", "fit", "best"),
    "fusedkv_lite": ("copy", "mean", "aligned", "ridge", "fit"),
    "cla": ("copy", "mean", "aligned", "ridge", "fit"),
    "yoco": ("copy", "mean", "aligned", "ridge", "fit"),
    "mla": ("svd",),
}
"""For each plan, the methods whose loss before training is measured."""


@dataclass(frozen=True, slots=True)
class Start:
    """A student before training."""

    plan: str
    method: str
    seed: int
    """Of the calibration text."""

    @property
    def name(self) -> str:
        return f"start-{self.plan}-{self.method}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Steps of one student, timed."""

    trainable: str
    compiled: bool

    @property
    def name(self) -> str:
        return f"steps-{self.trainable}-{'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True, slots=True)
class Student:
    """One uptraining run."""

    plan: str
    method: str
    loss: str
    trainable: str
    percent: float
    """Of the pretraining tokens."""
    lr: float
    seed: int = 0
    """Of the calibration text and the order of the training text."""

    @property
    def name(self) -> str:
        return (
            f"{self.plan}-{self.method}-{self.loss}-{self.trainable}-{self.percent:g}pct-lr{self.lr:g}-seed{self.seed}"
        )


Item = Start | StepTime | Student


def agenda(
    lr: dict[str, float], *, seeds: int, train_seeds: int, percents: list[float], compile_steps: bool
) -> list[Item]:
    """All measurements, the most informative first, because time may run out at any point.

    Args:
        lr: peak learning rate for each value of `uptrain.trainable`.
        seeds: number of calibration texts, for methods that read one.
        train_seeds: number of seeds of runs.
        percents: shares of the pretraining tokens, each a run; the largest comes first.
        compile_steps: time compiled steps.
    """
    runs = _students(lr, train_seeds, percents)
    listed: list[Item] = [
        *_starts(dict.fromkeys(("fusedkv", "fusedkv_lite", "cla"), ("copy", "mean", "fit")), seeds),
        *runs[:6],
        *(StepTime(trainable, compile_steps) for trainable in ("all", "kv")),
        *(run for run in runs if run.name.startswith("fusedkv-fit-distilled-all-") and run.seed == 0),
        *_starts(METHODS, seeds),
        *runs,
    ]
    return list(dict.fromkeys(listed))


def _starts(methods: dict[str, tuple[str, ...]], seeds: int) -> list[Start]:
    return [
        Start(plan, method, seed)
        for plan in methods
        for method in methods[plan]
        for seed in range(seeds if method in TEXT_METHODS else 1)
    ]


def _students(lr: dict[str, float], seeds: int, percents: list[float]) -> list[Student]:
    """The uptraining runs, the most informative first.

    The run of mha trains the base model on the same tokens, without sharing, for comparison. Each percentage is a
    separate run whose learning rate decays until its end: a run to 5 % cannot be evaluated at 1 %.
    """
    most = max(percents)
    chosen: list[tuple[str, str, str, str, list[float]]] = [
        *((plan, "fit", "distilled", "all", [most]) for plan in ("fusedkv", "fusedkv_lite", "cla")),
        ("fusedkv", "best", "distilled", "all", [most]),
        ("mha", "copy", "plain", "all", [most]),
        ("fusedkv", "fit", "plain", "all", [most]),
        ("fusedkv", "fit", "distilled", "kv", [most]),
        *(("fusedkv", method, "distilled", "all", [most]) for method in ("copy", "mean", "aligned")),
        ("mla", "svd", "distilled", "all", [most]),
        ("yoco", "fit", "distilled", "all", [most]),
        ("fusedkv_lite", "copy", "distilled", "all", [most]),
        *(("cla", method, "distilled", "all", [most]) for method in ("copy", "aligned")),
        ("fusedkv", "fit", "distilled", "all", percents),
        ("fusedkv", "best", "distilled", "all", percents),
        ("fusedkv", "fit", "plain", "all", percents),
        ("fusedkv", "fit", "distilled", "kv", percents),
        *(("fusedkv", method, "distilled", "all", percents) for method in ("copy", "mean", "aligned")),
        *((plan, "fit", "distilled", "all", percents) for plan in ("fusedkv_lite", "cla", "yoco")),
        ("mla", "svd", "distilled", "all", percents),
    ]
    listed = (
        Student(plan, method, loss, trainable, percent, lr[trainable], seed)
        for seed in range(seeds)
        for plan, method, loss, trainable, shares in chosen
        for percent in sorted(shares, reverse=True)
    )
    return list(dict.fromkeys(listed))


@dataclass(slots=True)
class Deadline:
    """The time at which a command has to end; a signal moves it to now."""

    seconds: float
    """Time limit of the command."""
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.at = time.time() + self.seconds

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.at - time.time()


@dataclass(frozen=True, slots=True)
class Folders:
    """Paths of the experiment."""

    out: Path
    copies: Path | None = None
    """A second folder for rows.json and table.md."""

    @property
    def tokens(self) -> Path:
        return self.out / "tokens"

    @property
    def base(self) -> Path:
        """The base model as a Hugging Face folder."""
        return self.out / "base"

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    @property
    def size(self) -> Path:
        """The `Size` of everything in `out`."""
        return self.out / "size.json"

    def result(self, name: str) -> Path:
        return self.out / "results" / f"{name}.json"


def claim(folders: Folders, size: Size) -> None:
    """Write `size` into the folder `out`.

    Raises:
        UserError: if the folder has results of another size.
    """
    file, wanted = folders.size, asdict(size)
    if not file.exists():
        write_atomic(file, json.dumps(wanted, indent=2) + "\n")
        return
    existing = json.loads(file.read_text(encoding="utf-8"))
    differing = sorted(key for key in wanted if existing.get(key) != wanted[key])
    if differing:
        key = differing[0]
        raise UserError(
            f"--out {folders.out}: made with {key} {existing.get(key)}, and this command says {wanted[key]}; choose "
            "another --out or the same settings"
        )

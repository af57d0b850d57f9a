"""Settings of training: `attention:`, `data:`, `optim:` and `train:`."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, MAX_WORKERS, Section

BackendName = Literal["flash4", "cudnn", "flash3", "flash2", "varlen", "flex", "sdpa"]
"""The kernels of `cllm.kernels.backends`, fastest first."""


LOGGERS = ("csv", "mlflow", "tensorboard", "wandb")
"""Loggers that `train.loggers` may name without an import path."""
Extension = str | dict[str, JsonValue]
"""An entry of `train.loggers` or `train.callbacks`: a name or an import path, or a mapping with arguments."""
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class AttentionConfig(Section):
    """The attention kernel."""

    backend: Literal["auto", BackendName] = "auto"
    """`auto`: the fastest that supports the case, logged once with the reasons; or one by name."""


class DataConfig(Section):
    """Prepared tokens (see data/prepare.py)."""

    path: str = "data/prepared/stdlib"
    """Folder to train on."""
    validation: dict[str, str] = Field(default_factory=dict)
    """Validation sets, name: folder, the first is the main one; empty: the validation split of `path`."""
    seq_len: int = Field(512, ge=2, le=MAX_TOKENS)
    """Tokens of a training sequence."""
    document_mask: bool = False
    """Restrict attention to documents, and restart positions at each document."""
    num_workers: int = Field(2, ge=0, le=MAX_WORKERS)
    """Loader processes; the batches do not depend on it."""
    validation_sequences: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Sequences of each validation set during training; null: all. evaluate.py always reads all."""
    verify: Literal["sample", "full", "none"] = "sample"
    """How much to check for damage at the start. sample: 64 MiB of each split; full: all; none: only file sizes."""

    @field_validator("validation")
    @classmethod
    def _names(cls, sets: dict[str, str]) -> dict[str, str]:
        for name in sets:
            if not name or name.startswith(".") or not name.isprintable() or {"/", "\\"} & set(name):
                raise ValueError(f"names a set {name!r}; it names files: no slash, and no dot at the beginning")
        return sets


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: str = Field("adamw", min_length=1)
    """The optimizer: adamw, or one that an installed package registers (docs/training.md)."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Settings that only this optimizer has; adamw has none."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(3e-5, ge=0)
    """Learning rate at the end."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: cosine, linear, warm-up-stable-decay, or constant."""
    warmup_steps: int | None = Field(None, ge=0, le=MAX_COUNT)
    """Steps of linear warm-up from 0; null: 100, or a tenth of a run of fewer than 1000 steps."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd: fraction of all steps in which the rate falls linearly to min_lr."""
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    """adamw: decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """adamw: added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices; norms, biases and fusion weights do not decay."""
    fusion_lr_multiplier: float = Field(1.0, gt=0)
    """Learning rate of fusion weights relative to `lr`."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; null: no clipping."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        return min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} exceeds lr {self.lr}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class TrainConfig(Section):
    """The run."""

    steps: int = Field(1000, ge=1, le=MAX_COUNT)
    """Optimizer steps."""
    global_batch: int = Field(32, ge=1, le=MAX_COUNT)
    """Sequences of one optimizer step, over all devices."""
    micro_batch: int = Field(8, ge=1, le=MAX_COUNT)
    """Sequences that one device computes at once; gradients are accumulated over micro-batches."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the initial weights and of the data order."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast with fp32 weights; auto: bf16 on a GPU, fp32 on a CPU."""
    fp8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Matrix products of the blocks' linear layers in fp8 by torchao: one scale a tensor (fastest), one a row, or one a
    row with weight gradients in bf16 (most exact). Needs a GPU of compute capability 8.9. null: no fp8."""
    swiglu: Literal["auto", "torch", "quack"] = "auto"
    """Kernels of feed-forward layers. torch: matrix products and a separate activation. quack: quack-kernels fuse the
    activation into the products, faster and with fewer activations stored; not with fp8, zero3 or fp32. auto: quack if
    it is installed, on Hopper GPUs."""
    fp32_residual: bool = False
    """With bf16 under auto, single and ddp, keep the residual stream in fp32; costs a few percent of speed."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: gpu if torch sees one."""
    devices: int | Literal["auto"] = "auto"
    """Devices of this machine to use; auto: all GPUs, or the one CPU."""
    num_nodes: int = Field(1, ge=1, le=MAX_COUNT)
    """Machines with `devices` devices each; start one process a device with torchrun or srun (docs/distributed.md)."""
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """auto: single for one device, ddp for several; zero1, zero2, zero3: DeepSpeed shards optimizer states, and
    gradients, and weights."""
    offload_optimizer: bool = False
    """zero1, zero2, zero3: keep master weights and optimizer states in the host's memory and step on its CPU."""
    max_skipped_steps: int = Field(10, ge=0, le=MAX_COUNT)
    """Steps without a finite gradient are skipped; more of them than this stop the run."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile each block; auto: on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward instead of storing its activations."""
    recompute_fusion: bool = False
    """Recompute fused keys and values in the backward instead of storing them."""
    log_every: int = Field(10, ge=1, le=MAX_COUNT)
    """Steps between rows of metrics."""
    validate_every: int | None = Field(250, ge=1, le=MAX_COUNT)
    """Steps between validations, besides one at the start and one at the end; null: no validation."""
    checkpoint_every: int | None = Field(500, ge=1, le=MAX_COUNT)
    """Steps between checkpoints, besides one at the end; null: none, except when the run is asked to stop early."""
    keep_checkpoints: int = Field(2, ge=1, le=MAX_COUNT)
    """Number of newest checkpoints to keep."""
    keep_best: int = Field(0, ge=0, le=MAX_COUNT)
    """Number of checkpoints with the lowest val/loss to keep besides; best.json in the run's folder lists them."""
    loggers: list[Extension] = Field(default_factory=list)
    """Loggers of Lightning, such as [csv, {name: wandb, mode: offline}]: csv, tensorboard, wandb, mlflow, or {class:
    my_package.MyLogger}; other keys of a mapping are its arguments."""
    callbacks: list[Extension] = Field(default_factory=list)
    """Callbacks of Lightning, such as [{class: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss}]; other
    keys of a mapping are its arguments."""

    def in_bf16(self, *, gpu: bool) -> bool:
        """Whether the run computes in bf16, on a GPU or on a CPU."""
        return self.precision == "bf16" or (self.precision == "auto" and gpu)

    @field_validator("loggers", mode="before")
    @classmethod
    def _loggers(cls, entries: Any) -> Any:
        return _check_extensions(entries, LOGGERS)

    @field_validator("callbacks", mode="before")
    @classmethod
    def _callbacks(cls, entries: Any) -> Any:
        return _check_extensions(entries, ())

    @model_validator(mode="after")
    def _rules(self) -> Self:
        for key in ("validate_every", "checkpoint_every"):
            if self.keep_best and getattr(self, key) is None:
                raise ValueError(f"keep_best is {self.keep_best}, but {key} is null; allowed with it: keep_best 0")
        if isinstance(self.devices, int) and self.devices < 1:
            raise ValueError(f"devices is {self.devices}; allowed: 1 or more, or auto")
        if isinstance(self.devices, int) and self.devices > MAX_COUNT:
            raise ValueError(f"devices is {self.devices}; allowed: up to {MAX_COUNT}, or auto")
        if self.strategy == "single" and (self.num_nodes > 1 or self.devices not in ("auto", 1)):
            raise ValueError(
                f"strategy is single, but devices is {self.devices} and num_nodes is {self.num_nodes}; allowed for "
                "several: auto, ddp, zero1, zero2, zero3"
            )
        if self.strategy.startswith("zero") and self.precision == "fp32":
            raise ValueError(f"strategy {self.strategy} trains in bf16, but precision is fp32; allowed: auto, bf16")
        if self.fp8 and self.precision == "fp32":
            raise ValueError(f"fp8 {self.fp8} needs bf16 around it, but precision is fp32; allowed: auto, bf16")
        if self.fp8 and self.strategy == "zero3":
            raise ValueError(
                f"fp8 {self.fp8} keeps every weight that zero3 has gathered until the backward; allowed strategies: "
                "auto, single, ddp, zero1, zero2"
            )
        if self.swiglu == "quack":
            for key, value in (("precision", "fp32"), ("strategy", "zero3")):
                if getattr(self, key) == value:
                    raise ValueError(f"swiglu is quack, but {key} is {value}; allowed with it: auto, torch")
            if self.fp8:
                raise ValueError(f"swiglu is quack, but fp8 is {self.fp8}; allowed with it: auto, torch")
        if self.recompute_fusion and self.gradient_checkpointing:
            raise ValueError(
                "recompute_fusion is true, and so is gradient_checkpointing, which recomputes all; allowed: one of them"
            )
        if self.offload_optimizer and not self.strategy.startswith("zero"):
            raise ValueError(f"offload_optimizer needs strategy zero1, zero2 or zero3; strategy is {self.strategy}")
        if self.fp32_residual and self.strategy.startswith("zero"):
            raise ValueError(
                f"fp32_residual is true, but {self.strategy} keeps weights and the residual stream in bf16; allowed "
                "strategies: auto, single, ddp"
            )
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch {self.global_batch} is not a multiple of micro_batch {self.micro_batch}")
        return self


def _check_extensions(entries: Any, names: tuple[str, ...]) -> Any:
    """Refuse entries that are neither one of `names` nor an import path. Nothing is imported: reading is safe."""
    allowed = f"{', '.join(names)}, {{name: NAME, ...}} or " if names else ""
    allowed += "{class: my_package.MyClass, ...}"
    if not isinstance(entries, list):
        raise ValueError(f"is {entries!r}; allowed: a list of {allowed}")
    for n, entry in enumerate(entries):
        named, path = entry in names if isinstance(entry, str) else False, entry
        if isinstance(entry, dict):
            named, path = "class" not in entry and entry.get("name") in names, entry.get("class")
        if not named and not (isinstance(path, str) and _IMPORT_PATH.fullmatch(path)):
            raise ValueError(f"entry {n} is {entry!r}; allowed: {allowed}")
    return entries

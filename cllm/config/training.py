"""Settings of training: `attention:`, `data:`, `optim:` and `train:`."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from cllm.section import MAX_COUNT, MAX_SEED, MAX_TOKENS, MAX_WORKERS, Section

BackendName = Literal["flash4", "cudnn", "flash3", "flash2", "varlen", "flex", "sdpa"]
"""The kernels of `cllm.kernels.backends`, fastest first."""


Weight = Annotated[float, Field(gt=0)]
MAIN = "validation"
"""Name of the only validation set of a run on one folder."""
LOGGERS = ("csv", "mlflow", "tensorboard", "wandb")
"""Loggers that `train.loggers` may name without an import path."""
Extension = str | dict[str, JsonValue]
"""An entry of `train.loggers` or `train.callbacks`: a name or an import path, or a mapping with arguments."""
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


class AttentionConfig(Section):
    """The attention kernel."""

    backend: Literal["auto", BackendName] = "auto"
    """auto: the fastest that supports the case, logged with the reasons. Or one of flash4, cudnn, flash3, flash2,
    varlen, flex, sdpa (docs/attention.md)."""


class DataConfig(Section):
    """Prepared tokens (see data/prepare.py)."""

    path: str | None = "data/prepared/stdlib"
    """Folder of prepared tokens to train on (data/prepare.py); null with `mix`."""
    mix: dict[str, Weight] = Field(default_factory=dict)
    """In place of `path`, several folders of one tokenizer as folder: weight. A weight divided by the sum of all is the
    folder's share of the training tokens."""
    validation: dict[str, str] = Field(default_factory=dict)
    """Validation sets as name: folder; the first is the main one. Empty: the validation split of `path`, or those of
    the folders of `mix`, named after them."""
    seq_len: int = Field(512, ge=2, le=MAX_TOKENS)
    """Length of a training sequence, in tokens."""
    document_mask: bool = False
    """Restrict attention to the query's document, and restart positions at each document."""
    scored: Literal["all", "repeated"] = "all"
    """Training labels that count. all: every token; repeated: only tokens that complete a bigram which occurred earlier
    in their sequence (and document, with document_mask), for synthetic recall tasks. Validation scores all tokens."""
    num_workers: int = Field(2, ge=0, le=MAX_WORKERS)
    """Number of processes that load batches; the batches do not depend on it."""
    validation_sequences: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Number of sequences to score in each validation set during training; null: all. evaluate.py always scores all."""
    verify: Literal["sample", "full", "none"] = "sample"
    """How much of the data to check for damage before training. sample: 64 MiB of each split; full: all; none: only
    file sizes."""

    @field_validator("validation")
    @classmethod
    def _names(cls, sets: dict[str, str]) -> dict[str, str]:
        for name in sets:
            if not _names_a_file(name):
                raise ValueError(f"names a set {name!r}; it names files: no slash, and no dot at the beginning")
        return sets

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if not self.mix:
            if self.path is None:
                raise ValueError("path is null and mix is empty; allowed: one of them")
            return self
        if self.path is not None and "path" in self.model_fields_set:
            raise ValueError(f"path is {self.path!r}, but mix is given too; allowed: one of them (path: null)")
        self.path = None
        seen: dict[str, str] = {}
        for folder in self.mix:
            same, name = str(PurePath(folder)), PurePath(folder).name
            if same in seen:
                raise ValueError(f"mix has the folder {folder!r} twice")
            if not self.validation and not _names_a_file(name):
                raise ValueError(f"mix has the folder {folder!r}, whose last part cannot name its validation set")
            if not self.validation and name in seen.values():
                raise ValueError(f"mix has two folders of the name {name!r}; name their validation sets in validation")
            seen[same] = name
        return self

    @property
    def weights(self) -> dict[str, float]:
        """Training folders and their weights: `mix`, or `path` alone."""
        return self.mix or {self.main_folder: 1.0}

    @property
    def main_folder(self) -> str:
        """`path`, or the first folder of `mix`. Its tokenizer is that of all data."""
        folder = next(iter(self.mix), self.path)
        assert folder is not None
        return folder

    @property
    def description(self) -> str:
        """The training data in a line: `path`, or the folders of `mix` with their weights."""
        return " + ".join(f"{weight:g} {folder}" for folder, weight in self.mix.items()) or self.main_folder

    @property
    def validation_sets(self) -> dict[str, str]:
        """Validation sets, name: folder, the main one first: `validation`, or what it defaults to."""
        return self.validation or {PurePath(folder).name: folder for folder in self.mix} or {MAIN: self.main_folder}


def _names_a_file(name: str) -> bool:
    return bool(name) and not name.startswith(".") and name.isprintable() and not {"/", "\\"} & set(name)


_MOST = 1e3
"""The largest multiple of the learning rate."""


class Rates(Section):
    """Learning rates of parts of the model, as multiples of `optim.lr`."""

    kv: float = Field(1.0, gt=0, le=_MOST)
    """Projections of keys and values or of latents, with their norms, and up-projections of latents."""
    queries: float = Field(1.0, gt=0, le=_MOST)
    """Query projections and their norms."""
    outputs: float = Field(1.0, gt=0, le=_MOST)
    """Output projections of attention."""
    rest: float = Field(1.0, gt=0, le=_MOST)
    """All other weights except fusion weights: embeddings, feed-forward layers, norms of blocks, and the head."""


class OptimConfig(Section):
    """The optimizer and its learning rate."""

    name: str = Field("adamw", min_length=1)
    """The optimizer: adamw; muon, for matrices in blocks, with adamw for the rest; or one that an installed package
    registers (docs/training.md)."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Settings that only this optimizer has. adamw: none; muon: momentum, nesterov, ns_steps, adamw_lr_ratio."""
    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(3e-5, ge=0)
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after warm-up. cosine and linear: decay to min_lr; wsd: constant, then linear decay to min_lr;
    constant: no decay."""
    warmup_steps: int | None = Field(None, ge=0, le=MAX_COUNT)
    """Steps of linear warm-up from 0; null: a tenth of all steps, at most 100."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd: fraction of all steps in which the rate falls linearly to min_lr."""
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    """adamw, and muon's adamw: decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """adamw, and muon's adamw: added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices; norms, biases and fusion weights do not decay."""
    fusion_lr_multiplier: float = Field(1.0, gt=0)
    """Learning rate of fusion weights, as a multiple of `lr`."""
    rates: Rates = Field(default_factory=Rates)
    """Learning rates of parts of the model, as multiples of `lr`."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Norm to which larger gradients are scaled down; null: no clipping."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`."""
        return min(100, steps // 10) if self.warmup_steps is None else self.warmup_steps

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} exceeds lr {self.lr}")
        if any(not 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        for key, value in self.options.items():
            if isinstance(value, int) and abs(value) > MAX_COUNT:
                raise ValueError(f"options.{key} is {value}; allowed: whole numbers up to {MAX_COUNT}")
        return self


class TrainConfig(Section):
    """Steps, batches, precision, devices and checkpoints of a run."""

    steps: int = Field(1000, ge=1, le=MAX_COUNT)
    """Number of optimizer steps."""
    global_batch: int = Field(32, ge=1, le=MAX_COUNT)
    """Sequences in one optimizer step, over all devices and micro-batches."""
    micro_batch: int = Field(8, ge=1, le=MAX_COUNT)
    """Sequences that one device processes at once; gradients are accumulated over micro-batches."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of the initial weights and of the data order."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast with fp32 weights; auto: bf16 on a GPU, fp32 on a CPU."""
    fp8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Compute the matrix products of the blocks' linear layers in fp8, by torchao. tensorwise: one scale for each
    tensor (fastest); rowwise: one for each row; rowwise_with_gw_hp: one for each row, and weight gradients in bf16
    (most exact). Needs a GPU of compute capability 8.9 or higher. null: no fp8."""
    swiglu: Literal["auto", "torch", "quack"] = "auto"
    """Kernels of feed-forward layers. torch: matrix products and a separate activation. quack: quack-kernels fuse the
    activation into the products, which is faster and stores fewer activations; not with fp8, zero3 or fp32. auto: quack
    on Hopper GPUs if it is installed, else torch."""
    fp32_residual: bool = False
    """In bf16 training, keep the residual stream in fp32; costs a few percent of speed. Not with zero1, zero2,
    zero3."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: gpu if torch finds one, else cpu."""
    devices: int | Literal["auto"] = "auto"
    """Number of devices to use on each machine; auto: all GPUs, or the CPU."""
    num_nodes: int = Field(1, ge=1, le=MAX_COUNT)
    """Number of machines. For several, start one process for each device with torchrun or srun
    (docs/distributed.md)."""
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """single: one device; ddp: data parallelism; zero1, zero2, zero3: DeepSpeed shards optimizer states (zero1), also
    gradients (zero2), also weights (zero3). auto: single for one device, ddp for several."""
    offload_optimizer: bool = False
    """With zero1, zero2, zero3: keep master weights and optimizer states in CPU memory, and update them on the CPU."""
    max_skipped_steps: int = Field(10, ge=0, le=MAX_COUNT)
    """Steps without a finite gradient are skipped. The run stops after more than this many."""
    compile: bool | Literal["auto"] = "auto"
    """Compile each block with torch.compile; auto: on a GPU."""
    cuda_graph: bool | Literal["auto"] = False
    """Replay forward and backward of a step as one CUDA graph, for small steps of uptraining; auto: where possible."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward instead of storing its activations."""
    recompute_fusion: bool = False
    """Recompute fused keys and values in the backward instead of storing them."""
    log_every: int = Field(10, ge=1, le=MAX_COUNT)
    """Steps between rows of metrics."""
    validate_every: int | None = Field(250, ge=1, le=MAX_COUNT)
    """Steps between validations, besides one at the start and one at the end; null: no validation."""
    checkpoint_every: int | None = Field(500, ge=1, le=MAX_COUNT)
    """Steps between checkpoints, besides one at the end; null: no checkpoints, except when the run is stopped early."""
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

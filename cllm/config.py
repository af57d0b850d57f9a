"""Everything a YAML file may say: types, defaults, ranges, rules between fields, and what each means.

The tree is `Config` = name, init, uptrain, model, attention, data, optim, train. A docstring under a field is its
`--help`. Rules that need a second field are validators here, so that a config that loads is a config that can be built;
rules that need the disk (a tokenizer's size, a checkpoint) are checked where the disk is read. One thing is read here:
with `init.from`, the shape of the model to start from, where `model` does not say it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cllm.kv.plan import MAX_LAYERS, KVPlan
from cllm.kv.presets import MHA, KVConfig
from cllm.kv.spec import (
    MAX_COUNT,
    MAX_HEADS,
    MAX_SEED,
    MAX_TOKENS,
    MAX_WIDTH,
    MAX_WORKERS,
    Section,
    Shape,
)
from cllm.uptrain.settings import InitFrom, Uptrain


class RopeScaling(Section):
    """Stretching RoPE to contexts longer than the model was trained on."""

    type: Literal["linear", "llama3", "yarn"]
    """`linear` (position interpolation), `llama3` (Llama 3.1), `yarn` (arXiv 2309.00071)."""
    factor: float = Field(gt=0)
    """How much longer the context becomes."""
    original_max_seq_len: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Context before scaling, in tokens; required by llama3 and yarn."""
    low_freq_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths longer than original / this are stretched in full."""
    high_freq_factor: float = Field(4.0, gt=0)
    """llama3: wavelengths shorter than original / this are left alone."""
    beta_fast: float = Field(32.0, gt=0)
    """yarn: rotations within the original context above which a channel is left alone."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: rotations within the original context below which a channel is stretched in full."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: factor on cos and sin; null: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _needs_original(self) -> Self:
        if self.type != "linear" and self.original_max_seq_len is None:
            raise ValueError(f"rope scaling {self.type} needs original_max_seq_len, the context before scaling")
        if self.type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}; it must exceed low_freq_factor {self.low_freq_factor}"
            )
        return self


class Rope(Section):
    """Rotary position embedding, rotate-half layout: channel j turns with channel j + d/2."""

    theta: float = Field(10000.0, gt=0)
    """Base of the wavelengths."""
    scaling: RopeScaling | None = None
    """Scaling to a longer context; null: none."""


class Init(Section):
    """Initial weights: normal with mean 0."""

    std: float = Field(0.02, gt=0)
    """Standard deviation of embeddings and projections."""
    scale_residual: bool = True
    """Divide the deviation of projections that write to the residual stream by sqrt(2 n_layers) (GPT-2)."""


class ModelConfig(Section):
    """The decoder."""

    vocab_size: int | None = Field(None, ge=2, le=MAX_TOKENS)
    """Rows of the embedding; null: the tokenizer's size, rounded up to a multiple of 64."""
    d_model: int = Field(ge=2, le=MAX_WIDTH)
    """Width of the residual stream."""
    n_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Decoder layers."""
    n_heads: int = Field(ge=1, le=MAX_HEADS)
    """Query heads."""
    head_dim: int | None = Field(None, ge=2, le=MAX_WIDTH, multiple_of=2)
    """Channels of a head; null: d_model / n_heads."""
    d_ff: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Width of the SwiGLU hidden layer; null: 8/3 d_model, rounded up to a multiple of 64."""
    max_seq_len: int = Field(2048, ge=1, le=MAX_TOKENS)
    """Longest context in tokens."""
    rope: Rope = Field(default_factory=Rope)
    """Rotary position embedding."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    qk_norm: bool = False
    """RMSNorm on each head's queries and keys before RoPE (Qwen3)."""
    q_bias: bool = False
    """Bias on query projections (Qwen2)."""
    kv_bias: bool = False
    """Bias on key and value projections (Qwen2)."""
    tie_embeddings: bool = False
    """The output head is the embedding."""
    init: Init = Field(default_factory=Init)
    """Initial weights."""
    match_params: bool = False
    """Widen d_ff until the model has as many parameters as its mha twin, within 0.5 %: sharing removes projections."""
    kv: KVConfig = Field(default_factory=MHA)
    """The KV plan: a preset by name, or `layers`."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.head_dim is None:
            if self.d_model % self.n_heads:
                raise ValueError(
                    f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; set head_dim or change either"
                )
            if self.d_model // self.n_heads % 2:
                raise ValueError(
                    f"d_model {self.d_model} / n_heads {self.n_heads} gives an odd head_dim; RoPE rotates channel pairs"
                )
        for i, layer in enumerate(self.plan().layers):
            n_kv = getattr(layer.own, "n_kv_heads", None)
            if n_kv is not None and self.n_heads % n_kv:
                raise ValueError(f"layer {i}: n_heads {self.n_heads} is not a multiple of n_kv_heads {n_kv}")
        return self

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def resolved_d_ff(self) -> int:
        """`d_ff` as given, or its default; before `match_params`."""
        return self.d_ff or (8 * self.d_model // 3 + 63) // 64 * 64

    @property
    def shape(self) -> Shape:
        return Shape(n_layers=self.n_layers, n_heads=self.n_heads, head_dim=self.resolved_head_dim)

    def plan(self) -> KVPlan:
        """The KV plan, expanded and checked."""
        return self.kv.expand(self.shape)


class AttentionConfig(Section):
    """Which kernel computes attention."""

    backend: Literal["auto", "flash4", "cudnn", "flash3", "flash2", "varlen", "flex", "sdpa"] = "auto"
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
    """Attention stays inside documents and positions restart at each."""
    num_workers: int = Field(2, ge=0, le=MAX_WORKERS)
    """Loader processes; the batches do not depend on it."""
    validation_sequences: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Sequences of each validation set during training; null: all. evaluate.py always reads all."""
    verify: Literal["sample", "full", "none"] = "sample"
    """How much is read at the start to look for damage: sample: 64 MiB of each split; full: all; none: file sizes."""

    @field_validator("validation")
    @classmethod
    def _names(cls, sets: dict[str, str]) -> dict[str, str]:
        for name in sets:
            if not name or name.startswith(".") or not name.isprintable() or {"/", "\\"} & set(name):
                raise ValueError(f"names a set {name!r}; it names files: no slash, and no dot at the beginning")
        return sets


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    min_lr: float = Field(3e-5, ge=0)
    """Learning rate at the end."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After warm-up: cosine, linear, warm-up-stable-decay, or constant."""
    warmup_steps: int | None = Field(None, ge=0, le=MAX_COUNT)
    """Steps of linear warm-up from 0; null: 100, or a tenth of a run of fewer than 1000 steps."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """wsd: share of all steps in which the rate falls linearly to min_lr."""
    betas: list[float] = Field(default_factory=lambda: [0.9, 0.95], min_length=2, max_length=2)
    """AdamW's betas."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.1, ge=0)
    """On matrices; norms, biases and fusion weights have none."""
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
    """Sequences that one device computes at once; the rest is gradient accumulation."""
    seed: int = Field(0, ge=0, le=MAX_SEED)
    """Seed of weights and data order."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast with fp32 weights; auto: bf16 on a GPU, fp32 on a CPU."""
    fp8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = None
    """Products of the blocks' linear layers in fp8 by torchao, one scale a tensor (fastest), a row, or a row with the
    weights' gradients in bf16 (most exact); needs a GPU of compute capability 8.9; null: none."""
    swiglu: Literal["auto", "torch", "quack"] = "auto"
    """What computes feed-forward layers: products of torch and an activation between them, or quack-kernels, with the
    activation in the products' epilogues: faster, with fewer activations kept; not with fp8, zero3 or fp32. auto: quack
    where it is installed, on Hopper GPUs."""
    fp32_residual: bool = False
    """With bf16 under auto, single and ddp, keep the residual stream in fp32; costs a few percent of speed."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: a GPU if there is one."""
    devices: int | Literal["auto"] = "auto"
    """Devices of this machine to use; auto: all GPUs, or the one CPU."""
    num_nodes: int = Field(1, ge=1, le=MAX_COUNT)
    """Machines, each with `devices` devices; start one process a device with torchrun or srun (docs/distributed.md)."""
    strategy: Literal["auto", "single", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """auto: single for one device, ddp for several; zero1, zero2, zero3: DeepSpeed shards optimizer states, and
    gradients, and weights."""
    offload_optimizer: bool = False
    """zero1, zero2, zero3: keep master weights and optimizer states in the machine's memory and step on its CPU."""
    max_skipped_steps: int = Field(10, ge=0, le=MAX_COUNT)
    """Steps without a finite gradient, which are skipped, before the run stops."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile each block; auto: on a GPU."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward instead of keeping its activations."""
    recompute_fusion: bool = False
    """Of layers that fuse, make the fused keys and values again in the backward instead of keeping them."""
    log_every: int = Field(10, ge=1, le=MAX_COUNT)
    """Steps between rows of metrics."""
    validate_every: int | None = Field(250, ge=1, le=MAX_COUNT)
    """Steps between validations; the end is always validated, and so is the start; null: none at all."""
    checkpoint_every: int | None = Field(500, ge=1, le=MAX_COUNT)
    """Steps between checkpoints; the end always writes one; null: none at all, but for a run that is told to stop."""
    keep_checkpoints: int = Field(2, ge=1, le=MAX_COUNT)
    """Checkpoints to keep, newest first."""

    def in_bf16(self, *, gpu: bool) -> bool:
        """Whether the run computes in bf16, on a GPU or without."""
        return self.precision == "bf16" or (self.precision == "auto" and gpu)

    @model_validator(mode="after")
    def _rules(self) -> Self:
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


class Config(Section):
    """One training run."""

    name: str = Field("run", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Where run folders go."""
    init: InitFrom = Field(default_factory=InitFrom)
    """Another model's weights to start from."""
    uptrain: Uptrain = Field(default_factory=Uptrain)
    """How a model that starts from another learns from it."""
    model: ModelConfig
    """The decoder; with `init.from`, what is left out is that model's."""
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    """The attention kernel."""
    data: DataConfig = Field(default_factory=DataConfig)
    """What to train on."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """How to optimise."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How long, how wide, how often."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not data.get("init"):
            return data
        from cllm.uptrain.teacher import complete  # torch, which a config that starts from nothing does not need

        return complete(data)

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self.uptrain.check(self.init, steps=self.train.steps, fp8=self.train.fp8)
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.data.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}")
        return self

    def as_yaml_data(self) -> dict[str, Any]:
        """Plain data that loads back to an equal config: what `config.yaml` of a run holds."""
        return self.model_dump(mode="json")

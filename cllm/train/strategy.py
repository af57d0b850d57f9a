"""Strategies of `train.strategy`: one device, DDP, or DeepSpeed's ZeRO.

`ZeroStrategy` differs from Lightning's DeepSpeed strategy in five things, each with a test:

- Lightning and DeepSpeed both divide the loss by the number of accumulation rounds; `ZeroStrategy.backward` turns one
  of them off. AdamW hides the mistake, clipping and the logged norm do not.
- DeepSpeed rounds the weights to bf16 and makes its fp32 master weights from those. They are set to the unrounded ones.
- The module is moved to its device before the optimizer is built, so that fused kernels can be used.
- A checkpoint also holds the unsharded fp32 weights as safetensors, so that only resuming reads its pickles.
- Weights that are not trained have no fp32 master. The first process keeps their fp32 originals in the machine's
  memory, so that a checkpoint holds them to the bit. Resuming takes them from the checkpoint's safetensors.

bf16 under ZeRO is not autocast: DeepSpeed keeps bf16 weights in the module and fp32 master weights in its optimizer.
Norms, RoPE, fusion and the loss widen to fp32 in their own forward.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cllm.config import Config
from cllm.errors import UserError
from cllm.files import usual_permissions
from cllm.runs.checkpoint import read_weights
from cllm.runs.names import TIED, WEIGHTS_FILE
from cllm.train.launch import Launch
from cllm.train.optim import Optimizer
from cllm.train.reshard import load_resharded, set_fp32, set_weight, shards

EXTRA_FILE = "resume.safetensors"
"""In a checkpoint folder: tensors that resuming needs and the decoder does not."""
_GATHER_BUCKET = 200_000_000
"""Elements that DeepSpeed gathers at once, after the step."""
REDUCE_BUCKET = 50_000_000
"""Elements that DeepSpeed reduces at once. A bucket is sent while the backward fills the next one; only the last is
waited for. 100 MB of bf16 reach full bandwidth and take little time to wait for. Two buckets are allocated."""


def family(strategy: str) -> str:
    """The kind of checkpoints that a strategy writes; a run can be resumed with any strategy of the same family."""
    return strategy if strategy.startswith("zero") else "unsharded"


Split = Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]
"""Splits weights by name into those of the decoder, and tensors that only resuming needs."""


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO with an optimizer of torch, so that DeepSpeed compiles nothing."""

    def __init__(self, launch: Launch, *, micro_batch: int, offload_optimizer: bool):
        super().__init__(
            stage=launch.zero_stage or 0,
            offload_optimizer=offload_optimizer,
            contiguous_gradients=True,
            overlap_comm=launch.processes > 1,
            allgather_bucket_size=_GATHER_BUCKET,
            reduce_bucket_size=REDUCE_BUCKET,
            zero_allow_untested_optimizer=True,
            logging_batch_size_per_gpu=micro_batch,
        )
        assert isinstance(self.config, dict)
        # torch's optimizers run on the CPU too; DeepSpeed's would have to be compiled on the machine.
        self.config["zero_force_ds_cpu_optimizer"] = False
        self._optimizer: Optimizer = launch.optimizer
        self._frozen: dict[str, Tensor] = {}
        """On the first process, fp32 originals of the decoder's weights that are not trained, on the CPU."""
        self.split_extra: Split = lambda weights: (weights, {})
        """Splits the trained model's weights into the decoder's and extra tensors that only resuming needs."""
        self.has_extra = False
        """Whether there are such extra tensors."""
        if launch.accumulate > 1:  # in the default, bf16, the sum loses small gradients of micro-batches
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The backward without DeepSpeed's division by the accumulation rounds: Lightning has divided the loss."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        initial = {name: p.detach() for name, p in model.named_parameters()}  # these stay on the CPU
        model.to(self.root_device)
        assert isinstance(self.config, dict)
        elements = sum(p.numel() for p in model.parameters())
        for key in ("allgather_bucket_size", "reduce_bucket_size"):  # reducing allocates entire buckets
            zero = self.config["zero_optimization"]
            zero[key] = min(zero[key], elements)
        with contextlib.redirect_stdout(io.StringIO()):  # pages of memory reports
            super()._initialize_deepspeed_train(model)
        _check_norms_only(self.optimizers[0])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                set_fp32(parameter, initial[name], self.global_rank)
        if self.is_global_zero:
            named = self._decoder.named_parameters(prefix="model")
            self._frozen = {name.removeprefix("model."): initial[name] for name, p in named if not p.requires_grad}

    @property
    def _decoder(self) -> nn.Module:
        assert self.lightning_module is not None
        decoder = self.lightning_module.model
        assert isinstance(decoder, nn.Module)
        return decoder

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write DeepSpeed's files, for resuming, and next to them the unsharded weights. Collective.

        Extra tensors of `split_extra` go to a separate file.
        """
        filepath = self.broadcast(filepath)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        unsharded, tied = unsharded_weights(self._decoder, self._frozen, keep=self.is_global_zero)
        if self.is_global_zero:
            weights, extra = self.split_extra(unsharded)
            save_file(weights, Path(filepath) / WEIGHTS_FILE, metadata={"format": "pt", TIED: json.dumps(tied)})
            if extra:
                save_file(extra, Path(filepath) / EXTRA_FILE)
            usual_permissions(Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load DeepSpeed's files, and the weights that are not trained from the safetensors next to them. Collective.

        Shards of another number of processes are resharded, and then all weights come from the safetensors.

        Raises:
            UserError: if a file is missing or not readable, or lacks a tensor.
        """
        checkpoint = Path(checkpoint_path)
        resharded = len(shards(checkpoint)) != self.world_size
        state = None if resharded else super().load_checkpoint(checkpoint_path, weights_only)
        frozen = {name: p for name, p in self._decoder.named_parameters() if not p.requires_grad}
        if state is not None and not frozen:
            return state
        stored = read_weights(checkpoint)
        if self.has_extra:  # required: without it, merged weights would be taken for frozen ones and merged again
            stored |= _read_tensors(checkpoint / EXTRA_FILE)
        missing = sorted(frozen.keys() - stored.keys())
        if missing:
            raise UserError(f"{checkpoint_path}: not a checkpoint of this run: no tensor {missing[0]} in it")
        if state is None:
            weights = {f"model.{name}": tensor for name, tensor in stored.items()}
            state = load_resharded(
                self.deepspeed_engine, checkpoint, weights, self.global_rank, states=self._optimizer.states
            )
        else:
            for name, parameter in frozen.items():
                set_weight(parameter, stored[name])
        if self.is_global_zero:
            self._frozen = {name: stored[name] for name in frozen}
        return state


def _check_norms_only(optimizer: Any) -> None:
    """Remove a pass over every gradient, one by one, in which ZeRO-1 and 2 look for values that are not finite.

    The norm, which DeepSpeed computes right after, detects them too, and then the step is skipped as well. ZeRO-1 with
    accumulation, ZeRO-3 and offloading use other code and keep the pass.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable: {error}") from None


def unsharded_weights(
    model: nn.Module, frozen: dict[str, Tensor], *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's fp32 weights on the CPU by name, and the further names of tied ones, {name: first name}.

    Collective: every process gathers the master weights of all trained parameters, one at a time. The process with
    `keep` returns them together with `frozen`, the weights that are not trained.

    Raises:
        RuntimeError: if a trained parameter has no master weight, because the model is not DeepSpeed's.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    unsharded: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        if not parameter.requires_grad:
            if keep:
                unsharded[name] = frozen[name].contiguous()
            continue
        with torch.no_grad():
            full = safe_get_full_fp32_param(parameter)
        if full is None:
            raise RuntimeError(f"{name}: DeepSpeed has no fp32 weight for it")
        if keep:
            unsharded[name] = full.detach().to("cpu", torch.float32).contiguous()
        del full
    return unsharded, tied


def check_zero(launch: Launch) -> None:
    """Refuse ZeRO if it cannot run.

    Raises:
        UserError: without a CUDA device, in fp32, or if DeepSpeed cannot be imported.
    """
    strategy = launch.strategy
    if launch.accelerator != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"train.strategy is {strategy}, but the run is on a CPU: Lightning runs DeepSpeed on CUDA devices "
            "only; allowed here: auto, single, ddp"
        )
    if not launch.bf16:
        raise UserError(
            f"train.strategy is {strategy}, but train.precision is fp32: ZeRO keeps bf16 weights beside fp32 "
            "master weights; set train.precision to bf16 or train.strategy to auto, single or ddp"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"train.strategy is {strategy}, but DeepSpeed cannot be imported ({error}): DS_BUILD_OPS=0 pip "
            "install 'deepspeed>=0.19.8,<0.20'; allowed without it: auto, single, ddp"
        ) from None


def make_strategy(launch: Launch, config: Config) -> Strategy | str:
    """Lightning's strategy for a launch.

    Raises:
        UserError: names `train.strategy`, the obstacle and what is allowed.
    """
    if launch.zero_stage is not None:
        check_zero(launch)
        if (loop := config.model.plan().loop) is not None:
            raise UserError(
                f"train.strategy is {launch.strategy}, but {loop.text}, which ZeRO has not been tested with; allowed: "
                "auto, single, ddp"
            )
        train = config.train
        return ZeroStrategy(launch, micro_batch=train.micro_batch, offload_optimizer=train.offload_optimizer)
    if launch.strategy == "single" and launch.processes > 1:
        raise UserError(
            f"train.strategy is single, but train.devices x train.num_nodes is {launch.processes}; allowed: auto, ddp, "
            "zero1, zero2, zero3"
        )
    if launch.strategy == "single":
        return "auto"
    # Dynamo would split each compiled block again at the ends of DDP's buckets, so that these are sent inside of it.
    # Blocks are short enough to wait for, and the splits cost fusions.
    torch._dynamo.config.optimize_ddp = False
    return DDPStrategy(gradient_as_bucket_view=True)


def cluster_plugins() -> list[Any]:
    """SLURM's environment without Lightning's requeueing, which can save in the middle of a step; only under srun.

    torchrun numbers its processes itself, also inside a SLURM allocation.
    """
    srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if srun else []


# ---- DeepSpeed's engine ----------------------------------------------------------------------------------------------


def engine_of(trainer: Trainer) -> Any | None:
    """DeepSpeed's engine; None under other strategies."""
    return trainer.strategy.deepspeed_engine if isinstance(trainer.strategy, ZeroStrategy) else None


def gradient_norm(engine: Any) -> float:
    """Norm of the last step's gradient over all parameters and devices, before clipping; inf for a skipped step."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights are finite; under ZeRO-3, those of this process. Waits for the device."""
    shares = [getattr(p, "ds_tensor", p).detach() for p in model.parameters()]
    return bool(torch.stack([share.isfinite().all() for share in shares]).all())

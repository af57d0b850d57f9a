"""How a run is spread over devices: one device, DDP, or DeepSpeed's ZeRO, each from `train.strategy`.

Lightning's DeepSpeed strategy is used as it is but for five things, each of which a test holds:

- Lightning divides the loss by the number of accumulation rounds and so does DeepSpeed; `ZeroStrategy.backward` lets
  one of them do it. AdamW hides the mistake, clipping and the logged norm do not.
- DeepSpeed rounds the weights to bf16 and makes its fp32 master weights from those; they get the unrounded ones back.
- The module is on its device before the optimizer is made, so that the optimizer is AdamW's fused kernel.
- A checkpoint also holds the whole fp32 weights as safetensors, so that nothing but resuming ever reads its pickles.
- Weights that are not trained have no fp32 master: the first process keeps their fp32 originals in the machine's
  memory, so that a checkpoint holds them bit by bit. Resuming takes them from the checkpoint's safetensors.

bf16 under ZeRO is not autocast: DeepSpeed keeps bf16 weights in the module and fp32 master weights in its optimizer.
Norms, RoPE, fusion and the loss widen to fp32 in their own forward.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
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

from cllm.config import TrainConfig
from cllm.errors import UserError
from cllm.runs.checkpoint import read_weights
from cllm.runs.names import TIED, WEIGHTS_FILE
from cllm.train.reshard import load_resharded, set_fp32, set_weight, shards

APART_FILE = "resume.safetensors"
"""In a checkpoint folder: tensors that resuming needs and the decoder does not."""
_GATHER_BUCKET = 200_000_000
"""Elements that DeepSpeed gathers at once, after the step."""
REDUCE_BUCKET = 50_000_000
"""Elements that DeepSpeed reduces at once. A bucket travels while the backward fills the next, and the last one has
nothing left to hide behind: 100 MB of bf16 are enough for full bandwidth and little to wait for. Two are allocated."""


def zero_stage(train: TrainConfig) -> int | None:
    """1, 2 or 3, or None where DeepSpeed has no part."""
    return int(train.strategy.removeprefix("zero")) if train.strategy.startswith("zero") else None


def processes_of(train: TrainConfig) -> int:
    """Devices of all machines, for a run on GPUs; `auto` are those of this machine, or one where it has none."""
    here = 1 if train.strategy == "single" else max(torch.cuda.device_count(), 1)
    return (here if train.devices == "auto" else train.devices) * train.num_nodes


def family(strategy: str) -> str:
    """Strategies of one family write checkpoints that all of them can go on from."""
    return strategy if strategy.startswith("zero") else "whole"


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO with the client's AdamW; nothing of DeepSpeed's is compiled for it."""

    def __init__(self, stage: int, *, micro_batch: int, accumulate: int, processes: int, offload_optimizer: bool):
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            contiguous_gradients=True,
            overlap_comm=processes > 1,
            allgather_bucket_size=_GATHER_BUCKET,
            reduce_bucket_size=REDUCE_BUCKET,
            zero_allow_untested_optimizer=True,
            logging_batch_size_per_gpu=micro_batch,
        )
        assert isinstance(self.config, dict)
        # torch's own AdamW has a fused CPU kernel; DeepSpeed's would have to be compiled on the machine.
        self.config["zero_force_ds_cpu_optimizer"] = False
        self._frozen: dict[str, Tensor] = {}
        """On the first process, fp32 originals of the decoder's weights that are not trained, on the CPU."""
        self.set_apart: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]] = lambda w: (w, {})
        """From the weights of the model that is trained to those of the decoder, and what resuming needs besides."""
        self.sets_apart = False
        """Whether there is something that resuming needs besides."""
        if accumulate > 1:  # the default, bf16, loses small micro-batch gradients in the sum
            self.config["data_types"] = {"grad_accum_dtype": "fp32"}

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulation rounds; DeepSpeed is told not to do it again."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        drawn = {name: p.detach() for name, p in model.named_parameters()}  # stay on the CPU when the model moves
        model.to(self.root_device)
        assert isinstance(self.config, dict)
        elements = sum(p.numel() for p in model.parameters())
        for key in ("allgather_bucket_size", "reduce_bucket_size"):  # reducing allocates whole buckets
            zero = self.config["zero_optimization"]
            zero[key] = min(zero[key], elements)
        with contextlib.redirect_stdout(io.StringIO()):  # pages of memory reports
            super()._initialize_deepspeed_train(model)
        _check_norms_only(self.optimizers[0])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                set_fp32(parameter, drawn[name], self.global_rank)
        if self.is_global_zero:
            named = self._decoder.named_parameters(prefix="model")
            self._frozen = {name.removeprefix("model."): drawn[name] for name, p in named if not p.requires_grad}

    @property
    def _decoder(self) -> nn.Module:
        assert self.lightning_module is not None
        decoder = self.lightning_module.model
        assert isinstance(decoder, nn.Module)
        return decoder

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """DeepSpeed's own files, for resuming, and the whole weights beside them. All processes call it.

        What `set_apart` takes out is in a file of its own.
        """
        filepath = self.broadcast(filepath)
        super().save_checkpoint(checkpoint, filepath, storage_options)
        whole, tied = whole_weights(self._decoder, self._frozen, keep=self.is_global_zero)
        if self.is_global_zero:
            weights, apart = self.set_apart(whole)
            save_file(weights, Path(filepath) / WEIGHTS_FILE, metadata={"format": "pt", TIED: json.dumps(tied)})
            if apart:
                save_file(apart, Path(filepath) / APART_FILE)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """DeepSpeed's own files, and the weights that are not trained from beside them. All processes call it.

        Shards of another number of processes are put together, with all weights from beside them.

        Raises:
            UserError: where these are missing or not readable.
        """
        checkpoint = Path(checkpoint_path)
        resharded = len(shards(checkpoint)) != self.world_size
        state = None if resharded else super().load_checkpoint(checkpoint_path, weights_only)
        frozen = {name: p for name, p in self._decoder.named_parameters() if not p.requires_grad}
        if state is not None and not frozen:
            return state
        stored = read_weights(checkpoint)
        if self.sets_apart:  # without the file, merged weights would pass for the frozen ones, and be merged again
            stored |= _read_tensors(checkpoint / APART_FILE)
        missing = sorted(frozen.keys() - stored.keys())
        if missing:
            raise UserError(f"{checkpoint_path}: not a checkpoint of this run: no tensor {missing[0]} in it")
        if state is None:
            weights = {f"model.{name}": tensor for name, tensor in stored.items()}
            state = load_resharded(self.deepspeed_engine, checkpoint, weights, self.global_rank)
        else:
            for name, parameter in frozen.items():
                set_weight(parameter, stored[name])
        if self.is_global_zero:
            self._frozen = {name: stored[name] for name in frozen}
        return state


def _check_norms_only(optimizer: Any) -> None:
    """Spare DeepSpeed's optimizer of ZeRO-1 and 2 a pass through every gradient, one by one, for what is not finite.

    The norm, which is made right after, tells the same, and the step is skipped by it too. ZeRO-1 with accumulation,
    ZeRO-3 and offloading have other optimizers or other ways, and are left alone.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, DeepSpeedZeroOptimizer) and optimizer.compute_grad_norm and not optimizer.cpu_offload:
        optimizer.check_overflow = lambda partition_gradients=True: None


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not readable: {error}") from None


def whole_weights(
    model: nn.Module, frozen: dict[str, Tensor], *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's fp32 weights on the CPU by name, and the further names of tied ones, {name: first name}.

    Collective: every process gathers every trained parameter's master weight, one at a time, and the one with `keep`
    keeps them and adds `frozen`, those that are not trained.

    Raises:
        RuntimeError: where a trained parameter has no master weight: the model is not DeepSpeed's.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
            continue
        first[id(parameter)] = name
        if not parameter.requires_grad:
            if keep:
                whole[name] = frozen[name].contiguous()
            continue
        with torch.no_grad():
            full = safe_get_full_fp32_param(parameter)
        if full is None:
            raise RuntimeError(f"{name}: DeepSpeed has no fp32 weight for it")
        if keep:
            whole[name] = full.detach().to("cpu", torch.float32).contiguous()
        del full
    return whole, tied


def check_zero(train: TrainConfig, accelerator: str) -> None:
    """Refuse ZeRO where it cannot run.

    Raises:
        UserError: without a CUDA device, in fp32, or where DeepSpeed cannot be imported.
    """
    if accelerator != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"train.strategy is {train.strategy}, but the run is on a CPU: Lightning runs DeepSpeed on CUDA devices "
            "only; allowed here: auto, single, ddp"
        )
    if train.precision == "fp32":
        raise UserError(
            f"train.strategy is {train.strategy}, but train.precision is fp32: ZeRO keeps bf16 weights beside fp32 "
            "master weights; set train.precision to bf16 or train.strategy to auto, single or ddp"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"train.strategy is {train.strategy}, but DeepSpeed cannot be imported ({error}): DS_BUILD_OPS=0 pip "
            "install 'deepspeed>=0.19.8,<0.20'; allowed without it: auto, single, ddp"
        ) from None


def make_strategy(train: TrainConfig, *, accelerator: str, devices: int, accumulate: int) -> Strategy | str:
    """Lightning's strategy for a config.

    Args:
        train: the config's section.
        accelerator: `gpu` or `cpu`.
        devices: processes on this machine; there are `train.num_nodes` such machines.
        accumulate: micro-batches of one process in an optimizer step.

    Raises:
        UserError: names `train.strategy`, what is in its way and what is allowed.
    """
    processes = devices * train.num_nodes
    stage = zero_stage(train)
    if stage is not None:
        check_zero(train, accelerator)
        return ZeroStrategy(
            stage,
            micro_batch=train.micro_batch,
            accumulate=accumulate,
            processes=processes,
            offload_optimizer=train.offload_optimizer,
        )
    if train.strategy == "single" and processes > 1:
        raise UserError(
            f"train.strategy is single, but train.devices x train.num_nodes is {processes}; allowed: auto, ddp, zero1, "
            "zero2, zero3"
        )
    if train.strategy == "ddp" or processes > 1:
        # Dynamo would cut each compiled block again where DDP's buckets end, so that these travel in its midst. Blocks
        # are short enough to wait for, and the cuts cost fusions.
        torch._dynamo.config.optimize_ddp = False
        return DDPStrategy(gradient_as_bucket_view=True)
    return "auto"


def cluster_plugins() -> list[Any]:
    """Under srun, SLURM's process numbers without Lightning's own requeueing, which can save in mid-step.

    torchrun has numbers of its own, also inside a SLURM allocation.
    """
    srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
    return [SLURMEnvironment(auto_requeue=False)] if srun else []


def check_launch(devices: int, num_nodes: int) -> None:
    """Refuse a number of processes, started by torchrun or SLURM, that the config does not ask for.

    Raises:
        UserError: names `train.devices`, `train.num_nodes` and what was started.
    """
    if TorchElasticEnvironment.detect():
        launcher, variable = "torchrun", "WORLD_SIZE"
    elif SLURMEnvironment.detect():
        launcher, variable = "SLURM", "SLURM_NTASKS"
    else:
        return
    started = int(os.environ[variable])
    if started != devices * num_nodes:
        raise UserError(
            f"train.devices is {devices} and train.num_nodes {num_nodes}, but {launcher} has started {started} "
            f"processes ({variable}); allowed: as many as train.devices x train.num_nodes"
        )


# ---- what DeepSpeed's engine knows and Lightning does not ------------------------------------------------------------


def engine_of(trainer: Trainer) -> Any | None:
    """DeepSpeed's engine, or None under other strategies."""
    return trainer.strategy.deepspeed_engine if isinstance(trainer.strategy, ZeroStrategy) else None


def gradient_norm(engine: Any) -> float:
    """Norm of the last step's gradient over all parameters and devices, before clipping; inf for a skipped step."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def weights_are_finite(model: nn.Module) -> bool:
    """Whether all weights are finite; under ZeRO-3, this process's share of them. Waits for the device."""
    shares = [getattr(p, "ds_tensor", p).detach() for p in model.parameters()]
    return bool(torch.stack([share.isfinite().all() for share in shares]).all())

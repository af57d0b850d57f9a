"""Lightning's Trainer for a run: its loop, strategy and precision, and none of its callbacks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger

from cllm.config import Config
from cllm.train.checkpoints import CheckpointFiles
from cllm.train.launch import Launch
from cllm.train.lightning_internals import disable_signal_handling
from cllm.train.strategy import cluster_plugins, make_strategy


def make_trainer(
    config: Config, launch: Launch, root: Path, callbacks: Sequence[Callback], loggers: Sequence[Logger] = ()
) -> Trainer:
    """The Trainer of a run with these callbacks and loggers and no others.

    Args:
        config: of the run.
        launch: of the run.
        root: folder for files that callbacks and loggers of others write without a folder of their own.
        callbacks: in the order in which they are called.
        loggers: of Lightning.

    Raises:
        UserError: for a strategy that this launch cannot have.
    """
    train = config.train
    zero = launch.zero_stage is not None
    plugins: list[Any] = cluster_plugins() + ([] if zero else [CheckpointFiles()])
    trainer = Trainer(
        accelerator=launch.accelerator,
        devices=launch.devices,
        num_nodes=launch.num_nodes,
        strategy=make_strategy(launch, config),
        plugins=plugins,
        precision="bf16-mixed" if launch.bf16 else "32-true",
        max_steps=train.steps,
        max_epochs=-1,
        accumulate_grad_batches=launch.accumulate,
        gradient_clip_val=config.optim.grad_clip if zero else None,  # otherwise `TrainingModule` clips
        inference_mode=not zero,  # ZeRO-3 gathers weights in validation too, and inference tensors cannot be trained
        val_check_interval=(train.validate_every or train.steps) * launch.accumulate,
        limit_val_batches=None if train.validate_every else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the score of the untrained model is the first row of every curve
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        log_every_n_steps=train.log_every if loggers or train.loggers else None,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),  # only then allowed
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(root),
    )
    disable_signal_handling(trainer)
    return trainer


def silence_lightning() -> None:
    """Suppress messages of Lightning and torch to those who write a Trainer."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = False
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.fabric.utilities.rank_zero",
        "lightning.pytorch.strategies.deepspeed",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "does not have many workers",
        "isinstance.*LeafSpec",
        "Our suggested max number of worker",
        "Since DeepSpeed handles gradient clipping internally",
        "When saving the DeepSpeed Stage 3 checkpoint",
        "callbacks used to create the checkpoint need to be provided",
        "Checkpoint directory .* exists and is not empty",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")

"""One training run, from a config to a finished folder."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback, Trainer

from cllm.cache.accounting import kv_bytes, mha_twin
from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.module import DataModule
from cllm.environment import environment
from cllm.errors import UserError
from cllm.files import check_replaceable, mark, remove, write_atomic
from cllm.hub.companions import keep_companions
from cllm.lock import locked
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder, count_parameters, meta_decoder, training_flops_per_token
from cllm.plan.describe import plan_figure, plan_table
from cllm.runs import RUN, RunFolder, check_run_folder
from cllm.train.callbacks import CheckpointFiles, Checkpoints, Metrics, StopWhenDone
from cllm.train.equip import equip
from cllm.train.faults import explained, what_remains
from cllm.train.float8 import check_float8
from cllm.train.module import TrainingModule
from cllm.train.optim import check_warmup
from cllm.train.ranks import RankWatch
from cllm.train.reshard import shards
from cllm.train.resume import (
    check_intact,
    check_resumable,
    lacks_validation,
    newest_intact,
    prepare_folder,
    record_data,
    validate_first,
)
from cllm.train.strategy import check_launch, cluster_plugins, make_strategy, zero_stage
from cllm.train.uptraining import UptrainingModule
from cllm.uptrain.decoder import TracedDecoder
from cllm.uptrain.sources import check_best_sources, with_best_sources, with_saved_sources
from cllm.uptrain.start import calibration_batches, make_student, open_teacher
from cllm.uptrain.teacher import Teacher

log = logging.getLogger(__name__)


def with_vocabulary(config: Config) -> Config:
    """`config` with `model.vocab_size` set: as given, or the tokenizer's size rounded up to a multiple of 64."""
    if config.model.vocab_size is not None:
        return config
    tokens = Manifest.load(config.data.path).vocab_size
    model = config.model.model_copy(update={"vocab_size": (tokens + 63) // 64 * 64})
    return config.model_copy(update={"model": model})


def design_name(config: Config) -> str:
    """How tables call the plan: the preset's name, or `layers`."""
    return getattr(config.model.kv, "preset", "layers")


def summarise(config: Config, model: Decoder) -> dict[str, Any]:
    """What comparisons need to know of a run beside its metrics; see `cllm/runs/folder.py`."""
    own, twin = kv_bytes(config.model), kv_bytes(mha_twin(config.model))
    resident, read = own.relative_to(twin)
    return {
        "name": config.name,
        "design": design_name(config),
        "parameters": count_parameters(model),
        "parameters_without_embeddings": count_parameters(model, embeddings=False),
        "vocab_size": config.model.vocab_size,
        "context": config.model.max_seq_len,
        "kv_bytes_per_token": {"resident": own.resident, "written": own.written, "read": own.read},
        "kv_vs_mha": {"resident": resident, "read": read},
        "training_flops_per_token": training_flops_per_token(model, config.data.seq_len),
        "steps": config.train.steps,
        "tokens_per_step": config.train.global_batch * config.data.seq_len,
    }


def open_folder(config: Config, resume: str | None, overwrite: bool) -> tuple[RunFolder, Path | None]:
    """The run's folder and the checkpoint to go on from, or None to start afresh. Nothing is written here.

    Raises:
        UserError: when the folder holds a run and neither resuming nor overwriting was asked for, or both; when it
            holds something else; when no checkpoint is intact; when the saved run is another one, or finished without
            a checkpoint.
    """
    folder = RunFolder(Path(config.runs_dir) / config.name)
    folder.check_links()
    if resume is not None and overwrite:
        raise UserError(f"--resume {resume} goes on with a run and --overwrite replaces it; give one of them")
    # Other processes of this run start when the first has made the folder already.
    if not is_first_process():
        return folder, _checkpoint_to_resume(config, folder, resume)
    has_run = check_run_folder(folder)
    if resume is None:
        if has_run and not overwrite:
            raise UserError(
                f"{folder.path} holds a run already; go on with --resume auto, replace it with --overwrite, or choose "
                "another --name"
            )
        check_replaceable(folder.path, RUN)
        return folder, None
    checkpoint = _checkpoint_to_resume(config, folder, resume)
    if checkpoint is not None:
        return folder, checkpoint
    if has_run:  # it ended before its first checkpoint, and starts afresh
        check_resumable(config, folder)
        if folder.last_step() >= folder.config().train.steps:
            raise UserError(
                f"{folder.path} holds a finished run without checkpoints, so that --resume auto would train it "
                "again; replace it with --overwrite, or choose another --name"
            )
    check_replaceable(folder.path, RUN)
    return folder, None


def _checkpoint_to_resume(config: Config, folder: RunFolder, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        return newest_intact(config, folder)
    checkpoint = Path(resume)
    if not checkpoint.exists():
        raise UserError(f"--resume {resume}: no such checkpoint")
    if checkpoint.resolve().parent != folder.checkpoint_folder.resolve():
        raise UserError(f"--resume {resume}: not a checkpoint of {folder.path}")
    check_resumable(config, folder)
    check_intact(config, folder, checkpoint)
    return checkpoint


def _accelerator(config: Config) -> str:
    wanted = config.train.accelerator
    if wanted == "gpu" and not torch.cuda.is_available():
        raise UserError("train.accelerator is gpu, but torch sees no GPU; allowed here: cpu, auto")
    return "gpu" if wanted == "gpu" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"


def _devices(config: Config, accelerator: str) -> int:
    available = torch.cuda.device_count() if accelerator == "gpu" else 1
    if config.train.devices == "auto":
        return 1 if config.train.strategy == "single" else available
    if accelerator == "gpu" and config.train.devices > available:
        raise UserError(f"train.devices is {config.train.devices}; this machine has {available}")
    return config.train.devices


def _device(config: Config) -> torch.device:
    """Of this process."""
    if _accelerator(config) == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def make_trainer(config: Config, folder: RunFolder, metrics: Metrics, *more: Callback) -> Trainer:
    """Lightning's Trainer for a config, with this project's callbacks and nothing of Lightning's own."""
    train = config.train
    accelerator = _accelerator(config)
    devices = _devices(config, accelerator)
    processes = devices * train.num_nodes
    if train.global_batch % (train.micro_batch * processes):
        raise UserError(
            f"train.global_batch {train.global_batch} is not a multiple of train.micro_batch {train.micro_batch} x "
            f"{processes} devices"
        )
    accumulate = train.global_batch // (train.micro_batch * processes)
    zero = zero_stage(train) is not None
    bf16 = train.in_bf16(gpu=accelerator == "gpu")
    checkpoints = Checkpoints(
        folder,
        every=train.checkpoint_every,
        keep=train.keep_checkpoints,
        steps=train.steps,
        clock=metrics.clock,
        sync_rows=lambda: metrics.sync(),
    )
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=train.num_nodes,
        strategy=make_strategy(train, accelerator=accelerator, devices=devices, accumulate=accumulate),
        plugins=cluster_plugins() + ([] if zero else [CheckpointFiles()]),
        precision="bf16-mixed" if bf16 else "32-true",
        max_steps=train.steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=config.optim.grad_clip if zero else None,  # DeepSpeed clips; otherwise the module does
        inference_mode=not zero,  # ZeRO-3 gathers weights in validation too, and inference tensors cannot be trained on
        val_check_interval=(train.validate_every or train.steps) * accumulate,
        limit_val_batches=None if train.validate_every else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=-1,  # the untrained model's score is the first row of every curve
        callbacks=[metrics, *more, checkpoints, StopWhenDone(checkpoints, train.steps, train.log_every)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=str(folder.path),
    )
    # `StopWhenDone` has the signals. Lightning's handler of SIGTERM would end a run in mid-step; and before each
    # micro-batch it asks the first process whether it had one, and every host waits for its device to hear the answer.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _quieten() -> None:
    """Leave out what Lightning and torch say to those who build a Trainer, not to those who run one."""
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
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")


def is_first_process() -> bool:
    """Whether this is the process of a run that writes: the only one, or the first of the first machine."""
    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


@explained
def train(
    config: Config, *, resume: str | None = None, overwrite: bool = False, callbacks: Sequence[Callback] = ()
) -> RunFolder:
    """Train as `config` says and return the run's folder, which is locked meanwhile.

    Args:
        config: one run.
        resume: None starts afresh, `auto` goes on from the newest checkpoint if there is one, a path from that one.
        overwrite: replace a finished or broken run of the same name.
        callbacks: further callbacks of Lightning's, called after this project's metrics and before its checkpoints.

    Raises:
        UserError: for whatever a user can mend, before anything is written where that is possible; among it a run that
            another process is training.
    """
    _quieten()
    config = with_vocabulary(config)
    check_launch(_devices(config, _accelerator(config)), config.train.num_nodes)
    with locked(Path(config.runs_dir) / config.name) if is_first_process() else nullcontext():
        return _train(config, resume, overwrite, callbacks)


def _train(config: Config, resume: str | None, overwrite: bool, callbacks: Sequence[Callback]) -> RunFolder:
    chosen = None if resume is None else with_saved_sources(config, RunFolder(Path(config.runs_dir) / config.name))
    choose = config.init.sources == "best" and chosen is None
    config = chosen or config
    folder, checkpoint = open_folder(config, resume, overwrite)
    if checkpoint is None:
        check_warmup(config)
    start_step = folder.step_of(checkpoint) if checkpoint else 0
    validate = checkpoint is not None and lacks_validation(config, folder, start_step)
    if start_step > config.train.steps or (start_step == config.train.steps and not validate):
        log.info("%s is finished: %s is its last step", folder.path, checkpoint)
        return folder
    check_float8(config, _accelerator(config))
    lightning.seed_everything(config.train.seed, verbose=False)
    data = DataModule.of(config)
    if choose:
        check_best_sources(config, processes=_devices(config, _accelerator(config)) * config.train.num_nodes)
    teacher = None if config.init.path is None else open_teacher(config)
    if choose:
        assert teacher is not None
        config = with_best_sources(config, teacher, data, _device(config))
    module = make_module(config, data, teacher, resumed=checkpoint is not None)
    model = meta_decoder(config.model)  # what is counted: the decoder alone, without what training adds to it
    summary = summarise(config, model)
    metrics = Metrics(
        folder,
        start_step=start_step,
        steps=config.train.steps,
        log_every=config.train.log_every,
        tokens_per_step=summary["tokens_per_step"],
        flops_per_token=summary["training_flops_per_token"],
        kv_bytes_per_token=summary["kv_bytes_per_token"]["resident"],
        bytes_per_token=data.bytes_per_token,
        hyperparameters=hyperparameters(config, summary),
        max_skipped_steps=config.train.max_skipped_steps,
    )
    watch = RankWatch(lambda: what_remains(folder))
    trainer = make_trainer(config, folder, metrics, *callbacks, watch)
    stop = next(callback for callback in trainer.callbacks if isinstance(callback, StopWhenDone))  # type: ignore[attr-defined]
    if checkpoint is not None and zero_stage(config.train) is not None:
        shards(checkpoint)
    if trainer.is_global_zero:
        if checkpoint is None:
            remove(folder.path, RUN)
        mark(folder.path, RUN)  # a run from before there were marks gets one when it goes on
        _write_start(config, folder, model, summary)
        record_data(folder, data)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
        if trainer.is_global_zero:
            prepare_folder(folder, start_step, keep=config.train.keep_checkpoints)
        validate_first(trainer, validate)
    try:
        with watch.explained(), stop.watching():
            trainer.fit(module, data, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=True)
    except SystemExit as error:  # what Lightning makes of a KeyboardInterrupt, a second Ctrl-C
        raise (error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error) from None
    return folder


def make_module(config: Config, data: DataModule, teacher: Teacher | None, *, resumed: bool) -> TrainingModule:
    """The decoder and how it learns: from weights drawn here, or from those of another model, the one of `init.from`.

    `resumed` says that a checkpoint will replace the weights.
    """
    if teacher is None:
        model = build_decoder(config.model, backend=config.attention.backend)
    else:
        batches = partial(calibration_batches, config, data)
        model = make_student(config, teacher, batches, device=_device(config), resumed=resumed)
    equip(model, config, _device(config), compiled=should_compile(config))
    if teacher is None:
        return TrainingModule(model, config, data.validation_names)
    teacher.decoder.fp32_residual = config.train.fp32_residual
    if should_compile(config):
        teacher.decoder.compile_blocks()
    assert isinstance(model, TracedDecoder)
    return UptrainingModule(model, teacher, config, data.validation_names)


def should_compile(config: Config) -> bool:
    """Whether blocks are compiled; `auto` is yes on a GPU, unless ZeRO-3 gathers weights in the midst of each block."""
    if config.train.compile != "auto":
        return config.train.compile
    return _accelerator(config) == "gpu" and config.train.strategy != "zero3"


def hyperparameters(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """The flat table that TensorBoard's HPARAMS tab shows."""
    flat = {"design": summary["design"], "parameters": summary["parameters"]}
    flat |= {"kv_resident_vs_mha": summary["kv_vs_mha"]["resident"], "kv_read_vs_mha": summary["kv_vs_mha"]["read"]}
    for section in ("init", "uptrain", "model", "data", "optim", "train"):
        for key, value in config.as_yaml_data()[section].items():
            if isinstance(value, int | float | str | bool):
                flat[f"{section}.{key}"] = value
    return flat


def _write_start(config: Config, folder: RunFolder, model: Decoder, summary: dict[str, Any]) -> None:
    folder.checkpoint_folder.mkdir(parents=True, exist_ok=True)
    folder.write_config(config)
    write_atomic(folder.summary_file, json.dumps(summary, indent=2) + "\n")
    write_atomic(folder.path / "env.txt", "".join(f"{k}: {v}\n" for k, v in environment().items()))
    write_atomic(folder.path / "plan.txt", plan_table(model.plan) + "\n")
    if config.init.path is not None:
        keep_companions(Path(config.init.path), folder.path, config.model.vocab_size or 0)
    plan_figure(model.plan, f"{config.name}: {summary['design']}").savefig(folder.path / "plan.png", dpi=110)

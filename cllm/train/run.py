"""One training run, from a config to a finished folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import lightning
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from cllm.config import Config
from cllm.config.unused import unused_settings
from cllm.data.manifest import Manifest
from cllm.data.module import DataModule
from cllm.errors import UserError
from cllm.files import mark, remove
from cllm.lock import locked
from cllm.model.parts import has_fusion_weights
from cllm.model.sizes import build_decoder, meta_decoder
from cllm.runs import RUN, RunFolder
from cllm.train.callbacks import MonitoredMetrics, check_callbacks, make_callbacks
from cllm.train.checkpoints import Checkpoints
from cllm.train.faults import explained, newest_checkpoint_line
from cllm.train.float8 import check_float8
from cllm.train.folder import Start, find_start, write_start
from cllm.train.launch import Launch, is_first_process
from cllm.train.lightning_internals import validate_before_training
from cllm.train.loggers import ending_wandb, make_loggers, plan_loggers
from cllm.train.measure import Metrics
from cllm.train.module import TrainingModule
from cllm.train.prepare import prepare_for_training
from cllm.train.probes import Probe, Probes
from cllm.train.ranks import RankWatch
from cllm.train.replay import make_replay
from cllm.train.reshard import shards
from cllm.train.resume import delete_checkpoints, prepare_folder, record_data
from cllm.train.stop import StopWhenDone
from cllm.train.summary import run_facts, summarise
from cllm.train.trainer import make_trainer, silence_lightning
from cllm.train.uptraining import UptrainingModule
from cllm.trust import reason
from cllm.uptrain.student import start_student

log = logging.getLogger(__name__)


def with_vocabulary(config: Config) -> Config:
    """`config` with `model.vocab_size` set: as given, or the tokenizer's size rounded up to a multiple of 64."""
    if config.model.vocab_size is not None:
        return config
    tokens = max(Manifest.load(folder).vocab_size for folder in config.data.weights)
    model = config.model.model_copy(update={"vocab_size": (tokens + 63) // 64 * 64})
    return config.model_copy(update={"model": model})


@explained
def train(
    config: Config,
    *,
    resume: str | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    probes: Sequence[Probe] = (),
) -> RunFolder:
    """Train as `config` says and return the run's folder, which is locked meanwhile.

    Args:
        config: one run.
        resume: None for a new run, `auto` to resume from the newest checkpoint if there is one, or a checkpoint's path.
        overwrite: replace a finished or broken run of the same name.
        callbacks: callbacks of Lightning besides `train.callbacks`, called after this project's metrics and before its
            checkpoints.
        loggers: loggers of Lightning besides `train.loggers`. They get the hyperparameters and the rows of
            metrics.jsonl, by step.
        probes: measurements during training: those of `cllm.evaluate.during_training.training_probes` for
            `evaluate_suites`.

    Raises:
        UserError: for whatever a user can correct, if possible before anything is written; also for a run that another
            process is training.
    """
    if config.evaluate_suites and not probes:
        raise UserError(
            "evaluate_suites is set, but `train` was called without probes; pass it "
            "probes=cllm.evaluate.during_training.training_probes(config)"
        )
    silence_lightning()
    config = with_vocabulary(config)
    launch = Launch.here(config)
    callbacks = [*make_callbacks(config), *callbacks]
    plan_loggers(config, RunFolder(Path(config.runs_dir) / config.name))
    with locked(Path(config.runs_dir) / config.name) if is_first_process() else nullcontext():
        start = find_start(config, resume, overwrite)
        config = start.config
        if start.is_finished:
            log.info("%s is finished: %s is its last step%s", start.folder.path, start.checkpoint, start.advice)
            if config.train.keep_best and is_first_process():  # a kill may have come before this
                delete_checkpoints(start.folder, config.train)
            return start.folder
        check_float8(config, launch.accelerator)
        lightning.seed_everything(config.train.seed, verbose=False)
        data = DataModule.of(config)
        check_callbacks(callbacks, config, start.folder, data.validation_names)
        resumed = start.checkpoint is not None
        module = make_module(config, launch, data, choose_sources=not start.sources_chosen, resumed=resumed)
        _fit(module, data, start, launch, callbacks, loggers, probes)
        return start.folder


def _fit(
    module: TrainingModule,
    data: DataModule,
    start: Start,
    launch: Launch,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger],
    probes: Sequence[Probe],
) -> None:
    """Write the first files of a run, or resume it, and train."""
    config, folder, checkpoint = module.config, start.folder, start.checkpoint
    decoder = meta_decoder(config.model)  # without what training adds to it
    for line in unused_settings(config, fusion_weights=has_fusion_weights(decoder)):
        rank_zero_only(log.warning)("%s", line)
    summary = summarise(config, decoder)
    facts = run_facts(config, start.step, summary, data.bytes_per_token)
    metrics = Metrics(folder, facts)
    watch = RankWatch(lambda: newest_checkpoint_line(folder))
    checkpoints = Checkpoints(folder, config.train, clock=metrics.clock, sync_rows=metrics.sync)
    stop = StopWhenDone(checkpoints, config.train.steps, agree_every=config.train.log_every)
    monitored = MonitoredMetrics(callbacks, folder, start.step)
    callbacks = [*([Probes(probes, metrics, config.train.steps)] if probes else ()), *callbacks]
    everything = [metrics, *callbacks, *([monitored] if monitored.monitoring else ()), watch, checkpoints, stop]
    trainer = make_trainer(config, launch, folder.path, everything, loggers)
    if checkpoint is not None and launch.zero_stage is not None:
        shards(checkpoint)
    if trainer.is_global_zero:
        if checkpoint is None:
            remove(folder.path, RUN)
        mark(folder.path, RUN)  # also a run that was started before there were marks
        folder.early_stop_file.unlink(missing_ok=True)  # before config.yaml, see `ended_early`
        write_start(config, folder, decoder, summary)
        record_data(folder, data)
    if checkpoint is not None:
        log.info("resuming from %s", checkpoint)
        if trainer.is_global_zero:
            prepare_folder(folder, start.step, config.train)
        validate_before_training(trainer, start.validate)
    named = make_loggers(config, folder)
    trainer.loggers = [*loggers, *named]
    try:
        with ending_wandb(named), watch.explained(), stop.watching():
            ckpt_path = str(checkpoint) if checkpoint else None
            trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    except MisconfigurationException as error:  # from a callback or logger that does not fit this run
        raise UserError(reason(error)) from error
    except SystemExit as error:  # Lightning's replacement for a KeyboardInterrupt, from a second Ctrl-C
        raise (error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error) from None


def make_module(
    config: Config, launch: Launch, data: DataModule, *, choose_sources: bool = True, resumed: bool = False
) -> TrainingModule:
    """The decoder and its training step. Its weights are random, or with `init.from` computed from another model.

    Args:
        config: of the run; the module's config may have other sources of fused reads, see `start_student`.
        launch: of the run.
        data: of the run.
        choose_sources: false if the plan of `config` has the sources that were chosen before.
        resumed: a checkpoint will replace the weights.
    """
    if config.init.path is None:
        model = build_decoder(config.model, backend=config.attention.backend)
        prepare_for_training(model, config, launch)
        return _replaying(TrainingModule(model, config, launch.optimizer, data.validation_names), launch)
    student = start_student(
        config,
        data,
        device=launch.device,
        processes=launch.processes,
        choose=choose_sources,
        resumed=resumed,
    )
    prepare_for_training(student.decoder, student.config, launch)
    teacher = student.teacher.decoder
    teacher.fp32_residual = config.train.fp32_residual
    if launch.compiled:
        teacher.compile_blocks()
    return _replaying(UptrainingModule(student, launch.optimizer, data.validation_names), launch)


def _replaying(module: TrainingModule, launch: Launch) -> TrainingModule:
    setting = module.config.train.cuda_graph
    module.replay = make_replay(module.model, module.objective, setting=setting, reason=launch.not_graphed)
    return module

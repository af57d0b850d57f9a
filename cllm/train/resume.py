"""Resuming a run: the settings that may have changed, the checkpoint, and a validation that was missed."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only

from cllm.config import Config, TrainConfig
from cllm.data.manifest import Manifest
from cllm.data.mixture import MixedDataset
from cllm.data.module import DataModule
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sizes import meta_decoder
from cllm.runs import DataDigests, RunFolder
from cllm.train.best import BestCheckpoints
from cllm.train.strategy import family

log = logging.getLogger(__name__)

CHANGEABLE = {
    "name": "the folder is found by it",
    "runs_dir": "the folder is found by it",
    "attention.backend": "logged: losses may differ in their last bits from there on",
    "data.num_workers": "freely",
    "data.verify": "freely",
    "data.validation": "the main set, and the data of every set that stays, must be the same; others may come and go",
    "train.steps": "the learning rate is that of the new length from the next step on",
    "train.devices": "freely",
    "train.num_nodes": "freely",
    "train.strategy": "among auto, single and ddp",
    "train.max_skipped_steps": "freely",
    "train.cuda_graph": "freely",
    "train.gradient_checkpointing": "freely",
    "train.recompute_fusion": "freely",
    "train.log_every": "freely",
    "train.validate_every": "freely",
    "train.checkpoint_every": "freely",
    "train.keep_checkpoints": "freely",
    "train.keep_best": "freely; deleted checkpoints do not come back",
    "train.loggers": "freely",
    "train.callbacks": "freely; a run that a callback has ended goes on if they differ",
    "evaluate_suites": "freely, from the next step on",
}
"""The settings that may change when a run is resumed, and how; the table of docs/training.md. All others may not."""


# ---- settings and data -----------------------------------------------------------------------------------------------


def check_resumable(config: Config, folder: RunFolder) -> None:
    """Refuse to resume a run with a config or data that would make it another run.

    Raises:
        UserError: names the key, its value and the value that the run was started with.
    """
    saved = folder.config()
    old, new = _settings(saved), _settings(config)
    _check_data(config, saved, folder)
    for key in old | new:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if key == "attention.backend":
            rank_zero_only(log.info)("attention.backend is %s; the run was started with %s", after, before)
        if key not in CHANGEABLE or (key == "train.strategy" and family(str(before)) != family(str(after))):
            raise UserError(
                f"{key} is {after!r}, but the run in {folder.path} was started with {before!r}; resume with its own "
                "config.yaml or choose another --name"
            )


def _settings(config: Config) -> dict[str, object]:
    """Every setting by its dotted name, two levels deep; deeper levels are compared as one value."""
    settings: dict[str, object] = {}
    for section, content in config.as_yaml_data().items():
        if isinstance(content, dict):
            settings |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            settings[section] = content
    return settings


def _check_data(config: Config, saved: Config, folder: RunFolder) -> None:
    old, new = saved.data.validation_sets, config.data.validation_sets
    main, new_main = next(iter(old)), next(iter(new))
    if main != new_main:
        raise UserError(
            f"data.validation: the main set, the first, is {new_main!r}, but the run in {folder.path} was started with "
            f"{main!r}; name that first, or choose another --name"
        )
    recorded = folder.data_digests()
    if recorded is None:
        rank_zero_only(log.info)("%s has no record of its data: whether they have changed is not known", folder.path)
        if old[main] != new[main]:
            raise UserError(
                f"data.validation.{main} is {new[main]!r}, but the run in {folder.path} was started with "
                f"{old[main]!r}; resume with its own config.yaml or choose another --name"
            )
        return
    if config.data.path is not None and config.data.path == saved.data.path:
        _check_digest("data.path", config.data.path, recorded.train, folder)
    for path, digest in recorded.mix.items():
        if path in config.data.mix:
            _check_digest("data.mix", path, digest, folder)
    for name, path in new.items():
        if name in recorded.validation:
            _check_digest(f"data.validation.{name}", path, recorded.validation[name], folder)


def _check_digest(key: str, path: str, recorded: str, folder: RunFolder) -> None:
    found = Manifest.read(path).digest()
    if found != recorded:
        raise UserError(
            f"{key}: {path} holds other data than the run in {folder.path} was started with (its manifest's digest is "
            f"{found[:12]}, recorded is {recorded[:12]}); prepare it as it was, or choose another --name"
        )


def record_data(folder: RunFolder, data: DataModule) -> None:
    """Write the digests of a run's data. Digests of validation sets that the run no longer has are kept."""
    earlier = folder.data_digests()
    validation = data.validation_digests | (earlier.validation if earlier else {})
    digests = {path: manifest.digest() for path, manifest in data.manifests.items()}
    mix = digests if isinstance(data.train_dataset, MixedDataset) else {}
    folder.write_data_digests(DataDigests(train=data.manifest.digest(), validation=validation, mix=mix))


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def newest_intact(config: Config, folder: RunFolder) -> Path | None:
    """The newest intact checkpoint of a run that `config` may resume; None for a run without checkpoints.

    Newer checkpoints that are damaged are logged.

    Raises:
        UserError: as `check_resumable`, and if the run has checkpoints but all are damaged.
    """
    if not folder.checkpoints():
        return None
    check_resumable(config, folder)
    _, checkpoint, _, damaged = folder.newest_intact(_shapes(config), to_resume=True)
    for line in damaged:
        rank_zero_only(log.warning)("%s; falling back to %s", line, checkpoint.name)
    return checkpoint


def check_intact(config: Config, folder: RunFolder, checkpoint: Path) -> None:
    """Refuse a checkpoint that is damaged or of another run. Raises `UserError`."""
    folder.read_checkpoint(checkpoint, _shapes(config), to_resume=True)


def _shapes(config: Config) -> Decoder:
    return meta_decoder(config.model)


def prepare_folder(folder: RunFolder, start_step: int, train: TrainConfig) -> None:
    """Keep only the checkpoints up to `start_step` that `train` keeps, and remove unfinished files."""
    folder.remove_unfinished_checkpoints()
    for path in folder.set_aside_checkpoints(after=start_step):
        log.info("%s: of a later step, set aside until the run saves that step again", path)
    delete_checkpoints(folder, train, start_step)


def delete_checkpoints(folder: RunFolder, train: TrainConfig, step: int = 0) -> None:
    """Delete the checkpoints that `train` does not keep, and those that were set aside up to `step`."""
    best = BestCheckpoints(folder, train.keep_best)
    folder.keep_checkpoints(train.keep_checkpoints, step, best.steps())
    best.write()


def ended_early(config: Config, folder: RunFolder, checkpoint: Path) -> bool:
    """Whether a callback has ended the run at `checkpoint`, and `config` gives no reason to go on from there.

    Such a reason is another value of `train.callbacks` or `train.steps`. The first process of a run that goes on
    deletes `early_stop.json` before it writes config.yaml, so the other processes read them in the opposite order.
    """
    saved = folder.config().train
    if (saved.callbacks, saved.steps) != (config.train.callbacks, config.train.steps):
        return False
    return folder.early_stop() == folder.step_of(checkpoint)


# ---- the missed validation -------------------------------------------------------------------------------------------


def lacks_validation(config: Config, folder: RunFolder, step: int) -> bool:
    """Whether a validation was due after `step`, but a signal or a crash ended the run before its row was written."""
    every, steps = config.train.validate_every, config.train.steps
    due = every is not None and (step % every == 0 or step == steps)
    return due and not folder.is_validated_at(step)

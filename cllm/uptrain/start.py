"""The teacher of a config with `init.from`, and the student with its first weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch.utils.data import default_collate

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.module import DataModule
from cllm.data.vocabulary import VOCABULARY_FILES, load_tokenizer
from cllm.errors import DataError, UserError
from cllm.runs import RunFolder
from cllm.uptrain.attention import check_attention_loss
from cllm.uptrain.calibrate import Batches
from cllm.uptrain.curriculum import BlendingAttention, add_curriculum
from cllm.uptrain.decoder import TracedDecoder, build_traced
from cllm.uptrain.handover import add_handover
from cllm.uptrain.init import init_student
from cllm.uptrain.project import check_no_loop, check_plans, teacher_owners
from cllm.uptrain.teacher import Teacher, check_student, load_teacher
from cllm.uptrain.trainable import make_trainable

log = logging.getLogger(__name__)


def open_teacher(config: Config) -> Teacher:
    """The model of `init.from`.

    Raises:
        UserError: as `load_teacher` and `check_student`; for data of another tokenizer and for the run's own folder.
    """
    assert config.init.path is not None
    own = (Path(config.runs_dir) / config.name).resolve()
    if own in (Path(config.init.path).resolve(), *Path(config.init.path).resolve().parents):
        raise UserError(f"init.from is {config.init.path}, which is the folder of this run; choose another --name")
    teacher = load_teacher(config.init.path, backend=config.attention.backend)
    check_student(config.model, teacher.config, path=teacher.path, rope_pairs=config.init.rope_pairs)
    check_tokenizer(teacher.path, Manifest.read(config.data.main_folder))
    return teacher


def check_tokenizer(path: Path, data: Manifest) -> None:
    """Refuse `data` that was not prepared with the tokenizer of the model in `path`, if that tokenizer is known.

    A Hugging Face folder contains its tokenizer; a run has the tokenizer of the folder that it was trained on.

    Raises:
        UserError: names both.
    """
    run = path.parent.parent if path.suffix == ".ckpt" else path
    if RunFolder(run).config_file.exists():
        _check_tokenizer_of_run(RunFolder(run), data)
        return
    if not any((path / name).exists() for name in VOCABULARY_FILES):
        return
    why = ""
    try:
        if data.is_tokenized_by(load_tokenizer(path)):
            return
    except UserError as error:
        why = f" ({error})"
    raise UserError(
        f"data.path is {data.folder}, which was not prepared with the tokenizer of init.from, {path}{why}; "
        f"prepare it with --tokenizer.train null --tokenizer.load {path}"
    )


def _check_tokenizer_of_run(run: RunFolder, data: Manifest) -> None:
    folder, recorded = run.config().data.main_folder, run.data_digests()
    try:
        own = Manifest.read(folder)
        own.check_unchanged(None if recorded is None else recorded.train, run.path)
        same = own.same_tokenizer(data)
    except DataError as error:
        rank_zero_only(log.warning)(
            "init.from %s: its tokenizer is not compared with that of the data: %s", run.path, error
        )
        return
    if not same:
        raise UserError(
            f"data.path is {data.folder}, which was not prepared with the tokenizer of init.from, that of {folder}; "
            f"prepare it with --tokenizer.train null --tokenizer.load {folder}/tokenizer"
        )


def calibration_batches(config: Config, data: DataModule) -> Batches:
    """The first `init.calibration_sequences` training sequences, in batches of `train.micro_batch`.

    Raises `UserError` if the data has fewer.
    """
    n, size, available = config.init.calibration_sequences, config.train.micro_batch, len(data.train_dataset)
    texts = config.data.description
    if n > available:
        raise UserError(
            f"init.calibration_sequences is {n}, but {texts} holds {available} sequences of data.seq_len "
            f"{config.data.seq_len}; allowed: up to {available}"
        )
    rows = [data.train_dataset[i] for i in range(n)]
    return [default_collate(rows[start : start + size]) for start in range(0, n, size)]


def make_student(
    config: Config, teacher: Teacher, batches: Callable[[], Batches], *, device: torch.device, resumed: bool
) -> TracedDecoder:
    """The student with its first weights, on the CPU. Weights that are not trained are frozen.

    Args:
        config: with `init.from`.
        teacher: the model of that path. It is on the CPU afterwards, unless the run is resumed.
        batches: reads the calibration text; called only by methods that need it.
        device: to calibrate on.
        resumed: the weights will come from a checkpoint, so none are computed.

    Raises:
        UserError: for a plan, a method and `uptrain` settings that contradict each other.
    """
    uptrain = config.uptrain
    check_no_loop(config.model.plan())
    student = build_traced(config.model, backend=config.attention.backend, routed=uptrain.random_sources > 0)
    if uptrain.loss.attention:
        check_attention_loss(student)
    if uptrain.curriculum_steps:
        check_plans(student.plan, teacher.decoder.plan)
        if uptrain.curriculum_mix == "outputs":
            add_handover(student, teacher.decoder)
        else:
            add_curriculum(student, teacher_owners(student.plan, teacher.decoder))
    if not resumed:
        teacher.decoder.to(device)
        student.to(device)
        start = init_student(student, teacher.decoder, config.init, batches() if config.init.reads_text else ())
        for i, block in enumerate(student.blocks):
            if isinstance(block.attention, BlendingAttention):
                block.attention.curriculum_own.load_state_dict(start.owners[i].state_dict())
        for part, error in start.errors.items():
            rank_zero_only(log.info)("init.method %s: %s: %.4f", config.init.method, part, error)
        teacher.decoder.to("cpu")
        student.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    make_trainable(student, config)
    return student

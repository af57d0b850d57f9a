"""A student ready to train: the one thing that training takes from uptraining."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from cllm.config import Config
from cllm.data.module import DataModule
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.uptrain.decoder import TracedDecoder
from cllm.uptrain.sources import check_best_sources, with_best_sources, with_saved_sources
from cllm.uptrain.start import calibration_batches, make_student, open_teacher
from cllm.uptrain.teacher import Teacher, teacher_config
from cllm.uptrain.trainable import make_trainable

__all__ = ["PlannedStudent", "Student", "planned_student", "start_student", "with_saved_sources"]


@dataclass(frozen=True, slots=True)
class Student:
    """A student, the model that it learns from, and its config."""

    config: Config
    """The run's config; its plan has the sources that `init.sources: best` has chosen."""
    decoder: TracedDecoder
    """The student with its first weights, on the CPU; weights that are not trained are frozen."""
    teacher: Teacher
    """The model of `init.from`, on the CPU."""


def start_student(
    config: Config, data: DataModule, *, device: torch.device, processes: int, choose: bool, resumed: bool
) -> Student:
    """The student of a run with `init.from`.

    Args:
        config: of the run.
        data: the training data, which calibration reads too.
        device: to calibrate on.
        processes: of the run.
        choose: choose the sources if `init.sources` is best; false if the plan of `config` has been chosen before.
        resumed: the weights will come from a checkpoint, so none are computed.

    Raises:
        UserError: as `open_teacher`, `check_best_sources` and `make_student` do.
    """
    choose = choose and config.init.sources == "best"
    if choose:
        check_best_sources(config, processes=processes)
    teacher = open_teacher(config)
    if choose:
        config = with_best_sources(config, teacher, data, device)
    batches = partial(calibration_batches, config, data)
    return Student(config, make_student(config, teacher, batches, device=device, resumed=resumed), teacher)


@dataclass(frozen=True, slots=True)
class PlannedStudent:
    """The sizes of a run with or without `init.from`, for the dry run; no weights are read."""

    decoder: Decoder
    """On the meta device; weights that are not trained are frozen."""
    teacher_parameters: int
    """Parameters of a teacher that computes in every step; 0 without one."""


def planned_student(config: Config) -> PlannedStudent:
    """The student that `config` would train. Raises `UserError` as `teacher_config` does."""
    teacher = 0
    if config.init.path is not None and config.uptrain.needs_teacher:
        teacher = count_parameters(meta_decoder(teacher_config(config.init.path)))
    decoder = meta_decoder(config.model)
    make_trainable(decoder, config)
    return PlannedStudent(decoder, teacher)

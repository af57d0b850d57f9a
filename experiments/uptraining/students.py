"""Students: their configs, their losses before training, and their training by train.py."""

from __future__ import annotations

import math
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import yaml

from cllm import processes
from cllm.cache.accounting import kv_bytes
from cllm.config import Config
from cllm.config.load import validate
from cllm.data.module import DataModule
from cllm.errors import EXIT_STOPPED
from cllm.files import check_replaceable, write_atomic
from cllm.kernels.cross_entropy import IGNORE
from cllm.model.decoder import Decoder
from cllm.plan.presets import MHA
from cllm.runs import RUN, RunFolder
from cllm.uptrain.complete import complete
from cllm.uptrain.sources import with_best_sources
from cllm.uptrain.start import calibration_batches, make_student
from cllm.uptrain.teacher import Teacher
from cllm.workers import all_gpus, child_environment
from experiments.uptraining.report import has_failed, read_rows, write_failure, write_result
from experiments.uptraining.setup import LOSSES, Deadline, Folders, Size, Start, Student, plans

ROOT = Path(__file__).resolve().parents[2]


def student_data(
    folders: Folders, size: Size, student: Start | Student, *, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """A config of train.py, as plain data. Its seed differs from the seed of the base model's order of the text."""
    data: dict[str, Any] = {
        "name": student.name,
        "runs_dir": str(folders.runs),
        "init": {
            "from": str(folders.base),
            "method": "fit" if student.method == "best" else student.method,
            "sources": "best" if student.method == "best" else "plan",
            "calibration_sequences": size.calibration_sequences,
        },
        "model": {"kv": plans(size)[student.plan]},
        "data": {
            "path": str(folders.tokens),
            "seq_len": size.seq_len,
            "num_workers": 1 if device.type == "cuda" else 0,
            "validation_sequences": size.validation_sequences,
        },
        "train": {
            "global_batch": size.uptrain_batch,
            "micro_batch": size.uptrain_batch,
            "seed": size.base_seed + student.seed + 1,
            "accelerator": "gpu" if device.type == "cuda" else "cpu",
            "devices": 1,
            "compile": compiled,
        },
    }
    if isinstance(student, Student):
        steps = size.uptrain_steps(student.percent)
        data["uptrain"] = {"loss": LOSSES[student.loss], "trainable": student.trainable}
        data["optim"] = {
            "lr": student.lr,
            "min_lr": student.lr / 10,
            "warmup_steps": max(steps // 20, 1),
            "weight_decay": 0.0,
        }
        data["train"] |= {"steps": steps, "log_every": 20, "validate_every": steps, "checkpoint_every": None}
    return data


def data_module(config: Config) -> DataModule:
    """The data of `config`, as in training."""
    return DataModule(
        config.data.mix or config.data.main_folder,
        seq_len=config.data.seq_len,
        micro_batch=config.train.micro_batch,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        num_workers=0,
        validation_sequences=config.data.validation_sequences,
    )


@torch.no_grad()
def validation_loss(model: Decoder, data: DataModule, device: torch.device, *, bf16: bool | None = None) -> float:
    """Nats a token over the validation sequences, with matrix products in bf16; None: only on a GPU, as in training."""
    bf16 = device.type == "cuda" if bf16 is None else bf16
    nats, scored = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in data.val_dataloader()[0]:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            nats += model.loss(batch["input_ids"].to(device), batch["labels"].to(device), reduction="none").sum()
        scored += int((batch["labels"] != IGNORE).sum())
    return nats.item() / scored


def measure_start(folders: Folders, size: Size, start: Start, teacher: Teacher, device: torch.device) -> dict[str, Any]:
    """The row of a student before training."""
    begin = time.perf_counter()
    config = validate(Config, complete(student_data(folders, size, start, device=device, compiled=False))[0])
    data = data_module(config)
    if config.init.sources == "best":
        config = with_best_sources(config, teacher, data, device)
    student = make_student(config, teacher, lambda: calibration_batches(config, data), device=device, resumed=False)
    made = time.perf_counter() - begin
    loss = validation_loss(student.to(device).eval(), data, device)
    return {"kind": "start", "plan": start.plan, "method": start.method, "seed": start.seed, "loss": loss} | {
        "ppl": math.exp(loss),
        "seconds": made,
        "took": time.perf_counter() - begin,
    }


def run_row(folders: Folders, student: Student, seconds: float) -> dict[str, Any]:
    """The row of a finished run, from its folder."""
    folder = RunFolder(folders.runs / student.name)
    scores = {k: v for row in folder.metrics() for k, v in row.items() if k.startswith("val/")}
    summary, config = folder.summary(), folder.config()
    own, base = kv_bytes(config.model), kv_bytes(config.model.model_copy(update={"kv": MHA()}))
    loss, teacher = scores["val/loss"], scores["val/teacher_loss"]
    return {
        "kind": "run",
        "plan": student.plan,
        "method": student.method,
        "loss_kind": student.loss,
        "trainable": student.trainable,
        "percent": student.percent,
        "lr": student.lr,
        "batch": config.train.global_batch,
        "seed": student.seed,
        "tokens": summary["steps"] * summary["tokens_per_step"],
        "parameters": summary["parameters"],
        "loss": loss,
        "ppl": math.exp(loss),
        "start_loss": scores["val/start_loss"],
        "teacher_loss": teacher,
        "above_teacher_percent": 100 * (loss / teacher - 1),
        "recovery_percent": scores.get("val/recovery"),
        "kv_bytes_per_token": own.resident,
        "kv_vs_teacher": own.resident / base.resident,
        "seconds": seconds,
    }


class Runner:
    """Trains students, each in its own process, `parallel` of them at a time, until a deadline."""

    def __init__(
        self, folders: Folders, size: Size, *, device: torch.device, compiled: bool, parallel: int, deadline: Deadline
    ):
        self.folders, self.size, self.device, self.compiled = folders, size, device, compiled
        self.parallel, self.deadline = parallel, deadline
        self._lock = Lock()

    def run(self, students: list[Student]) -> int:
        """Train the students without a result; a failure does not stop the others.

        Returns:
            The number of students left for another command.
        """
        with ThreadPoolExecutor(self.parallel) as pool:
            list(pool.map(self._one, students))
        return sum(not self.folders.result(s.name).exists() and not has_failed(self.folders, s.name) for s in students)

    def _one(self, student: Student) -> None:
        # A student that takes more than half of the time limit is started nevertheless; the next command resumes it.
        if self.deadline.left < min(self._longest(student.percent), self.deadline.seconds / 2):
            return
        folder, steps = RunFolder(self.folders.runs / student.name), self.size.uptrain_steps(student.percent)
        spent = self.folders.out / "seconds" / f"{student.name}.txt"
        before, begin = float(spent.read_text()) if spent.exists() else 0.0, time.time()
        log = self.folders.out / "logs" / f"{student.name}.log"
        status = 0 if folder.is_validated_at(steps) else self._train(student, log)
        seconds = before + time.time() - begin
        write_atomic(spent, f"{seconds:.1f}\n")
        with self._lock:
            if status:
                last = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-1:])
                write_failure(self.folders, student.name, f"exit status {status}: {last} ({log})")
            if status or not folder.is_validated_at(steps):
                return
            row = run_row(self.folders, student, seconds)
            write_result(self.folders, student.name, row)
        check_replaceable(folder.path, RUN)
        shutil.rmtree(folder.checkpoint_folder, ignore_errors=True)
        print(
            f"{student.name}: loss {row['start_loss']:.4f} -> {row['loss']:.4f} (teacher {row['teacher_loss']:.4f}, "
            f"{row['above_teacher_percent']:+.2f} %), {seconds:.0f} s",
            flush=True,
        )

    def _longest(self, percent: float) -> float:
        """Seconds of the longest finished run with `percent` or less of the tokens; earlier commands count too."""
        with self._lock:
            rows = [row for row in read_rows(self.folders) if row["kind"] == "run"]
        return max((row["seconds"] for row in rows if row["percent"] <= percent), default=0.0)

    def _train(self, student: Student, log: Path) -> int:
        """Run train.py, which resumes an earlier command's run; returns its exit status, or 0 if time ran out."""
        data = student_data(self.folders, self.size, student, device=self.device, compiled=self.compiled)
        file = self.folders.out / "configs" / f"{student.name}.yaml"
        write_atomic(file, yaml.safe_dump(data, sort_keys=False))
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = child_environment(all_gpus() if self.device.type == "cuda" else None, self.parallel)
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(file), "--resume", "auto"]
        with log.open("w", encoding="utf-8") as output:
            process = processes.start(command, stdout=output, stderr=output, env=environment)
            while not processes.has_ended(process) and self.deadline.left > 0:
                time.sleep(0.1)
            if processes.has_ended(process):
                status = processes.reap(process)
                return 0 if status == EXIT_STOPPED else status
            processes.send(process, signal.SIGTERM)  # it saves and ends
            processes.reap(process, _SAVING)
        return 0


_SAVING = 45
"""Seconds for saving a student's checkpoint when time is up."""

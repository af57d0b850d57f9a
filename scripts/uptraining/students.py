"""Students: their configs, what they score before training, and their training by the project's own trainer."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import yaml

from cllm import cli
from cllm.config import Config
from cllm.data.module import DataModule
from cllm.errors import UserError
from cllm.kv.accounting import kv_bytes
from cllm.kv.presets import MHA
from cllm.model.decoder import Decoder
from cllm.model.loss import IGNORE
from cllm.runs import RunFolder
from cllm.train.run import train
from cllm.uptrain.start import calibration_batches, make_student
from cllm.uptrain.teacher import Teacher
from uptraining.base import write_result
from uptraining.setup import LOSSES, Folders, Size, Start, Student, plans

ROOT = Path(__file__).resolve().parents[2]


def student_data(
    folders: Folders, size: Size, student: Start | Student, *, device: torch.device, compiled: bool
) -> dict[str, Any]:
    """A config of `train.py`, as plain data. Its seed is the student's + 1: the base model read the text with 0."""
    data: dict[str, Any] = {
        "name": student.name,
        "runs_dir": str(folders.runs),
        "init": {
            "from": str(folders.base),
            "method": student.method,
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
            "seed": student.seed + 1,
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
    """The data of `config`, as the trainer would open it."""
    return DataModule(
        config.data.path,
        seq_len=config.data.seq_len,
        micro_batch=config.train.micro_batch,
        global_batch=config.train.global_batch,
        seed=config.train.seed,
        num_workers=0,
        validation_sequences=config.data.validation_sequences,
    )


@torch.no_grad()
def validation_loss(model: Decoder, data: DataModule, device: torch.device) -> float:
    """Nats a token over the validation sequences, in bf16 on a GPU as the trainer has it."""
    nats, scored = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in data.val_dataloader()[0]:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            nats += model.loss(batch["input_ids"].to(device), batch["labels"].to(device), reduction="none").sum()
        scored += int((batch["labels"] != IGNORE).sum())
    return nats.item() / scored


def measure_start(folders: Folders, size: Size, start: Start, teacher: Teacher, device: torch.device) -> dict[str, Any]:
    """The row of a student that was not trained."""
    begin = time.perf_counter()
    config = cli.validate(Config, student_data(folders, size, start, device=device, compiled=False))
    data = data_module(config)
    student = make_student(config, teacher, lambda: calibration_batches(config, data), device=device, resumed=False)
    made = time.perf_counter() - begin
    loss = validation_loss(student.to(device).eval(), data, device)
    return {"kind": "start", "plan": start.plan, "method": start.method, "seed": start.seed, "loss": loss} | {
        "ppl": math.exp(loss),
        "seconds": made,
    }


def run_row(folders: Folders, student: Student, seconds: float) -> dict[str, Any]:
    """The row of a finished run, from its folder."""
    folder = RunFolder(folders.runs / student.name)
    metrics = [row for row in folder.metrics() if "val/loss" in row]
    scores = {k: v for row in folder.metrics() for k, v in row.items() if k.startswith("val/")}
    summary, config = folder.summary(), folder.config()
    own, base = kv_bytes(config.model), kv_bytes(config.model.model_copy(update={"kv": MHA()}))
    loss, teacher = scores["val/loss"], scores["val/teacher_loss"]
    if metrics[-1]["step"] != summary["steps"]:
        raise UserError(f"{folder.metrics_file}: no validation at step {summary['steps']}, the last")
    return {
        "kind": "run",
        "plan": student.plan,
        "method": student.method,
        "loss_kind": student.loss,
        "trainable": student.trainable,
        "percent": student.percent,
        "lr": student.lr,
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
    """Trains students, several at a time, until a deadline; what has a result is skipped."""

    def __init__(
        self, folders: Folders, size: Size, *, device: torch.device, compiled: bool, parallel: int, deadline: float
    ):
        self.folders, self.size, self.device, self.compiled = folders, size, device, compiled
        self.parallel, self.deadline = parallel, deadline
        self.failed: list[str] = []
        """What ended with an error, and where its output is."""
        self._longest: dict[float, float] = {}
        self._lock = Lock()

    def run(self, students: list[Student]) -> int:
        """Train those that have no result; how many are left for another call."""
        waiting = [s for s in students if not self.folders.result(s.name).exists()]
        if self.parallel == 1:  # in this process and thread: the trainer handles signals
            for student in waiting:
                self._one(student)
        else:
            with ThreadPoolExecutor(self.parallel) as pool:
                list(pool.map(self._one, waiting))
        return sum(not self.folders.result(s.name).exists() for s in students)

    def _one(self, student: Student) -> None:
        begin = time.time()
        longest = max((t for p, t in self._longest.items() if p <= student.percent), default=0.0)
        if begin + longest > self.deadline or self.failed:
            return
        data = student_data(self.folders, self.size, student, device=self.device, compiled=self.compiled)
        if self.parallel == 1:
            train(cli.validate(Config, data), overwrite=True)
            torch._dynamo.reset()
        elif not self._elsewhere(student, data):
            return
        seconds = time.time() - begin
        with self._lock:
            self._longest[student.percent] = max(seconds, self._longest.get(student.percent, 0.0))
            row = run_row(self.folders, student, seconds)
            write_result(self.folders, student.name, row)
        shutil.rmtree(self.folders.runs / student.name / "checkpoints", ignore_errors=True)
        print(
            f"{student.name}: loss {row['start_loss']:.4f} -> {row['loss']:.4f} (teacher {row['teacher_loss']:.4f}, "
            f"{row['above_teacher_percent']:+.2f} %), {seconds:.0f} s",
            flush=True,
        )

    def _elsewhere(self, student: Student, data: dict[str, Any]) -> bool:
        """Train in a process of its own; whether it finished in time."""
        file, log = (self.folders.out / part / f"{student.name}{end}" for part, end in _FILES)
        for path in (file, log):
            path.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        threads = str(max((os.cpu_count() or 1) // self.parallel, 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ}
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(file), "--overwrite"]
        with log.open("w", encoding="utf-8") as output:
            try:
                done = subprocess.run(
                    command, stdout=output, stderr=output, env=environment, timeout=max(self.deadline - time.time(), 1)
                )
            except subprocess.TimeoutExpired:
                return False
        if done.returncode:
            self.failed.append(f"{student.name}: exit status {done.returncode}; see {log}")
        return not done.returncode


_FILES = (("configs", ".yaml"), ("logs", ".log"))


def read_rows(folders: Folders) -> list[dict[str, Any]]:
    """Every row there is, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folders.result("x").parent.glob("*.json"))]

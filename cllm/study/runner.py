"""The loop of a study: it keeps every GPU busy until no work is left, time runs out, or a signal comes.

A point is locked by the process that works on it, so several processes, as of a SLURM array, share the work. Its state
is its run's folder and its result. The result is written once, when its run has its last validation, and again with the
records of its evaluations.

On a GPU the next run starts while the one before it ends or is measured, see sharing.py.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import yaml
from tqdm import tqdm

from cllm import processes
from cllm.config import Config
from cllm.errors import EXIT_ELSEWHERE, EXIT_STOPPED, UserError
from cllm.files import RESULTS, mark_new, write_atomic
from cllm.lock import discard_dead, locked
from cllm.study.busy import Session, Stepping
from cllm.study.children import Commands, Job, Slot
from cllm.study.estimate import Estimates, progress, saved_share
from cllm.study.measuring import clear_unfinished, count_ended, evaluation_intervals, keep_records, records_of
from cllm.study.points import Point
from cllm.study.queue import Queue, Work, is_trained
from cllm.study.results import read_result, read_results, result_of, with_evaluations, write_result
from cllm.study.schema import ShareGPU
from cllm.study.sharing import wait_for_room
from cllm.version import code_version
from cllm.workers import Health, child_environment, last_line, start

log = logging.getLogger(__name__)

_POLL = 0.2
_CHECK = 1.0
"""Seconds between two looks at a run's metrics."""
_GRACE_OF_EVALUATION = 60.0
"""Seconds that an evaluation has to end once the study stops."""
_DIVERGED = "had a gradient that was not finite"
_IN_USE = "is in use by"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """How a study runs."""

    seconds: float | None = None
    """Time after which it stops; None: when all is done."""
    share: ShareGPU = True
    """`share_gpu` of the study."""
    poll: float = _POLL
    """Seconds between two looks at the processes."""
    check: float = _CHECK
    """Seconds between two looks at a run's metrics."""


class Runner:
    """Works on the points of a queue.

    Args:
        queue: the points.
        commands: of training and evaluation.
        slots: places for runs.
        estimates: speeds so far.
        options: how to run.
    """

    def __init__(self, queue: Queue, commands: Commands, slots: Sequence[Slot], estimates: Estimates, options: Options):
        self.queue, self.commands, self.slots, self.options = queue, commands, list(slots), options
        self.layout, self.estimates = queue.layout, estimates
        self._health = Health([slot.device for slot in slots])
        self.failed: dict[str, str] = {}
        """Names of points that failed in this process, and the last line of their logs."""
        devices = {f"{slot.name} {n}" if slot.device is None else slot.name: slot.busy for n, slot in enumerate(slots)}
        self.session = Session(self.layout.sessions, devices, queue.grid.code)
        self._began = time.monotonic()
        self._deadline = None if options.seconds is None else self._began + options.seconds
        self._stopped: float | None = None
        self._elsewhere: dict[str, float] = {}
        self._waits_for_others = False
        self._lacks_time = False
        self._configs: dict[str, Config] = {}
        self._queue_changed = True
        self._wanted: list[Point] = []
        self._left: list[tuple[Point, Work]] = []

    # ---- the loop

    def run(self) -> int:
        """Work until nothing is left for this process.

        Returns:
            The exit status: 0 if all is done, 1 if points failed, 3 if it was stopped or its time is too short for what
            is left, 4 if others work on all that is left.
        """
        mark_new(self.layout.out, RESULTS)
        self.layout.state.mkdir(parents=True, exist_ok=True)
        self.estimates.learn(read_results(self.layout.results))
        bar = tqdm(unit="run", disable=None, desc=self.queue.grid.study.name)
        with processes.received_signals() as received, bar:
            try:
                while self._turn(received):
                    bar.total = len(self._wanted)
                    bar.update(bar.total - len(self._left) - bar.n)
                    time.sleep(self.options.poll)
            finally:
                self._end_all()
                self.session.write()
        self._queue_changed = True
        self._refresh()
        for point in self._wanted:  # locks that killed processes left
            discard_dead(self.layout.lock(point))
        if not self._left and not self.queue.is_blocked:
            return 0
        if self.failed and self._stopped is None:
            return 1
        return EXIT_ELSEWHERE if self._stopped is None and not self._lacks_time else EXIT_STOPPED

    def _turn(self, received: list[int]) -> bool:
        """One turn of the loop; False if it has ended."""
        now = time.monotonic()
        if self._stopped is None and (received or (self._deadline is not None and now >= self._deadline)):
            self._stop()
        for slot in self.slots:
            for job in list(slot.jobs):
                if processes.has_ended(job.process):
                    self._finish(job)
                elif now - job.checked >= self.options.check:
                    self._look_at(job, now)
        self.session.turn(self._waiting)
        if self._stopped is not None:
            if now - self._stopped > _GRACE_OF_EVALUATION or len(received) > 1:
                self._signal("evaluate")
            return any(slot.jobs for slot in self.slots) and now - self._stopped < processes.GRACE
        self._refresh()
        self._waits_for_others = self._lacks_time = False
        started = [self._fill(slot) for n, slot in enumerate(self.slots) if self._health.is_usable(n)]
        return any(started) or any(slot.jobs for slot in self.slots) or self._waits_for_others

    def _refresh(self) -> None:
        if self._queue_changed or any(time.monotonic() - seen > 2 for seen in self._elsewhere.values()):
            self._wanted, self._left = self.queue.wanted(), self.queue.left()
            self._elsewhere = {}
            self._queue_changed = False

    @property
    def _waiting(self) -> int:
        """Number of trainings that no process works on."""
        running = sum(job.work == "train" for slot in self.slots for job in slot.jobs)
        return max(0, sum(work == "train" for _, work in self._left) - running - len(self._elsewhere))

    def _stop(self) -> None:
        """Ask the runs to save and stop."""
        self._stopped = time.monotonic()
        self._say("stopping: runs save and stop; the same command goes on")
        self._signal("train")

    def _signal(self, work: Work) -> None:
        for slot in self.slots:
            for job in slot.jobs:
                if job.work == work:
                    processes.send(job.process, 15)

    def _end_all(self) -> None:
        self._signal("train")
        self._signal("evaluate")
        for slot in self.slots:
            for job in list(slot.jobs):
                processes.reap(job.process, grace=_GRACE_OF_EVALUATION)
                job.locks.close()
                slot.jobs.remove(job)

    # ---- starting work

    def _fill(self, slot: Slot) -> bool:
        """Start the next piece of work on a slot if it has room. Returns whether one was started."""
        measures = any(job.work == "evaluate" for job in slot.jobs)
        share = self.options.share if slot.device is not None else False
        beside = share in (True, "evaluations")
        waits = wait_for_room(slot.jobs, share, self.estimates, self.layout)
        for point, work in self._left:
            if work == "evaluate" and (measures or (slot.jobs and not beside)):
                continue
            if (work == "train" and waits is None) or not self._is_open(point):
                continue
            if work == "train" and not self._fits(point, waits or 0.0):
                self._lacks_time = True
                continue
            if self._begin(slot, point, work):
                return True
        return False

    def _is_open(self, point: Point) -> bool:
        """Whether this process may start work on a point now."""
        if point.name in self.failed or any(job.point.key == point.key for slot in self.slots for job in slot.jobs):
            return False
        return point.name not in self._elsewhere

    def _fits(self, point: Point, waits: float) -> bool:
        """Whether a point ends before the study stops, or cannot end in any session as long as this one.

        A run that was begun before goes on in any case: stopping it loses nothing.
        """
        if self._deadline is None or self.options.seconds is None:
            return True
        config = self._config(point)
        tokens = config.train.steps * config.train.global_batch * config.data.seq_len
        saved = saved_share(self.layout.run(point), config.train.steps)
        evaluated = bool(self.queue.commands) and not point.search
        needed = self.estimates.seconds(point.variant.design, tokens * (1 - saved), evaluated=evaluated)
        left = self._deadline - time.monotonic() - waits
        return needed is None or saved > 0 or needed <= left or needed > self.options.seconds

    def _config(self, point: Point) -> Config:
        if point.key not in self._configs:
            self._configs[point.key] = self.queue.grid.config(point, self.layout.runs)
        return self._configs[point.key]

    def _begin(self, slot: Slot, point: Point, work: Work) -> bool:
        """Lock a point and start its process; False if another process has it."""
        locks = ExitStack()
        if not self._acquire(point, locks):
            locks.close()
            return False
        try:
            if self.queue.work(point) != work:  # another process has finished it since
                self._queue_changed = True
                locks.close()
                return True
            self._check_code()
            config = self._config(point)
            if work == "train" and is_trained(self.layout.run(point), config):
                self._record(point, None)
                locks.close()
                self._queue_changed = True
                return True
            started = time.time()
            process = start(
                self._command(point, work, config),
                self.layout.log(point),
                child_environment(slot.device, len(self.slots), self.layout.compiled),
            )
        except BaseException:
            locks.close()
            raise
        first, _ = progress(self.layout.run(point))
        steps = Stepping(self.layout.run(point), started)
        slot.jobs.append(Job(point, work, config, slot, process, locks, steps, first_tokens=first))
        self.layout.failure(point).unlink(missing_ok=True)
        self._say(f"{slot.name}: {'training' if work == 'train' else 'evaluating'} {point.short_name}")
        return True

    def _acquire(self, point: Point, locks: ExitStack) -> bool:
        """Lock a point; False if another study works on it, or a run whose study was killed is still saving."""
        held = False
        try:
            locks.enter_context(locked(self.layout.lock(point)))
            held = True
            with locked(self.layout.run(point).path):
                return True
        except UserError as error:
            if _IN_USE not in str(error):
                raise
            self._elsewhere[point.name] = time.monotonic()
            self._waits_for_others |= held or self.queue.is_blocked  # a result that decides on further points
            return False

    def _command(self, point: Point, work: Work, config: Config) -> list[str]:
        if work == "train":
            file = self.layout.config(point)
            write_atomic(file, yaml.safe_dump(config.as_yaml_data(), sort_keys=False))
            return self.commands.train(file)
        folder = self.layout.evaluation(point)
        clear_unfinished(folder, self.queue.marks)
        job = {"run": str(self.layout.run(point).path), "out": str(folder), "commands": self.queue.commands}
        job["marks"] = self.queue.marks
        file = folder.with_suffix(".json")
        write_atomic(file, json.dumps(job))
        return self.commands.evaluate(file)

    def _check_code(self) -> None:
        if (now := code_version()) != self.queue.grid.code:
            raise UserError(
                f"the code of cllm has changed since the study started, from {self.queue.grid.code} to {now}; start it "
                "again: its points are then those of the new version"
            )

    # ---- following work

    def _count_time(self, job: Job) -> None:
        """Note how long a job has kept its device busy so far."""
        if job.work == "train":
            interval = job.stepping_time.look()
            found = [] if interval is None else [interval]
        else:
            found = evaluation_intervals(self.layout.evaluation(job.point), self.queue.marks, job.stepping_time.started)
        for interval in found:
            job.slot.busy.add(*interval)

    def _look_at(self, job: Job, now: float) -> None:
        job.checked = now
        self._count_time(job)
        if job.work == "evaluate":
            folder = self.layout.evaluation(job.point)
            if (ended := count_ended(folder, self.queue.marks)) > job.ended:
                keep_records(self.layout.result(job.point), folder, self.queue.marks)
                job.ended = ended
            return
        tokens, speed = progress(self.layout.run(job.point))
        if not speed or tokens <= job.first_tokens:
            return
        if job.first_row is None:
            job.first_row = now, tokens
        elif not job.stepping and tokens > job.first_row[1]:
            job.stepping = True
            seen, first = job.first_row
            self.estimates.started(max(0.0, seen - job.started - (first - job.first_tokens) / speed))
        if job.stepping:
            self.estimates.measured(job.point.variant.design, speed)

    def _finish(self, job: Job) -> None:
        """Take the outcome of a process that has ended."""
        status = processes.reap(job.process)
        job.slot.jobs.remove(job)
        self._count_time(job)
        seconds = time.monotonic() - job.started
        line = last_line(self.layout.log(job.point))
        failed = len(self.failed)
        try:
            if job.work == "evaluate":
                self._finish_evaluation(job, status, seconds, line)
            elif status == 0 and is_trained(self.layout.run(job.point), job.config):
                self._record(job.point, seconds)
            elif status == EXIT_STOPPED:
                log.info("%s was stopped from outside and goes on", job.point.short_name)
            elif status == 2 and _DIVERGED in line:
                self._record(job.point, seconds, diverged=True)
            elif self._stopped is None:
                self._fail(job.point, status, line)
        except UserError as error:
            self._fail(job.point, status, str(error))
        finally:
            job.locks.close()
            self._queue_changed = True
        place = next(n for n, slot in enumerate(self.slots) if slot is job.slot)  # slots of a CPU are equal
        given_up = self._health.ended(place, failed=len(self.failed) > failed)
        if given_up is not None:
            self._say(given_up)

    def _record(self, point: Point, seconds: float | None, *, diverged: bool = False) -> None:
        """Write the result of a trained run."""
        run = self.layout.run(point)
        content = result_of(point, run, self.queue.grid.cache_match(point.variant), seconds, diverged=diverged)
        write_result(self.layout.result(point), content)
        loss = "diverged" if content["loss"] is None else f"loss {content['loss']:.4f}"
        speed = "" if content["tokens_per_s"] is None else f", {content['tokens_per_s']:,.0f} tokens/s"
        self._say(f"trained {point.short_name}: {loss}{speed}")
        if self.queue.work(point) is None:
            self._delete_checkpoints(point)

    def _finish_evaluation(self, job: Job, status: int, seconds: float, line: str) -> None:
        point, folder = job.point, self.layout.evaluation(job.point)
        if status != 0:
            keep_records(self.layout.result(point), folder, self.queue.marks)
            if self._stopped is None:
                self._fail(point, status, line)
            return
        records = records_of(folder, self.queue.marks)
        assert self.queue.evaluated is not None
        content = with_evaluations(read_result(self.layout.result(point)).content, records, self.queue.evaluated)
        write_result(self.layout.result(point), {**content, "evaluation_seconds": round(seconds, 1)})
        self.estimates.learn([read_result(self.layout.result(point))])
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".json").unlink(missing_ok=True)
        self._say(f"evaluated {point.short_name}")
        self._delete_checkpoints(point)

    def _delete_checkpoints(self, point: Point) -> None:
        if self.queue.grid.study.keep_checkpoints and not point.search:
            return
        for _, checkpoint in self.layout.run(point).checkpoints():
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()

    def _fail(self, point: Point, status: int, line: str) -> None:
        self.failed[point.name] = line
        write_atomic(self.layout.failure(point), line + "\n")
        self._say(f"failed (status {status}) {point.short_name}: {line or 'no output'}; see {self.layout.log(point)}")

    @staticmethod
    def _say(text: str) -> None:
        tqdm.write(text, file=sys.stderr)

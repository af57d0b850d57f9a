"""When the next training may start on a GPU on which others run.

A training needs time for the start of Python, imports, data and compilation before its first step. It is started that
long before the ones on its GPU have ended, so that the GPU goes on with steps. Short runs may have two successors on
their way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from cllm.study.children import Job
from cllm.study.estimate import Estimates, progress
from cllm.study.layout import Layout
from cllm.study.schema import ShareGPU

MOST_TRAININGS = 3
"""Trainings on one GPU, of which at most one should be stepping."""


def ends_in(trainings: Sequence[Job], estimates: Estimates, layout: Layout) -> float:
    """Seconds until the trainings of one GPU have their last steps; infinity if a speed is not known.

    They are taken to step one after the other, each as soon as it has started.
    """
    end = 0.0
    for job in trainings:
        tokens, speed = progress(layout.run(job.point))
        if not job.stepping:
            starts_in = max(0.0, estimates.startup - (time.monotonic() - job.started))
            end, speed = max(end, starts_in), estimates.speed(job.point.variant.design)
        if not speed:
            return math.inf
        end += max(0, job.tokens - tokens) / speed
    return end


def wait_for_room(jobs: Sequence[Job], share: ShareGPU, estimates: Estimates, layout: Layout) -> float | None:
    """Whether a training may start beside the jobs of its device now.

    Returns:
        Seconds until the device is free for its steps; None if it may not start yet.
    """
    if not jobs:
        return 0.0
    trainings = [job for job in jobs if job.work == "train"]
    if not trainings:
        return 0.0 if share in (True, "evaluations") else None
    if share not in (True, "trainings") or len(trainings) >= MOST_TRAININGS:
        return None
    seconds = ends_in(trainings, estimates, layout)
    return seconds if seconds <= estimates.startup else None

"""Commands over several runs: which are left out, why, and the exit status."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from cllm.errors import UserError
from cllm.evaluate.left_out import LeftOut
from cllm.evaluate.posthoc import _Scored
from cllm.evaluate.tasks.run import Result, _calibrate
from cllm.signals import Interrupted, raising


def left_out(reasons: dict[str, str | None]) -> LeftOut:
    found = LeftOut(len(reasons))
    for run, reason in reasons.items():
        with found.unless_usable(run):
            if reason is not None:
                raise UserError(reason)
    return found


def test_a_reason_of_several_runs_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    found = left_out({"a": "--stride is 4", "b": "--stride is 4", "c": "runs/c: damaged", "d": None})
    assert found.status() == 1
    assert found.names == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "left out: a: --stride is 4",
        "left out: b: for the same reason",
        "left out: runs/c: damaged",
    ]


def test_all_runs_left_out_are_an_error_with_the_reason_that_they_share() -> None:
    with pytest.raises(UserError, match=r"^none of the 2 runs can be used: --stride is 4$"):
        left_out({"a": "--stride is 4", "b": "--stride is 4"}).status()
    with pytest.raises(UserError, match=r"^none of the 2 runs can be used$"):
        left_out({"a": "--stride is 4", "b": "damaged"}).status()
    with pytest.raises(UserError, match=r"^damaged$"):
        left_out({"a": "damaged"})
    assert left_out({"a": None, "b": None}).status() == 0


STOPPED = "cannot be built: Interrupted: SIGTERM"
SPEC = "kivi:bits=8"


class _Method:
    """A method of --posthoc that cannot be used."""

    def prepare(self, *arguments: Any) -> None:
        raise UserError(STOPPED)


def _leave_out() -> None:
    left_out({"a": STOPPED, "b": None})


def _refuse() -> None:
    with _Scored(SPEC, cast(Any, _Method())).refusing({}):
        raise UserError(STOPPED)


def _leave_out_tasks() -> None:
    _calibrate(cast(Any, None), [cast(Any, _Method())], [], torch.zeros(1, 1), [Result(spec=SPEC, answers=[])])


@pytest.mark.parametrize("go_on", [_leave_out, _refuse, _leave_out_tasks])
def test_a_stop_that_became_another_error_leaves_nothing_out(go_on: Callable[[], None]) -> None:
    """A refused spec or task is recorded, and the same command would not measure it again."""

    def stopped() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        go_on()

    go_on()
    with pytest.raises(Interrupted, match="SIGTERM"), raising(signal.SIGTERM):
        stopped()

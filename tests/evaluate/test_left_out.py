"""Commands over several runs: which are left out, why, and the exit status."""

from __future__ import annotations

import pytest

from cllm.errors import UserError
from cllm.evaluate.left_out import LeftOut


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

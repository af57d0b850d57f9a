"""`python -m benchmarks.train` on a CPU, where its times mean nothing, and what it and benchmarks.kernels refuse."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.kernels import joint as kernel_joint
from benchmarks.kernels import table as kernel_table
from benchmarks.kernels.__main__ import main as kernels
from benchmarks.train import one_by_one
from benchmarks.train.__main__ import main
from benchmarks.train.contender import Contender
from cllm.kernels import attention, choice

TINY = {
    "model": {"vocab_size": 300, "d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32},
    "data": {"seq_len": 32},
    "train": {"micro_batch": 2, "global_batch": 2, "accelerator": "cpu", "compile": False},
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Runs the command on a tiny model: with nothing logged yet; the logger is restored."""
    for remembered in (choice.log_once, attention._choose_cached):
        remembered.cache_clear()
    logger = logging.getLogger("cllm")
    before = (logger.handlers, logger.propagate, logger.level)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    short = ["--rounds", "2", "--steps", "2", "--warmup", "1", "--out", str(tmp_path / "out.json")]
    yield lambda *arguments: main(["--config", str(file), *short, *arguments])
    logger.handlers, logger.propagate, logger.level = before


def test_designs_take_turns_and_the_numbers_say_what_was_run(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--designs", "mha", "fusedkv", "--documents", "8") in (0, None)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] == ["mha", "mha, documents", "fusedkv"]
    for row in found["rows"]:
        assert len(row["round_medians_ms"]) == 2
        assert row["tokens_per_s"] == pytest.approx(64 / row["ms"] * 1000)
        assert row["loss"] == pytest.approx(5.7, abs=0.5)
        assert row["peak_gib"] is None
    assert found["rows"][0]["time_vs_first"] == 1
    assert found["configs"]["fusedkv"]["model"]["kv"]["preset"] == "fusedkv"
    assert any("attention.backend auto chose sdpa" in line for line in found["chosen"])
    assert any("documents" in line for line in found["chosen"])
    assert "attention.backend auto chose" in capsys.readouterr().err, "told as it runs, too"


def test_one_by_one_each_design_has_a_row_beside_the_first_and_a_failure_or_the_limit_loses_no_row(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rich, step, rows = "fusedkv:keys=complex,values=matrix", Contender.step, list[str]()

    def steps(self: Contender, batch: object) -> torch.Tensor:
        if self.name == "cla":
            raise RuntimeError("no such kernel")
        if self.name == "mqa":  # the file has a row for each of those before it
            rows.extend(row["name"] for row in json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["rows"])
            monkeypatch.setattr(one_by_one.time, "monotonic", lambda: 1e12)
        return step(self, batch)

    monkeypatch.setattr(Contender, "step", steps)
    assert bench("--designs", "mha", "cla", rich, "mqa", "gqa", "--one-by-one", "--time-limit", "1e6") == 1
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert rows[:2] == ["mha", rich]
    assert [row["name"] for row in found["rows"]] == ["mha", rich, "mqa"]
    assert [len(row["round_medians_ms"]) for row in found["rows"]] == [2, 2, 2]
    assert found["failed"] == {"cla": "RuntimeError: no such kernel"}
    assert found["not_measured"] == ["gqa"]
    assert found["configs"][rich]["model"]["kv"]["values"] == "matrix"
    printed = capsys.readouterr().out
    assert "cla failed: RuntimeError: no such kernel" in printed
    assert "not measured, the time limit came first: gqa" in printed


def test_micro_batches_add_up_to_one_step_of_their_mean_gradient() -> None:
    """Plain descent, so that the weights show the gradient."""
    torch.manual_seed(0)
    model = torch.nn.Embedding(7, 7)
    before = model.weight.detach().clone()
    ids = torch.randint(7, (3, 2, 5))

    def loss(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())

    contender = Contender("a", model, loss, torch.optim.SGD(model.parameters(), lr=0.1), 1.0)
    contender.step([(part, part) for part in ids])
    after = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.copy_(before)
    (gradient,) = torch.autograd.grad(loss(ids.flatten(0, 1), ids.flatten(0, 1)), [model.weight])
    assert torch.allclose(after, before - 0.1 * gradient, atol=1e-6)
    assert not torch.equal(after, before)


def test_tokens_of_a_step_are_those_of_all_its_micro_batches(bench: Callable[..., int], tmp_path: Path) -> None:
    assert bench("--accumulate", "3") in (0, None)
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["tokens_per_step"] == 3 * 64
    assert found["settings"] == {"micro_batches": 3, "swap": False}
    (row,) = found["rows"]
    assert row["tokens_per_s"] == pytest.approx(192 / row["ms"] * 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--accumulate", "0"], "--accumulate is 0; allowed: 1 or more"),
        (["--swap"], "--swap moves contenders out of a GPU's memory"),
        (["--train.precision", "fp32"], "train.precision is fp32, and benchmarks.train times bf16"),
        (["--train.strategy", "ddp"], "train.strategy is ddp, and benchmarks.train times one device"),
        (["--data.document_mask", "true"], "data.document_mask is true"),
        (["--peers", "--model.tie_embeddings", "true"], "model.tie_embeddings of the first design is True"),
        (["--peers", "--model.qk_norm", "true"], "model.qk_norm of the first design is True"),
        (["--peers", "--model.norms_after", "true"], "model.norms_after of the first design is True"),
        (["--peers", "--model.rope.theta", "1e6"], "model.rope.theta of the first design is 1000000.0"),
        (["--one-by-one", "--documents", "8"], "--one-by-one and --documents: allowed: one of them"),
        (["--time-limit", "9"], "--time-limit is 9 without --one-by-one; allowed: both"),
        (["--designs", "mha:window"], '"window" is not of the form KEY=VALUE'),
        (["--peers", "--designs", "gqa"], "model.kv.preset of the first design is gqa"),
        (["--peers", "--train.gradient_checkpointing", "true"], "train.gradient_checkpointing of the first design"),
    ],
)
def test_what_would_be_left_out_of_account_is_refused(
    bench: Callable[..., int], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["mha", "mha, documents", "cla"])
def test_a_contender_that_does_not_fit_is_named_and_the_first_one_is_never_replaced(
    bench: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacking: str,
) -> None:
    step = Contender.step

    def full(self: object, batch: object) -> torch.Tensor:
        if self.name == lacking:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError
        return step(self, batch)

    monkeypatch.setattr(Contender, "step", full)
    status = bench("--designs", "mha", "cla", "--documents", "8")
    if lacking == "mha":
        assert status == 2
        assert "mha, which the others are compared with, does not fit" in capsys.readouterr().err
        return
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["out_of_memory"] == [lacking]
    assert [row["name"] for row in found["rows"]] == [n for n in ("mha", "mha, documents", "cla") if n != lacking]


def test_rows_of_kernels_are_written_as_they_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    times: Iterator[float | BaseException] = iter([1.5, RuntimeError("no such kernel"), 2.5, KeyboardInterrupt()])

    def time_ms(run: object) -> float:
        ms = next(times)
        if isinstance(ms, BaseException):
            raise ms
        return ms

    monkeypatch.setattr(kernel_table, "time_ms", time_ms)
    monkeypatch.setattr(kernel_table, "clocks", lambda: "during")
    table = kernel_table.Table({"matmul_flops": 1.0, "clocks": ["before"], "rows": []}, out)
    table.write()
    assert json.loads(out.read_text(encoding="utf-8"))["rows"] == []
    add = functools.partial(table.time, "mlp", "a case", bound=1.0)
    x = torch.ones(2, requires_grad=True)
    for name in ("first", "failing", "second"):
        add(name, torch.square, x)
    with pytest.raises(KeyboardInterrupt):
        add("cut off", torch.square, x)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["name"], row["ms"]) for row in found["rows"]] == [("first", 1.5), ("second", 2.5)]
    assert (found["matmul_flops"], found["clocks"]) == (1.0, ["before", "during"])
    assert "failed: no such kernel" in capsys.readouterr().out
    kernel_table.Table({}, None).add({"name": "not written"})


def test_joint_attention_and_its_merge_are_timed_beside_what_they_consist_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, at a small shape. 2 x 32 tokens of 16 heads of 64: 131,072 bytes of bf16, 4,096 of log-sum-exps."""

    def milliseconds(run: Any) -> float:
        for call in run if isinstance(run, list) else [run]:
            call()
        return 1.0

    def rand(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16).requires_grad_(grad)

    monkeypatch.setattr(kernel_table, "time_ms", milliseconds)
    monkeypatch.setattr(kernel_joint, "replayed_ms", milliseconds)
    monkeypatch.setattr(kernel_joint, "rand", rand)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    table = kernel_table.Table({"rows": []}, None)
    kernel_joint.bench_joint(table, 1e6, batch=2, length=32)
    assert [row["what"] for row in table.rows] == ["joint"] * 4 + ["merge"] * 3
    assert [row["bound_ms"] for row in table.rows[4:]] == pytest.approx([3 * (131.072 + 4.096)] * 3)
    assert "failed" not in capsys.readouterr().out


def test_bytes_that_operators_move_are_counted() -> None:
    x, row = torch.ones(4, 8), torch.ones(8, dtype=torch.bfloat16)
    assert kernel_joint.moved_bytes(lambda: x.t()[1:]) == 0
    assert kernel_joint.moved_bytes(lambda: x + row.expand(4, 8)) == 128 + 16 + 128
    assert kernel_joint.moved_bytes(lambda: x.bfloat16().sum(0)) == 128 + 64 + 64 + 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_the_kernels_are_timed_on_a_gpu_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels(["attention"]) == 2
    assert "times a GPU, and torch sees none" in capsys.readouterr().err
    assert kernels(["nosuch"]) == 2

"""A run from config to folder: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.config import Config
from cllm.data.packing import ValidationDataset
from cllm.data.store import TokenStore
from cllm.errors import EXIT_STOPPED, UserError
from cllm.kernels.cross_entropy import IGNORE
from cllm.model import attention
from cllm.model.sizes import build_decoder
from cllm.model.sources import FusedRead
from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights
from cllm.train.module import TrainingModule
from cllm.train.optim import parameter_groups
from cllm.train.resume import check_resumable
from cllm.train.run import train, with_vocabulary
from cllm.train.schedule import learning_rate_factor
from tests.ranks import train_on_ranks

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("input_ids", "labels", "positions", "document_ids")
Tiny = Callable[..., Config]


def losses(folder: RunFolder, tag: str = "train/loss") -> dict[int, float]:
    return {row["step"]: row[tag] for row in folder.metrics() if tag in row}


def final_weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return read_weights(folder.checkpoints()[-1][1])


def test_a_run_learns_and_writes_what_its_folder_promises(tiny: Tiny) -> None:
    folder = train(tiny("--train.steps", "30", "--model.kv.preset", "fusedkv", "--train.validate_every", "20"))
    validation = losses(folder, "val/loss")
    assert sorted(validation) == [0, 20, 30], "the start, every validate_every and the end are validated"
    assert validation[0] == pytest.approx(math.log(320), abs=0.2), "an untrained model guesses evenly"
    assert validation[30] < 0.8 * validation[0]
    rows = list(folder.metrics())
    assert all({"step", "tokens", "time"} <= set(row) for row in rows)
    assert rows[-1]["tokens"] == 30 * 4 * 32
    ppl = losses(folder, "val/ppl")
    assert ppl[30] == pytest.approx(math.exp(validation[30]))
    for name in ("config.yaml", "env.txt", "summary.json", "plan.png", "plan.txt"):
        assert (folder.path / name).exists(), name
    assert [step for step, _ in folder.checkpoints()] == [28, 30]
    summary = folder.summary()
    assert summary["kv_vs_mha"] == {"resident": 0.5, "read": 1.5}
    events = EventAccumulator(str(folder.tensorboard_folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "val/ppl", "val/bits_per_byte", "throughput/tokens_per_s"} <= tags
    assert {"memory/peak_gib", "kv/bytes_per_token", "hp/val_ppl", "tokens"} <= tags
    assert [e.step for e in events.Scalars("val/loss")] == [0, 20, 30]
    (picture,) = events.Images("kv/plan")
    with Image.open(folder.picture_file) as drawn:
        assert (picture.width, picture.height) == drawn.size
    assert picture.encoded_image_string == folder.picture_file.read_bytes()
    model, config, step = load_run(folder.path)
    assert step == 30
    assert config == folder.config()
    assert not model.training


@pytest.mark.parametrize("preset", ["fusedkv", "lckv"])
def test_a_run_stopped_and_resumed_ends_with_the_same_weights(tiny: Tiny, preset: str) -> None:
    # Two micro-batches a step, so that a resume in the wrong half of a step would show.
    settings = ["--model.kv.preset", preset]
    whole = train(tiny("--name", "whole", *settings))
    config = tiny("--name", "halves", *settings)
    half = train(tiny("--name", "halves", *settings))
    folder = RunFolder(half.path)
    for step, path in folder.checkpoints():
        if step > 4:
            path.unlink()  # as if the run had died between steps 4 and 8, after it had logged step 8
    resumed = train(config, resume="auto")
    found = final_weights(resumed)
    for name, tensor in final_weights(whole).items():
        assert torch.equal(tensor, found[name]), name
    assert losses(resumed) == losses(whole)
    assert losses(resumed, "val/loss") == losses(whole, "val/loss")
    assert len({row["step"] for row in resumed.metrics() if "train/loss" in row}) == 8, "no step is logged twice"


def test_batches_and_so_losses_do_not_depend_on_workers_or_accumulation(tiny: Tiny) -> None:
    alone = train(tiny("--name", "alone", "--data.num_workers", "1"))
    crowd = train(tiny("--name", "crowd", "--data.num_workers", "4"))
    assert losses(alone) == losses(crowd)
    whole = train(tiny("--name", "whole", "--train.micro_batch", "4"))
    assert losses(whole) == pytest.approx(losses(alone), rel=1e-5)


def test_with_document_masks_too_a_step_does_not_depend_on_the_micro_batch(tiny: Tiny) -> None:
    """Micro-batches have different numbers of scored tokens, and each scored token weighs the same."""
    settings = ["--data.document_mask", "true", "--train.steps", "4", "--optim.grad_clip", "null"]
    small, large = (train(tiny("--name", f"of{n}", "--train.micro_batch", n, *settings)) for n in ("1", "4"))
    for tag in ("train/loss", "train/gradient_norm"):
        assert losses(small, tag) == pytest.approx(losses(large, tag), rel=1e-5), tag


def test_gradient_checkpointing_and_bf16_run(tiny: Tiny) -> None:
    plain = train(tiny("--name", "plain", "--train.steps", "3"))
    again = train(tiny("--name", "again", "--train.steps", "3", "--train.gradient_checkpointing", "true"))
    assert losses(plain) == losses(again)
    narrow = train(tiny("--name", "narrow", "--train.steps", "3", "--train.precision", "bf16"))
    assert losses(narrow) == pytest.approx(losses(plain), rel=2e-2)
    assert all(t.dtype == torch.float32 for t in final_weights(narrow).values()), "weights stay fp32"


def test_fused_keys_and_values_may_be_made_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps, so that a run may begin to do so where it goes on."""
    regions = []
    contexts = attention._keep_kernels

    def counted() -> Any:
        regions.append(1)
        return contexts()

    monkeypatch.setattr(attention, "_keep_kernels", counted)
    settings = ["--model.kv.preset", "fusedkv", "--train.steps", "3"]
    plain = train(tiny(*settings, "--name", "plain"))
    assert not regions
    settings += ["--train.recompute_fusion", "true"]
    assert losses(plain) == losses(train(tiny(*settings, "--name", "again")))
    assert len(regions) == 3 * 2 * 2, "steps, micro-batches, layers that fuse"
    check_resumable(with_vocabulary(tiny(*settings, "--name", "plain")), plain)


def test_document_masks_and_several_validation_sets(tiny: Tiny, prepared: Path, tmp_path: Path) -> None:
    config = tiny("--data.document_mask", "true", "--train.steps", "2")
    config.data.validation = {"main": str(prepared), "second": str(prepared)}
    row = [row for row in train(config).metrics() if "val/loss" in row][-1]
    assert row["val/loss"] == row["val-second/loss"]
    assert row["val/ar_loss"] == row["val-second/ar_loss"]
    model, config, _ = load_run(tmp_path / "runs" / "tiny")
    found = []
    data = ValidationDataset(TokenStore(str(prepared), "validation"), 32, limit=6, document_mask=True)
    for sequence in map(data.__getitem__, range(6)):
        nats = model.loss(*(sequence[key][None] for key in KEYS), reduction="none").flatten().tolist()
        ids, labels, _, documents = (sequence[key].tolist() for key in KEYS)
        seen = set()
        for token, label, document, loss in zip(ids, labels, documents, nats, strict=True):
            if label != IGNORE:
                found += [loss] if (document, token, label) in seen else []
                seen.add((document, token, label))
    assert len(found) > 5
    assert row["val/ar_loss"] == pytest.approx(sum(found) / len(found), rel=1e-5)


@pytest.mark.usefixtures("warm_python")
def test_two_cpu_processes_take_the_same_steps_as_one(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("--train.steps", "3", "--name", "one")
    one = train(config)
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
    suites = '[{suite: "copying:samples=1,length=4,distances=8", every: 2}]'
    command = [sys.executable, "train.py", "--config", str(file), "--name", "two", "--train.devices", "2"]
    command += ["--evaluate_suites", suites]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = RunFolder(one.path.parent / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert list(losses(two, "suite/copying/loss")) == [2, 3], "the first process measures, the other one waits"
    for tag in ("val/loss", "val/ar_loss"):
        assert losses(two, tag) == pytest.approx(losses(one, tag), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_and_the_run_goes_on_from_there(tiny: Tiny, tmp_path: Path, number: int) -> None:
    """The loaders' processes get those that SLURM and a terminal send to all of a group, and live on."""
    config = tiny("--train.steps", "100000", "--train.checkpoint_every", "100000", "--train.validate_every", "100000")
    config.data.num_workers = 1
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "train.py", "--config", str(file)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    folder = RunFolder(Path(config.runs_dir) / config.name)
    deadline = time.monotonic() + 300
    while not any("train/loss" in row for row in folder.metrics()):
        assert running.poll() is None, running.stderr and running.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(running.pid, number)
    assert running.wait(timeout=300) == EXIT_STOPPED, running.stderr and running.stderr.read().decode()
    (step, _), *more = folder.checkpoints()
    assert not more
    assert running.stdout is not None
    assert f"run stopped at step {step} of 100000: " in running.stdout.read().decode()
    assert list(losses(folder, "val/loss")) == [0], "who is told to stop does not validate first"
    config.train.steps = step + 2
    train(config, resume="auto")
    assert folder.checkpoints()[-1][0] == step + 2


def test_a_run_goes_on_with_another_number_of_devices(tiny: Tiny, tmp_path: Path) -> None:
    """On one, two, and again one device. A step has 4 sequences, one at a time: two on each of two devices."""
    settings = ["--train.micro_batch", "1", "--train.validate_every", "2", "--optim.schedule", "constant"]
    whole = train(tiny("--name", "whole", "--train.steps", "7", *settings))
    train(tiny("--name", "moved", "--train.steps", "3", *settings))
    config = tiny("--name", "moved", "--train.steps", "5", *settings)
    train_on_ranks(2, config, tmp_path / "log.txt", resume="auto")
    moved = train(tiny("--name", "moved", "--train.steps", "7", *settings), resume="auto")
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-4)
    validation = losses(moved, "val/loss")
    assert sorted(validation) == [0, 2, 3, 4, 5, 6, 7], "the ends of the first two runs are validated too"
    wanted = losses(whole, "val/loss")
    assert {step: validation[step] for step in wanted} == pytest.approx(wanted, rel=1e-4)


def test_a_run_may_go_without_validation_and_checkpoints(tiny: Tiny) -> None:
    folder = train(tiny("--train.steps", "3", "--train.validate_every", "null", "--train.checkpoint_every", "null"))
    assert [row["step"] for row in folder.metrics() if "train/loss" in row] == [1, 2, 3]
    assert not any("val/loss" in row for row in folder.metrics())
    assert folder.checkpoints() == []


def test_a_checkpoint_that_could_not_be_finished_is_not_taken_for_one(tiny: Tiny) -> None:
    folder = train(tiny())
    partial = folder.checkpoint_path(12).with_suffix(".partial")
    partial.write_bytes(b"half a checkpoint")
    assert [step for step, _ in folder.checkpoints()] == [4, 8]


@pytest.mark.parametrize(
    ("settings", "resume", "message"),
    [
        (["--optim.lr", "2e-2"], "auto", "optim.lr is 0.02, but the run"),
        (["--model.kv.preset", "cla"], "auto", "model.kv is"),
        ([], None, "holds a run already"),
        ([], "nowhere.ckpt", "no such checkpoint"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused_and_left_alone(
    tiny: Tiny, settings: list[str], resume: str | None, message: str
) -> None:
    folder = train(tiny("--train.steps", "2"))
    before = folder.metrics_file.read_bytes()
    with pytest.raises(UserError, match=message):
        train(tiny("--train.steps", "4", *settings), resume=resume)
    assert folder.metrics_file.read_bytes() == before


def test_resuming_never_deletes_a_finished_run_without_checkpoints(tiny: Tiny) -> None:
    settings = ["--train.steps", "2", "--train.checkpoint_every", "null"]
    folder = train(tiny(*settings))
    before = folder.metrics_file.read_bytes()
    with pytest.raises(UserError, match="holds a finished run without checkpoints"):
        train(tiny(*settings), resume="auto")
    with pytest.raises(UserError, match=r"optim\.lr is 0\.02, but the run"):
        train(tiny(*settings, "--optim.lr", "2e-2"), resume="auto")
    with pytest.raises(UserError, match="--resume auto goes on with a run and --overwrite replaces it"):
        train(tiny(*settings), resume="auto", overwrite=True)
    assert folder.metrics_file.read_bytes() == before
    lines = before.splitlines(keepends=True)
    folder.metrics_file.write_bytes(b"".join(line for line in lines if b'"step": 2' not in line))
    train(tiny(*settings), resume="auto")  # as if it had died in its second step
    assert sorted(losses(folder)) == [1, 2]


def test_overwrite_replaces_a_run(tiny: Tiny) -> None:
    train(tiny("--train.steps", "4"))
    folder = train(tiny("--train.steps", "2"), overwrite=True)
    assert [step for step, _ in folder.checkpoints()] == [2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.vocab_size", "100"], "model.vocab_size 100 is less than"),
        (["--data.path", "nowhere"], "nowhere"),
        (["--train.micro_batch", "4", "--train.devices", "3"], "global_batch 4 is not a multiple"),
        (["--data.seq_len", "31", "--model.max_seq_len", "31", "--data.path", "tests"], "tests"),
    ],
)
def test_mistakes_are_refused_before_a_folder_appears(tiny: Tiny, settings: list[str], message: str) -> None:
    config = tiny(*settings)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (Path(config.runs_dir) / config.name).exists()


# ---- gradients that are not finite ----------------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes one number of one gradient NaN in these steps (from 1), in the first of their micro-batches."""
    micro_batches = itertools.count()
    first = {2 * (step - 1) for step in steps}

    def after_backward(self: TrainingModule) -> None:
        if next(micro_batches) in first:
            self.model.blocks[0].mlp.down_proj.weight.grad[0, 0] = torch.nan

    monkeypatch.setattr(TrainingModule, "on_after_backward", after_backward)


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_step_without_a_finite_gradient_changes_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    settings = ["--optim.grad_clip", clip, "--train.keep_checkpoints", "9", "--train.checkpoint_every", "1"]
    poison(monkeypatch, {4})
    folder = train(tiny("--train.steps", "5", "--train.max_skipped_steps", "1", *settings))
    assert losses(folder, "train/skipped_steps") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 1}
    assert losses(folder, "train/gradient_norm")[4] is None
    saved = [torch.load(path, weights_only=True) for _, path in folder.checkpoints()]
    before, after, last = saved[2:]
    for name, tensor in after["state_dict"].items():
        assert torch.equal(tensor, before["state_dict"][name]), name
        assert last["state_dict"][name].isfinite().all()
        assert not torch.equal(tensor, last["state_dict"][name]), "and the next step goes on"
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (before, after)]
    for n, state in states[1].items():
        assert all(torch.equal(tensor, states[0][n][name]) for name, tensor in state.items())


def test_too_many_skipped_steps_stop_the_run_and_are_counted_over_a_resume(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {2, 3})
    settings = ["--train.max_skipped_steps", "2", "--train.log_every", "2"]
    train(tiny("--train.steps", "4", *settings))
    poison(monkeypatch, {1})
    with pytest.raises(UserError, match=r"3 steps up to step 6 .*max_skipped_steps is 2; the newest .*step-00000004"):
        train(tiny("--train.steps", "8", *settings), resume="auto")


def test_a_run_that_diverges_is_stopped(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"11 steps up to step \d+ had a gradient that was not finite"):
        train(tiny("--optim.lr", "1e30", "--optim.grad_clip", "null", "--train.steps", "50"))


def test_the_command_line_answers_a_mistake_with_one_line_and_status_2() -> None:
    command = [sys.executable, "train.py", "--config", "configs/quickstart.yaml", "--model.kv.preset", "nosuch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "model.kv.preset" in done.stderr
    assert "nearest:" in done.stderr


# ---- optimizer ------------------------------------------------------------------------------------------------------


def test_fusion_weights_have_no_decay_and_a_rate_of_their_own(tiny: Tiny) -> None:
    config = tiny("--model.kv.preset", "fusedkv", "--model.vocab_size", "320", "--optim.fusion_lr_multiplier", "5")
    model = build_decoder(config.model)
    groups = {group["name"]: group for group in parameter_groups(model, config.optim)}
    fused = [m.weight for m in model.modules() if isinstance(m, FusedRead)]
    assert len(fused) == 4  # two layers, keys and values
    assert {id(p) for p in groups["fusion"]["params"]} == {id(p) for p in fused}
    assert groups["fusion"]["weight_decay"] == 0
    assert groups["fusion"]["lr"] == pytest.approx(5 * config.optim.lr)
    assert all(p.ndim == 1 for p in groups["no_decay"]["params"])
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


def test_learning_rates_follow_their_schedule(tiny: Tiny) -> None:
    optim = tiny("--optim.warmup_steps", "10", "--optim.lr", "1.0", "--optim.min_lr", "0.1").optim

    def rate(step: int) -> float:
        return learning_rate_factor(step, 111, optim)

    assert rate(0) == pytest.approx(0.1)
    assert rate(9) == pytest.approx(1)
    assert rate(60) == pytest.approx(0.55)  # half-way down the cosine
    assert rate(110) == pytest.approx(0.1)
    optim.schedule = "linear"
    assert rate(60) == pytest.approx(0.55)
    assert rate(35) == pytest.approx(0.775)
    optim.schedule = "wsd"
    assert rate(88) == pytest.approx(1)
    assert rate(110) == pytest.approx(0.1)
    assert rate(99) == pytest.approx(0.1 + 0.9 * 11 / 21, abs=1e-6)
    optim.schedule = "constant"
    assert rate(110) == 1


def test_the_logged_learning_rate_is_the_one_of_the_step(tiny: Tiny) -> None:
    config = tiny("--train.steps", "6")
    rates = losses(train(config), "train/lr")
    assert rates == {n: pytest.approx(config.optim.lr * learning_rate_factor(n - 1, 6, config.optim)) for n in rates}


def test_metrics_rows_are_json_without_nan(tiny: Tiny) -> None:
    folder = train(tiny("--train.steps", "2"))
    for line in folder.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in metrics.jsonl"))

"""Runs that start from another model: what they say, what moves, how they resume, what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._dynamo.testing import CompileCounterWithBackend

from cllm.config import Config
from cllm.config.load import validate
from cllm.data.module import DataModule
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights
from cllm.train.dryrun import GIB, dry_run, memory_estimate
from cllm.train.launch import Launch
from cllm.train.probes import Probe
from cllm.train.run import train, with_vocabulary
from cllm.train.uptraining import UptrainingModule, draw_route
from cllm.uptrain import loss as losses
from cllm.uptrain.complete import load_config
from cllm.uptrain.decoder import build_traced
from cllm.uptrain.trainable import make_trainable
from tests.ranks import train_on_ranks

ROOT = Path(__file__).resolve().parents[2]
LOSS = ("--uptrain.loss.kl", "1.0", "--uptrain.loss.hidden", "1.0")
NOTHING: tuple[str, ...] = ("--init.from", "null", "--init.calibration_sequences", "32", "--model.d_model", "32")
NOTHING += ("--model.n_layers", "4", "--model.n_heads", "2")
"""A model that starts from nothing."""
Student = Callable[..., Config]


@pytest.fixture(scope="module")
def teacher(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every layer owns."""
    folder = tmp_path_factory.mktemp("teacher")
    data = {
        "name": "teacher",
        "runs_dir": str(folder),
        "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32, "init": {"std": 0.2}},
        "data": {"path": str(prepared), "seq_len": 32, "num_workers": 0, "validation_sequences": 6},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
        "train": {"steps": 30, "global_batch": 4, "micro_batch": 4, "accelerator": "cpu", "log_every": 10},
    }
    return train(validate(Config, data)).path


@pytest.fixture
def student(tiny: Callable[..., Config], teacher: Path, tmp_path: Path) -> Student:
    """`student("fusedkv", "--init.method", "fit")`: a config of a run that starts from `teacher`."""
    data = tiny().as_yaml_data()
    del data["model"]
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(data | {"name": "student"}), encoding="utf-8")
    start = ["--init.from", str(teacher), "--init.calibration_sequences", "4"]
    return lambda preset, *more: load_config([file], [*start, "--model.kv.preset", preset, *more])


def rows(folder: RunFolder, tag: str) -> dict[int, float]:
    return {row["step"]: row[tag] for row in folder.metrics() if tag in row}


def final(folder: RunFolder) -> dict[str, torch.Tensor]:
    return read_weights(folder.checkpoints()[-1][1])


def test_with_the_plan_unchanged_the_student_is_the_teacher(student: Student, teacher: Path) -> None:
    folder = train(
        student("mha", *LOSS, "--uptrain.loss.hidden_layers", "all", "--optim.lr", "1e-12", "--optim.min_lr", "0.0")
    )
    assert rows(folder, "val/loss")[0] == rows(folder, "val/teacher_loss")[0]
    assert rows(folder, "train/kl")[1] == 0
    assert rows(folder, "train/hidden")[1] == 0
    assert not rows(folder, "val/recovery"), "there is no gap to recover"
    ids = torch.randint(0, 320, (2, 32))
    model, theirs = load_run(folder.path)[0], load_run(teacher)[0]
    torch.testing.assert_close(model(ids), theirs(ids), atol=1e-5, rtol=1e-5)


def test_a_run_tells_the_line_to_reach_its_start_and_its_recovery(student: Student, teacher: Path) -> None:
    folder = train(student("fusedkv", *LOSS, "--train.steps", "20", "--train.validate_every", "10"))
    reached, start, now = (rows(folder, f"val/{name}") for name in ("teacher_loss", "start_loss", "loss"))
    assert set(reached) == set(now) == {0, 10, 20}
    assert len(set(reached.values())) == 1
    assert reached[0] == pytest.approx(list(rows(RunFolder(teacher), "val/loss").values())[-1], abs=1e-6)
    assert set(start.values()) == {now[0]}
    recovery = rows(folder, "val/recovery")
    assert recovery[0] == 0
    assert recovery[20] == pytest.approx(100 * (start[0] - now[20]) / (start[0] - reached[0]))
    assert now[20] < now[0]
    events = EventAccumulator(str(folder.tensorboard_folder))
    events.Reload()
    assert {"val/teacher_loss", "val/recovery", "train/kl", "train/hidden", "train/objective"} <= set(
        events.Tags()["scalars"]
    )
    parts = (rows(folder, f"train/{name}") for name in ("objective", "kl", "hidden", "loss"))
    for objective, kl, hidden, loss in zip(*(part.values() for part in parts), strict=True):
        assert objective == pytest.approx(kl + hidden + loss, rel=1e-5)
    assert folder.summary()["kv_vs_mha"]["resident"] == 0.5


def test_fit_starts_below_copy_and_copy_below_a_random_start(student: Student) -> None:
    losses = {
        method: rows(
            train(student("fusedkv", "--init.method", method, "--train.steps", "1", "--name", method)), "val/loss"
        )[0]
        for method in ("copy", "fit")
    }
    assert losses["fit"] < losses["copy"] < math.log(320)


KV = {"q_proj", "k_proj", "v_proj", "keys", "values", "q_norm", "k_norm"}


TRAINED = {"slots": KV - {"q_proj", "q_norm"}, "kv": KV, "attention": KV | {"o_proj"}}


@pytest.mark.parametrize(
    ("preset", "trainable"),
    [("fusedkv", way) for way in ("kv", "lora", "attention")] + [("cla", way) for way in ("kv", "lora", "slots")],
)
def test_what_is_frozen_does_not_move_and_what_is_not_does(student: Student, preset: str, trainable: str) -> None:
    settings = [*LOSS, "--uptrain.trainable", trainable, "--optim.weight_decay", "0.5"]
    settings += ["--uptrain.loss.attention", "1.0"] if trainable == "attention" else []
    folder = train(student(preset, *settings, "--train.checkpoint_every", "2", "--train.keep_checkpoints", "9"))
    first, last = read_weights(folder.checkpoints()[0][1]), final(folder)
    linears = KV | {"o_proj", "gate_proj", "up_proj", "down_proj"}
    for name, before in first.items():
        part = name.split(".")[-2]
        owner_norm = ".owner.norm." in name
        if trainable in TRAINED:
            moves = part in TRAINED[trainable] or owner_norm
        else:
            moves = part in linears and "norm" not in part and name != "head.weight"
        assert torch.equal(before, last[name]) != moves, name
    assert bool(rows(folder, "train/attention")) == (trainable == "attention")


def test_lora_checkpoints_hold_the_merged_weights(student: Student) -> None:
    probed = {}

    def keep(decoder: Decoder, step: int) -> dict[str, float]:
        probed.update({name: tensor.clone() for name, tensor in decoder.state_dict().items()})
        return {}

    settings = [*LOSS, "--uptrain.trainable", "lora", "--uptrain.lora.rank", "2"]
    folder = train(student("fusedkv", *settings), probes=[Probe(name="suite/x", every=8, measure=keep)])
    model, config, _ = load_run(folder.path)
    assert probed.keys() == model.state_dict().keys()
    assert all(tensor.equal(probed[name]) for name, tensor in model.state_dict().items()), "a probe sees them too"
    assert not any("lora" in name for name, _ in model.named_parameters())
    data = DataModule(config.data.path, seq_len=32, micro_batch=2, global_batch=4, validation_sequences=6)
    nats = scored = 0.0
    for batch in data.val_dataloader()[0]:
        nats += model.loss(batch["input_ids"], batch["labels"], reduction="sum").item()
        scored += int((batch["labels"] != -100).sum())
    assert nats / scored == pytest.approx(rows(folder, "val/loss")[8], rel=1e-5)


def test_a_curriculum_with_lora_leaves_a_checkpoint_that_loads(student: Student) -> None:
    settings = ["--uptrain.trainable", "lora", "--uptrain.lora.rank", "2", "--uptrain.curriculum_steps", "4"]
    folder = train(student("fusedkv", *LOSS, *settings))
    assert load_run(folder.path)[0].state_dict().keys() == final(folder).keys()


@pytest.mark.parametrize("validating", [True, False])
def test_a_teacher_that_nothing_asks_is_let_go(student: Student, monkeypatch, validating: bool) -> None:
    held: list[int] = []
    step = UptrainingModule.training_step

    def counted(self: UptrainingModule, *batch: Any) -> torch.Tensor:
        held.append(len(self._teacher))
        return step(self, *batch)

    monkeypatch.setattr(UptrainingModule, "training_step", counted)
    folder = train(student("fusedkv", *([] if validating else ["--train.validate_every", "null"])))
    if validating:
        folder.checkpoints()[-1][1].unlink()
        train(student("fusedkv"), resume="auto")
        assert list(rows(folder, "val/recovery")) == [0, 4, 8]
    assert set(held) == {0}
    train(student("fusedkv", *LOSS, "--name", "distilled", "--train.steps", "1", "--train.validate_every", "null"))
    assert held[-1] == 1


HANDOVER = ("cla", "--model.kv.factor", "4", "--uptrain.curriculum_mix", "outputs")
WAYS = {
    "distilled": ["fusedkv", *LOSS, "--uptrain.trainable", "kv"],
    "all layers": ["cla", *LOSS, "--uptrain.loss.hidden_layers", "all"],
    "lora": ["fusedkv", *LOSS, "--uptrain.trainable", "lora"],
    "curriculum": ["fusedkv", *LOSS, "--uptrain.curriculum_steps", "6"],
    "handover": [*HANDOVER, *LOSS, "--uptrain.curriculum_steps", "6", "--uptrain.curriculum_order", "top"],
    "attention": ["fusedkv", *LOSS, "--uptrain.loss.attention", "4.0"],
    "random sources": ["mha", "--uptrain.random_sources", "0.5"],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_stopped_and_resumed_ends_with_the_same_weights(student: Student, way: str) -> None:
    tags = ("train/loss", "train/objective", "val/loss", "val/recovery", "val/teacher_loss")
    folder = train(student(*WAYS[way]))
    whole, written = final(folder), {tag: rows(folder, tag) for tag in tags}
    for step, path in folder.checkpoints():
        if step > 4:
            path.unlink()  # as if the run had died between steps 4 and 8, after it had logged step 8
    resumed = train(student(*WAYS[way]), resume="auto")
    assert list(written["train/loss"]) == [*range(1, 9)]
    again = final(resumed)
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
    for tag in tags:
        assert rows(resumed, tag) == written[tag], tag


def test_what_was_summed_since_the_last_row_survives_a_resume(student: Student) -> None:
    """Checkpoints after 2 and 4 steps lie between rows after 3 and 6."""
    settings = [*LOSS, "--train.steps", "6", "--train.log_every", "3", "--train.validate_every", "2"]
    settings += ["--train.checkpoint_every", "2", "--train.keep_checkpoints", "9"]
    whole = train(student("fusedkv", *settings, "--name", "whole"))
    again = train(student("fusedkv", *settings, "--name", "again"))
    for step in (4, 2):
        train(student("fusedkv", *settings, "--name", "again"), resume=str(again.checkpoint_path(step)))
        for tag in ("train/objective", "train/kl", "train/hidden", "train/loss", "val/loss", "val/recovery"):
            assert rows(again, tag) == rows(whole, tag), (step, tag)
            assert len(rows(again, tag)) == (2 if tag.startswith("train") else 4)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "handover"])
def test_recomputing_blocks_changes_nothing(student: Student, way: str) -> None:
    settings = [*WAYS[way], "--train.steps", "6" if way == "curriculum" else "3"]
    plain = train(student(*settings, "--name", "plain"))
    again = train(student(*settings, "--name", "again", "--train.gradient_checkpointing", "true"))
    assert rows(plain, "train/objective") == rows(again, "train/objective")
    weights = final(again)
    for name, tensor in final(plain).items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("way", ["all layers", "attention", "lora", "curriculum", "handover", "random sources"])
def test_compiled_blocks_take_the_same_steps(student: Student, monkeypatch, way: str) -> None:
    settings = [*WAYS[way], "--train.gradient_checkpointing", "true" if way == "all layers" else "false"]
    plain = train(student(*settings, "--name", "plain"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    count = CompileCounterWithBackend("aot_eager")
    compile_module, compile_function = torch.nn.Module.compile, torch.compile

    def compile_by_count(module: torch.nn.Module, *, dynamic: bool, options: object = None) -> None:
        compile_module(module, dynamic=dynamic, backend=count)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_by_count)
    monkeypatch.setattr(losses, "_compiled", lambda: compile_function(losses.compare_logits, backend="aot_eager"))
    fast = train(student(*settings, "--name", "fast", "--train.compile", "true"))
    assert count.frame_count
    assert not torch._dynamo.utils.counters["graph_break"]
    for tag in ("train/objective", "val/loss", "val/teacher_loss"):
        assert rows(fast, tag) == pytest.approx(rows(plain, tag), rel=1e-4), tag
    torch._dynamo.reset()


def test_a_curriculum_begins_at_the_teacher_and_ends_at_the_plan(student: Student) -> None:
    still = ["--optim.lr", "1e-12", "--optim.min_lr", "0.0", *LOSS, "--uptrain.loss.hidden_layers", "all"]
    folder = train(student("fusedkv", *still, "--uptrain.curriculum_steps", "5", "--name", "curriculum"))
    plain = train(student("fusedkv", *still, "--name", "plain"))
    away, without = rows(folder, "train/kl"), rows(plain, "train/kl")
    assert away[1] < 1e-10, "with λ = 0 the student computes what the teacher does"
    assert 0 < away[2] < away[4] < without[4]
    for step in (6, 7, 8):  # λ = 1 from the sixth step, which is step 5 counted from 0
        assert away[step] == without[step]
    assert rows(folder, "val/loss")[0] == rows(plain, "val/loss")[0], "evaluation reads what the plan says"
    assert not any("curriculum" in name for name in final(folder))


def test_a_curriculum_goes_with_turned_heads(student: Student) -> None:
    settings = ["--init.method", "fit", "--init.align", "turn", "--uptrain.curriculum_steps", "1", *LOSS]
    folder = train(student("fusedkv", *settings, "--optim.lr", "1e-12", "--optim.min_lr", "0.0", "--train.steps", "1"))
    assert rows(folder, "train/kl")[1] < 1e-9


def test_random_sources_train_a_model_that_bears_sharing(student: Student, tmp_path: Path) -> None:
    """What sharing costs it is less than half of what it costs one trained without: six seeds of six agreed."""
    settings = ["--train.steps", "40", "--train.validate_every", "40", "--train.checkpoint_every", "40"]
    routed = train(student("mha", "--name", "routed", "--uptrain.random_sources", "0.5", *settings))
    plain = train(student("mha", "--name", "plain", *settings))
    costs = {}
    for run in (routed, plain):
        shared = student(
            "fusedkv_lite", "--init.from", str(run.path), "--name", f"{run.name}-lite", "--train.steps", "1"
        )
        costs[run.name] = rows(train(shared), "val/loss")[0] - rows(run, "val/loss")[40]
    assert costs["routed"] < costs["plain"] / 2


def test_routes_are_drawn_anew_each_step_and_lead_to_owners_below() -> None:
    routes = [draw_route(12, 0.5, 0, step) for step in range(200)]
    assert routes == [draw_route(12, 0.5, 0, step) for step in range(200)]
    assert len({tuple(route) for route in routes}) > 150
    for route in routes:
        assert all(t == i or (t < i and route[t] == t) for i, t in enumerate(route))
    shared = sum(t != i for route in routes for i, t in enumerate(route) if i)
    assert shared / (200 * 11) == pytest.approx(0.5, abs=0.05)


def test_two_cpu_processes_take_the_same_steps_as_one(student: Student, tmp_path: Path) -> None:
    # Frozen parameters, and owners whose slot nobody reads in a step: both are what DDP stumbles on.
    settings = [*LOSS, "--uptrain.trainable", "kv", "--uptrain.random_sources", "0.5", "--train.steps", "3"]
    config = student("mha", *settings, "--name", "one")
    one = train(config)
    train_on_ranks(2, student("mha", *settings, "--name", "two"), tmp_path / "log.txt")
    two = RunFolder(one.path.parent / "two")
    for tag in ("train/objective", "val/loss", "val/teacher_loss"):
        assert rows(two, tag) == pytest.approx(rows(one, tag), rel=1e-4), tag


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["fusedkv", "--model.kv.n_kv_heads", "1", "--init.method", "svd"], "init.method is svd"),
        (["mha", "--uptrain.curriculum_steps", "4"], "uptrain.curriculum_steps: no layer"),
        (["fusedkv", "--uptrain.random_sources", "0.5"], "uptrain.random_sources: layer 2"),
        (["mha", "--uptrain.curriculum_steps", "4", "--uptrain.curriculum_mix", "outputs"], "every layer of model.kv"),
        (["fusedkv", "--init.method", "ridge"], "no layer of model.kv shares"),
        (["yoco", "--model.kv.lower", "retention"], "layer 0 has a recurrent state"),
    ],
)
def test_what_does_not_go_together_is_refused(student: Student, settings, message) -> None:
    config = student(*settings)
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (Path(config.runs_dir) / config.name).exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--uptrain.curriculum_steps", "4", "--uptrain.random_sources", "0.5"], "allowed: one of them"),
        (["--uptrain.curriculum_steps", "4", "--init.method", "fit"], "init.align is map"),
        (["--uptrain.curriculum_steps", "4", "--init.heads", "merge"], "init.heads is merge"),
        (["--uptrain.curriculum_order", "top"], "curriculum_order is top, but uptrain.curriculum_steps is 0"),
        (["--uptrain.curriculum_mix", "outputs"], "curriculum_mix is outputs, but uptrain.curriculum_steps is 0"),
        (
            [
                "--uptrain.curriculum_steps",
                "4",
                "--uptrain.curriculum_mix",
                "outputs",
                "--uptrain.loss.attention",
                "1.0",
            ],
            "allowed: one of the two",
        ),
        (["--init.heads", "merge", "--init.calibration_sequences", "0"], "heads is merge, but"),
        (["--optim.rates.kv", "0.0"], "optim.rates.kv"),
        (["--init.method", "fit", "--init.calibration_sequences", "0"], "calibration_sequences is 0"),
        (["--uptrain.loss.next_token", "0.0"], "are all 0"),
        (["--uptrain.curriculum_steps", "9"], "curriculum_steps is 9, but train.steps is 8"),
        ([*NOTHING, "--init.method", "fit"], "init.method is 'fit', but init.from is null"),
        ([*NOTHING, *LOSS], "uptrain: is set, but init.from is null"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(student: Student, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        student("fusedkv", *settings)


def test_a_dry_run_counts_what_is_trained_and_the_teacher(student: Student, teacher: Path) -> None:
    theirs = sum(p.numel() for p in load_run(teacher)[0].parameters())
    found = {}
    for trainable in ("all", "kv", "lora"):
        config = with_vocabulary(student("fusedkv", *LOSS, "--uptrain.trainable", trainable))
        model = build_traced(config.model)
        whole = sum(p.numel() for p in model.parameters())
        make_trainable(model, config)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        report = dry_run(config)
        assert f"trained      {trained:,} (uptrain.trainable {trainable})" in report
        assert f"teacher      {theirs:,} parameters" in report
        assert f"parameters   {whole:,} (" in report
        memory = memory_estimate(model, config, Launch.planned(config), teacher=theirs)
        assert memory["optimizer"] == 8 * trained / GIB
        assert memory["teacher"] == 4 * theirs / GIB, "fp32 on a CPU"
        found[trainable] = memory["total"]
    assert found["kv"] < found["all"]
    assert "teacher" not in dry_run(with_vocabulary(student("fusedkv")))


def test_a_run_does_not_start_from_itself_and_a_teacher_that_shares_keeps_its_plan(student: Student) -> None:
    folder = train(student("cla", "--train.steps", "1"))
    with pytest.raises(UserError, match="is the folder of this run"):
        train(student("cla", "--init.from", str(folder.path)), overwrite=True)
    assert folder.checkpoints()
    with pytest.raises(UserError, match="layer 1 of the model to start from owns nothing and reads keys and values of"):
        train(student("fusedkv", "--init.from", str(folder.path), "--name", "other"))
    on = train(student("cla", "--init.from", str(folder.path), "--name", "further", "--train.steps", "1"))
    assert rows(on, "val/loss")[0] == rows(folder, "val/loss")[1]

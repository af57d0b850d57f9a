"""Students by share of the cache: bytes, recipes as configs, tables, and a tiny study from the teacher to its seeds."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm.config import Config, ModelConfig
from cllm.config.load import validate
from cllm.errors import EXIT_STOPPED, UserError
from cllm.files import mark
from cllm.runs import RUN, RunFolder
from cllm.uptrain.teacher import student_model
from experiments.half_cache import scratch
from experiments.half_cache.configs import Setting, check_config, student_data
from experiments.half_cache.runner import Devices, Experiment, table
from experiments.half_cache.settings import check_same
from experiments.half_cache.students import (
    KINDS,
    RECIPES,
    Shape,
    Student,
    check_bytes,
    with_seeds,
)

TEACHERS = {
    "110m": ModelConfig(d_model=768, n_layers=12, n_heads=12, vocab_size=16384, d_ff=2048, max_seq_len=1024),
    "smollm2": ModelConfig.model_validate(
        {
            **{"d_model": 576, "n_layers": 30, "n_heads": 9, "vocab_size": 49152, "d_ff": 1536, "max_seq_len": 2048},
            "kv": {"preset": "gqa", "n_kv_heads": 3},
        }
    ),
}


IMPOSSIBLE = {("110m", "xmla"), ("110m", "xmla4_4"), ("smollm2", "gqa_4"), ("smollm2", "kv_tie_8")}
"""Latents whose rank would exceed the model's width; a quarter of 3 KV heads."""


@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_student_caches_more_than_its_share(teacher: str) -> None:
    model = TEACHERS[teacher]
    shape = Shape.of(model, Path("teacher"))
    possible = {name: kind for name, kind in KINDS.items() if (teacher, name) not in IMPOSSIBLE}
    shares = {name: check_bytes(Student(name), model, shape, Path("teacher")) for name in possible}
    for name, kind in possible.items():
        if kind.saves_cache:
            assert float(kind.share) / 2 <= shares[name] <= float(kind.share) + 1e-3, name
    assert shares["control"] == 1
    if teacher == "110m":  # by hand: 12 layers of 12 heads
        assert shares["cla4"] == shares["gqa_4"] == shares["cla2_gqa"] == shares["fusedkv_4"] == 1 / 4
        assert shares["acrosskv"] == 6 / 12
        assert shares["mla_4"] == pytest.approx((352 + 32) / (2 * 768))


def test_a_plan_with_more_than_its_share_is_refused() -> None:
    model = TEACHERS["110m"].model_copy(update={"n_layers": 3})
    with pytest.raises(
        UserError, match=r"--students cla4: caches 0.333 .* 3 layers and 12 KV heads; allowed: up to 1/4"
    ):
        check_bytes(Student("cla4"), model, Shape.of(model, Path("teacher")), Path("teacher"))


def test_every_recipe_is_a_config(tmp_path: Path) -> None:
    model = TEACHERS["110m"]
    shape = Shape.of(model, Path("teacher"))
    overrides: dict[str, dict[str, Any]] = {"optim": {"lr": 2e-4}, "train": {"global_batch": 4, "micro_batch": 4}}
    setting = Setting(tmp_path, tmp_path, tmp_path, shape, 409_600, gpu=False, validations=2, overrides=overrides)

    def config(name: str) -> Config:
        student = Student.parse(name)
        data = student_data(student, student.starts(["fit"])[0], setting)
        data["model"] = student_model(model, KINDS[student.kind].plan(shape), rope_pairs="uniform")
        return validate(Config, data)

    plain = config("cla4")
    assert plain.train.steps == 100
    for name in RECIPES:
        for kind in ("cla4", "mla_4", "gqa_4", "control"):
            merged = kind == "gqa_4" and name != "mean_heads"
            assert config(f"{kind}+{name}").init.heads == ("merge" if merged else "mean")
        assert config(f"cla4+{name}") != plain or name == "mean_heads"
    both = config("cla4+top+half_batch+twice_rate+fast_kv")
    assert (both.optim.lr, both.optim.min_lr, both.optim.rates.kv) == (4e-4, 4e-5, 3)
    assert (both.train.global_batch, both.train.steps, both.uptrain.curriculum_steps) == (2, 200, 100)
    assert (config("cla4+long_warmup").optim.warmup_steps, plain.optim.warmup_steps) == (30, 10)
    assert Student.parse("cla4+top-s12") == Student("cla4", ("top",), 12)
    assert Student("cla4", ("top",), 12).name == "cla4.top-s12"
    names = [s.name for s in with_seeds([Student.parse("cla4"), Student.parse("cla2-s1")], 2)]
    assert names == ["cla4", "cla2-s1", "cla4-s1", "cla2-s2"]
    seeds = [student_data(Student("cla4", (), seed), "fit", setting)["train"]["seed"] for seed in (0, 3)]
    assert seeds == [0, 3]
    for name, message in (("cla3", "--students cla3: allowed: control"), ("cla4+x", r"recipe x: allowed: plain")):
        with pytest.raises(UserError, match=message):
            Student.parse(name)


def test_all_students_of_the_default_command_can_be_trained(tmp_path: Path) -> None:
    model = TEACHERS["110m"]
    shape = Shape.of(model, Path("teacher"))
    setting = Setting(tmp_path, tmp_path, tmp_path, shape, 409_600, gpu=True, validations=2, overrides={})
    shares = []
    for student in map(Student.parse, scratch.AGENDA):
        shares.append(check_bytes(student, model, shape, tmp_path))
        check_config(student, student_data(student, student.starts(["fit"])[0], setting), model)
    assert shares[0] == 1
    assert all(share <= 1 / 4 for share in shares[1:4]), "a quarter first"


def test_a_student_goes_on_with_the_settings_that_it_began_with(tmp_path: Path) -> None:
    shape, begun = Shape.of(TEACHERS["110m"], Path("teacher")), tmp_path / "gqa.yaml"

    def config(start: str, tokens: int = 409_600, lr: float = 2e-4) -> dict[str, Any]:
        overrides: dict[str, dict[str, Any]] = {"optim": {"lr": lr}}
        setting = Setting(tmp_path, tmp_path, tmp_path, shape, tokens, gpu=False, validations=2, overrides=overrides)
        return student_data(Student("gqa"), start, setting)

    begun.write_text(yaml.safe_dump(config("fit")))
    old = yaml.safe_load(begun.read_text())
    check_same(old, config("fit+outputs"), begun)
    check_same({**old, "init": {**old["init"], "from": "moved"}}, config("fit"), begun)
    with pytest.raises(UserError, match=r"gqa.yaml: has train.steps \d+, and this command \d+; .* another --out"):
        check_same(old, config("fit", tokens=819_200), begun)
    with pytest.raises(UserError, match=r"has optim.lr 0\.0002, and this command 0\.0004"):
        check_same(old, config("fit", lr=4e-4), begun)
    check_same(old, config("fit", tokens=819_200, lr=4e-4), begun, start=True)
    fewer = {**old, "init": {**old["init"], "calibration_sequences": 3}}
    check_same(fewer, config("fit"), begun)
    with pytest.raises(UserError, match=r"has init\.calibration_sequences 3, and"):
        check_same(fewer, config("fit"), begun, start=True)
    with pytest.raises(UserError, match="--starts svd: gqa has no latents; allowed for it: copy, fit,"):
        Student("gqa").starts(["svd"])


def test_the_table_has_a_line_for_the_seeds_of_a_student() -> None:
    def row(kind: str, loss: float, share: float, seed: int = 0, **more: Any) -> dict[str, Any]:
        losses = {"loss": loss, "teacher_loss": 4.0, "start_loss": 4.4, "above_teacher_percent": 100 * (loss / 4 - 1)}
        return {"kind": kind, "recipes": [], "seed": seed, "share": share, "finished": True, **losses, **more}

    rows = [row("cla4", 4.1, 0.25), row("gqa_4", 4.04, 0.25), row("control", 3.96, 1.0), row("cla4", 4.2, 0.25, 1)]
    rows.append(row("cla2", 4.0, 0.5, finished=False))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(rows).splitlines()[2:]]
    assert lines == [
        ["control", "", "1.000", "1", "10.00", "-1.00", "", ""],
        ["gqa_4", "", "0.250", "1", "10.00", "1.00", "", "2.02"],
        ["cla4", "", "0.250", "2", "10.00", "3.75", "2.50 to 5.00", "4.80"],
    ]


def test_a_tiny_study_stops_goes_on_and_repeats_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place of `train.py`, a function writes a folder with losses."""
    draw, words = random.Random(0), ("keys", "and", "values", "come", "from", "the", "layer", "named")
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=60))}) for _ in range(300)]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(lines), encoding="utf-8")
    out, ran = tmp_path / "out", []
    losses = {"teacher": 4.0, "control": 3.9, "cla2": 4.05, "fusedkv": 4.02, "cla4": 4.2}

    def run(devices: Any, command: list[str | Path], name: str, step: str, device: int | None) -> bool:
        ran.append(name)
        if len(ran) == 3:  # time is up
            devices.deadline = 0.0
            return False
        data = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text(encoding="utf-8"))
        folder = RunFolder(Path(data["runs_dir"]) / data["name"])
        folder.checkpoint_folder.mkdir(parents=True)
        mark(folder.path, RUN)
        if name == "teacher":
            shape = {**data["model"], "vocab_size": 300, "head_dim": 16}
            (folder.path / "config.yaml").write_text(yaml.safe_dump({**data, "model": shape}), encoding="utf-8")
        loss = losses[name.split("-")[0]]
        row = {"step": data["train"]["steps"], "val/loss": loss, "val/teacher_loss": 4.0}
        folder.metrics_file.write_text(json.dumps(row | {"step": 0}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
        return True

    monkeypatch.setattr("experiments.half_cache.runner.Devices.run", run)
    command = ["--tiny", "--corpus", str(corpus), "--out", str(out), "--device", "cpu", "--seeds", "2"]
    command += ["--students", "control", "cla2", "fusedkv", "cla4"]
    assert scratch.main(command) == EXIT_STOPPED
    assert ran == ["teacher", "control", "cla2"]
    assert scratch.main(command) == 0
    assert ran[3:] == ["cla2", "fusedkv", "cla4", "fusedkv-s1", "cla4-s1", "control-s1"]
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = results["students"]
    assert len(rows) == 7
    assert re.fullmatch(r"mha of [0-9.]+k, 102\.4k tokens", results["name"])
    # by hand: 4 layers of keys and values, 32 channels, two bytes
    assert {(row["kind"], row["bytes_per_token"], row["teacher_bytes_per_token"]) for row in rows} == {
        ("control", 512, 512), ("cla2", 256, 512), ("fusedkv", 256, 512), ("cla4", 128, 512)
    }  # fmt: skip
    kept = [path.name for path in sorted((out / "runs").iterdir()) if RunFolder(path).checkpoint_folder.exists()]
    assert not kept, "checkpoints of finished students are deleted"
    assert RunFolder(out / "teacher").checkpoint_folder.exists()
    assert "| fusedkv |  | 0.500 | 2 |" in (out / "table.md").read_text(encoding="utf-8")

    assert scratch.main([*command[: command.index("--students")], "--students", "cla2", "--seeds", "1"]) == 0
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))["students"]
    by_name = {row["student"]: row for row in rows}
    assert {row["student"]: row for row in again} == by_name, "students of earlier commands stay"
    assert "| fusedkv |  | 0.500 | 2 |" in (out / "table.md").read_text(encoding="utf-8")
    assert scratch.main([*command, "--seeds", "0"]) == 2
    assert scratch.main([*command, "--percent", "0"]) == 2
    capsys.readouterr()
    assert scratch.main([*command, "--percent", "10"]) == 2
    assert "has train.steps" in capsys.readouterr().err
    assert scratch.main([*command, "--out", str(tmp_path / "new"), "--students", "control", "gqa_4"]) == 2
    assert "--students gqa_4: caches 0.500 of what" in capsys.readouterr().err
    assert scratch.main([*command, "--out", str(tmp_path / "new"), "--students", "cla2+kv+fast_attention"]) == 2
    assert "--students cla2.kv.fast_attention: optim.rates.outputs is 3" in capsys.readouterr().err
    assert not (tmp_path / "new" / "tokens").exists(), "before anything is prepared or trained"
    assert scratch.main([*command, "--data", str(out / "tokens")]) == 2
    assert "--data and --corpus" in capsys.readouterr().err
    again = ["--tiny", "--out", str(tmp_path / "new"), "--device", "cpu", "--seeds", "1", "--students", "control"]
    assert scratch.main([*again, "--data", str(tmp_path / "nothing")]) == 2
    assert "no such folder of prepared data" in capsys.readouterr().err
    assert scratch.main([*again, "--data", str(out / "tokens"), "--seed", "3"]) == 0
    config = yaml.safe_load((tmp_path / "new" / "configs" / "teacher.yaml").read_text(encoding="utf-8"))
    assert (config["data"]["path"], config["train"]["seed"]) == (str(out / "tokens"), 3)
    # a teacher that has begun reads no other text than its students will
    RunFolder(tmp_path / "new" / "teacher").metrics_file.unlink()
    shutil.copytree(out / "tokens", tmp_path / "tokens")
    assert scratch.main([*again, "--data", str(tmp_path / "tokens"), "--seed", "3"]) == 2
    assert "teacher.yaml: has data.path" in capsys.readouterr().err
    assert scratch.main([*command, "--out", str(tmp_path / "less"), "--tokens", "10"]) == 2
    assert "--tokens 10: less than a step of 8 x 32; allowed: 256 or more" in capsys.readouterr().err
    assert scratch.main([*command, "--out", str(tmp_path / "less"), "--percent", "0.0001"]) == 2
    assert "--percent 0.0001: of 102,400 tokens that is 0, less than" in capsys.readouterr().err
    assert not (tmp_path / "less").exists()


def test_a_student_that_fails_does_not_keep_others_from_more_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def student(self: Experiment, student: Student, device: int) -> None:
        ran.append(student.name)
        if student.kind == "fusedkv":
            raise UserError("no such student")

    def write(self: Experiment) -> list[dict[str, Any]]:
        rows = [{"kind": s.kind, "recipes": s.recipes, "seed": s.seed, "loss": 4.0} for s in self.students]
        return [row | {"finished": True} for row in rows if row["kind"] != "fusedkv"] + [{"kind": "fusedkv"}]

    monkeypatch.setattr(Experiment, "_student", student)
    monkeypatch.setattr(Experiment, "write", write)
    monkeypatch.setattr("experiments.half_cache.runner.teacher_config", lambda path: TEACHERS["110m"])
    monkeypatch.setattr("experiments.half_cache.students.teacher_config", lambda path: TEACHERS["110m"])
    options = scratch.parser().parse_args(
        [
            "--out",
            str(tmp_path),
            "--device",
            "cpu",
            "--seeds",
            "2",
            "--corpus",
            "x",
            "--students",
            "control",
            "fusedkv",
            "cla2",
            "cla4",
        ]
    )
    study = scratch.Scratch(options)
    assert not study._students()
    assert ran[:4] == ["control", "fusedkv", "cla2", "cla4"]
    assert ran[4:] == ["control", "cla2", "cla4", "cla2-s1", "cla4-s1", "control-s1"]


def test_a_step_sees_one_gpu_or_all_of_those_that_the_command_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "seen = os.environ['CUDA_VISIBLE_DEVICES'], 'SLURM_NTASKS' in os.environ\n"
        "pathlib.Path(sys.argv[1]).write_text(repr(seen))\n"
    )
    seen = tmp_path / "seen"
    for cpu, device, wanted in ((False, 1, "6"), (False, None, "4,6"), (True, 0, ""), (True, None, "")):
        devices = Devices(tmp_path, cpu=cpu, stop_after=None, parallel=1)
        assert devices.run([sys.executable, program, seen], "cla2", "train", device)
        assert seen.read_text() == repr((wanted, False))


def test_a_step_runs_in_the_folder_of_the_command_and_its_last_line_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("experiments.half_cache.runner._NEWS", 0.0)
    (tmp_path / "program.py").write_text(
        "import pathlib, time, experiments\n"
        "print('step 1', flush=True)\n"
        "while not pathlib.Path('go').exists(): time.sleep(0.01)\n"
    )
    devices = Devices(Path("out"), cpu=True, stop_after=None, parallel=1)
    log = Devices.log

    def seen(self: Devices, text: str) -> None:
        log(self, text)
        Path("go").touch()

    monkeypatch.setattr(Devices, "log", seen)
    Path("out").mkdir()
    assert devices.run([sys.executable, "program.py"], "cla2", "train", 0)
    assert capsys.readouterr().out == "cla2: step 1\n"
    assert not devices.failed

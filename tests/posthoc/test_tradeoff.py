"""`python -m experiments.tradeoff`: designs trained and compressed, one table; it resumes."""

from __future__ import annotations

import csv
import os
import signal
import threading
import time

import pytest
import yaml

from cllm import processes
from cllm.commands import train
from cllm.commands.tradeoff import is_finished
from cllm.errors import EXIT_STOPPED
from cllm.lock import locked
from cllm.runs import RunFolder
from experiments.tradeoff import main


@pytest.fixture
def tradeoff(tmp_path, prepared, monkeypatch):
    """Runs it on a tiny model in `tmp_path / "out"` and gives its exit status."""
    settings = {
        "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 64},
        "data": {"path": str(prepared(300)), "seq_len": 64, "num_workers": 0, "validation_sequences": 4},
        "train": {"steps": 4, "micro_batch": 2, "global_batch": 2, "accelerator": "cpu", "checkpoint_every": 2},
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda *words: main(["--config", str(file), "--out", str(tmp_path / "out"), *map(str, words)])


@pytest.fixture
def in_this_process(monkeypatch):
    """Trainings are calls of the command, so that they need not import torch again."""

    def run(command, **options):
        assert command[1:4] == ["-m", "cllm", "train"]
        return train.main(list(map(str, command[4:])))

    monkeypatch.setattr(processes, "run", run)


def test_trained_and_compressed_in_one_table(tradeoff, tmp_path, capfd, in_this_process):
    words = ["--designs", "mha", "gqa:n_kv_heads=1", "--spec", "xkv:group=2,ratio={ratio}", "--ratio", 2]
    assert tradeoff(*words) == 0
    with (tmp_path / "out" / "posthoc" / "posthoc.csv").open() as file:
        points = {(row["run"], row["spec"]): row for row in csv.DictReader(file)}
    spec = "xkv:group=2,ratio=2"
    assert set(points) == {(run, s) for run in ("mha", "gqa-n_kv_heads-1") for s in ("as trained", spec)}
    assert float(points["gqa-n_kv_heads-1", "as trained"]["ratio_to_mha"]) == 2
    assert float(points["mha", spec]["ratio_to_own"]) == pytest.approx(2, rel=0.1)
    capfd.readouterr()

    checkpoint = tmp_path / "out" / "gqa-n_kv_heads-1" / "checkpoints" / "step-00000004.ckpt"
    checkpoint.unlink()
    assert tradeoff(*words) == 0, "and again"
    told = capfd.readouterr().err
    assert "== gqa-n_kv_heads-1" in told, "resumed from step 2"
    assert "== mha" not in told
    assert checkpoint.exists()

    folder = RunFolder(tmp_path / "out" / "mha")
    assert is_finished(folder)
    lines = folder.metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.metrics_file.write_text("".join(line for line in lines if "val/loss" not in line), encoding="utf-8")
    assert not is_finished(folder), "its last validation is missing"


def test_out_of_time_it_says_so_and_the_same_command_goes_on(tradeoff, capfd):
    assert tradeoff("--designs", "mha", "--minutes", 0) == EXIT_STOPPED
    assert "stopped: mha is not finished; the same command goes on" in capfd.readouterr().err


@pytest.mark.usefixtures("warm_python")
def test_a_signal_goes_on_to_train_py_which_saves(tradeoff, tmp_path, capfd):
    folder = RunFolder(tmp_path / "out" / "mha")

    def stop():
        deadline = time.monotonic() + 300
        while not any("train/loss" in row for row in folder.metrics()) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    long = ["--train.steps", 10**6, "--train.checkpoint_every", 10**6, "--train.validate_every", "null"]
    assert tradeoff("--designs", "mha", "gqa", *long) == EXIT_STOPPED
    thread.join()
    ((step, _),) = folder.checkpoints()
    assert 0 < step < 10**6, "it saved when it was asked to stop"
    error = capfd.readouterr().err
    assert error.splitlines()[-1] == "stopped by SIGTERM; the same command goes on"
    assert "== gqa" not in error
    with locked(folder.path):  # and nobody trains it any more
        pass


def test_two_commands_do_not_write_one_folder(tradeoff, tmp_path, capfd):
    with locked(tmp_path / "out"):
        assert tradeoff("--designs", "mha") == 2
    assert f"error: {tmp_path / 'out'}: is in use by process {os.getpid()} on " in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--designs", "mah"], "--designs mah: configs/kv/ has no mah.yaml"),
        (["--designs", "gqa:n_kv_heads"], '"n_kv_heads" is not of the form KEY=VALUE'),
        (["--designs", "gqa:n_kv_head=1"], "n_kv_head"),
        (["--spec", "xkw:ratio={ratio}"], 'unknown method "xkw"'),
        (["--train.stepz", 4], "stepz"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tradeoff, tmp_path, capfd, words, message):
    assert tradeoff(*words) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()

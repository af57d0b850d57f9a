"""Going on with a run: after a kill at any point, from damaged checkpoints, with other settings, with other data."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm import files
from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.errors import UserError
from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights, verify, write_checksums
from cllm.train import checkpoints
from cllm.train.measure import Metrics
from cllm.train.metrics import MetricsLog
from cllm.train.module import TrainingModule
from cllm.train.resume import CHANGEABLE, check_resumable
from cllm.train.run import train, with_vocabulary
from cllm.train.schedule import learning_rate_factor
from cllm.train.stop import StopWhenDone

Tiny = Callable[..., Config]
ROOT = Path(__file__).resolve().parents[2]
MEASURED = ("train/loss", "train/lr", "train/gradient_norm", "train/skipped_steps", "val/loss", "val/bits_per_byte")
"""Tags whose values do not depend on time."""


class Killed(BaseException):
    """Ends a run at once, as SIGKILL does: nothing else is written."""


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [{tag: row[tag] for tag in ("step", *MEASURED) if tag in row} for row in folder.metrics()]


def events(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """The points by tag. Files are read in the order they were made in: by name, 10 would come before 9."""
    files = sorted(
        folder.tensorboard_folder.iterdir(), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)]
    )
    with TemporaryDirectory() as ordered:
        for n, file in enumerate(files):
            shutil.copy(file, Path(ordered) / f"events.out.tfevents.{n:08}")
        board = EventAccumulator(ordered)
        board.Reload()
        return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in MEASURED}


def state(folder: RunFolder) -> dict[str, Any]:
    """Weights, moments and schedule of the newest checkpoint."""
    saved = torch.load(folder.checkpoints()[-1][1], weights_only=True)
    return {key: saved[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def assert_equal(found: Any, wanted: Any, where: str = "") -> None:
    if isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            assert_equal(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for n, pair in enumerate(zip(found, wanted, strict=True)):
            assert_equal(*pair, f"{where}[{n}]")
    else:
        assert found == wanted, where


# ---- kills -----------------------------------------------------------------------------------------------------------

POINTS: dict[str, tuple[Any, str, bool]] = {
    "after a row": (MetricsLog, "write", True),
    "between a row's events and the row": (MetricsLog, "_add_events", True),
    "before a checkpoint is written": (checkpoints, "save_file", False),
    "before a checkpoint is renamed": (checkpoints, "save_file", True),
    "after a checkpoint was renamed": (RunFolder, "keep_checkpoints", False),
    "after older checkpoints were deleted": (RunFolder, "keep_checkpoints", True),
    "in a validation": (TrainingModule, "validation_step", True),
}
"""Name: what is patched, its function, whether the kill comes after it and not before."""


def kill_at(monkeypatch: pytest.MonkeyPatch, point: str, nth: int) -> None:
    """Raise `Killed` at the nth time (from 0) that a run comes to `point`; nothing is closed or flushed after it."""
    owner, name, after = POINTS[point]
    original, count = getattr(owner, name), itertools.count()

    def patched(*args: Any, **kwargs: Any) -> Any:
        due = next(count) == nth
        if due and not after:
            raise Killed
        result = original(*args, **kwargs)
        if due:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, patched)
    monkeypatch.setattr(Metrics, "close", lambda self: None)


SETTINGS: tuple[str, ...] = ("--train.steps", "5", "--train.log_every", "3", "--train.validate_every", "2")
SETTINGS += ("--train.checkpoint_every", "2", "--model.n_layers", "2", "--data.validation_sequences", "2")
"""Checkpoints between two rows, rows and validations and checkpoints at one step, and a last step off all intervals."""


@pytest.mark.parametrize("point", POINTS)
def test_a_run_killed_at_any_point_ends_as_the_uninterrupted_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    wanted = train(tiny("--name", "whole", *SETTINGS))
    wanted_rows, wanted_events, wanted_state = rows(wanted), events(wanted), state(wanted)
    assert [row["step"] for row in wanted_rows if "val/loss" in row] == [0, 2, 4, 5]
    assert [row["step"] for row in wanted_rows if "train/loss" in row] == [3, 5]
    config = tiny("--name", "killed", *SETTINGS)
    for nth in itertools.count():
        with monkeypatch.context() as patched:
            kill_at(patched, point, nth)
            try:
                train(config, overwrite=True)
            except Killed:
                pass
            else:
                assert nth >= 3, "the run came to this point several times"
                break
        folder = train(config, resume="auto")
        assert rows(folder) == wanted_rows, nth
        assert_equal(state(folder), wanted_state, str(nth))
        assert events(folder) == wanted_events, nth
        assert [step for step, _ in folder.checkpoints()] == [4, 5]
        assert not [path for path in folder.checkpoint_folder.iterdir() if path.suffix != ".ckpt"]


def test_a_validation_that_a_signal_left_out_is_made_up(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = train(tiny("--name", "whole", *SETTINGS))
    config = tiny("--name", "stopped", *SETTINGS)
    with monkeypatch.context() as patched:
        handled = StopWhenDone.on_train_batch_end

        def stop_at_step_2(self: StopWhenDone, trainer: Any, *args: Any) -> None:
            self.received = signal.SIGTERM if trainer.global_step == 2 else None
            handled(self, trainer, *args)

        patched.setattr(StopWhenDone, "on_train_batch_end", stop_at_step_2)
        stopped = train(config)
    assert [row["step"] for row in rows(stopped)] == [0], "no validation after the signal"
    assert [step for step, _ in stopped.checkpoints()] == [2]
    resumed = train(config, resume="auto")
    assert rows(resumed) == rows(wanted)
    assert_equal(state(resumed), state(wanted))


def test_nothing_is_validated_twice(tiny: Tiny) -> None:
    folder = train(tiny(*SETTINGS))
    before = folder.metrics_file.read_bytes()
    train(tiny(*SETTINGS), resume="auto")
    assert folder.metrics_file.read_bytes() == before, "a finished run is left alone"
    train(tiny(*SETTINGS), resume=str(folder.checkpoint_path(4)))
    assert [row["step"] for row in folder.metrics() if "val/loss" in row] == [0, 2, 4, 5]


# ---- another length --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_a_longer_run_takes_its_steps_at_the_new_lengths_rates(tiny: Tiny, schedule: str) -> None:
    settings = ("--optim.schedule", schedule, "--train.validate_every", "null")
    train(tiny("--train.steps", "6", *settings))
    config = tiny("--train.steps", "9", *settings)
    folder = train(config, resume="auto")
    rates = {row["step"]: row["train/lr"] for row in folder.metrics()}
    for length, steps in ((6, range(1, 7)), (9, range(7, 10))):
        for step in steps:
            factor = learning_rate_factor(step - 1, length, config.optim)
            assert rates[step] == pytest.approx(config.optim.lr * factor, rel=1e-12), step
    saved = state(folder)
    assert saved["lr_schedulers"][0]["last_epoch"] == 9


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(file: Path, draw: random.Random, start: int = 0, end: int | None = None) -> int:
    """Flip one bit of a file between two offsets; returns the byte's offset."""
    content = bytearray(file.read_bytes())
    place = draw.randrange(start, len(content) if end is None else end)
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return place


@pytest.fixture(scope="module")
def saved(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with checkpoints of steps 2 and 4; tests copy it."""
    config = _config(prepared, tmp_path_factory.mktemp("saved"))
    return train(config).path


def _config(prepared: Path, runs_dir: Path) -> Config:
    return Config.model_validate(
        {
            "name": "saved",
            "runs_dir": str(runs_dir),
            "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
            "data": {"path": str(prepared), "seq_len": 32, "num_workers": 0, "validation_sequences": 2},
            "train": {
                **{"steps": 4, "global_batch": 4, "micro_batch": 2, "log_every": 1, "validate_every": 2},
                **{"checkpoint_every": 2, "accelerator": "cpu"},
            },
        }
    )


@pytest.fixture
def copied(saved: Path, tmp_path: Path, prepared: Path) -> tuple[RunFolder, Config]:
    """A copy of `saved` and its config, to train on to step 6."""
    shutil.copytree(saved, tmp_path / "saved")
    config = _config(prepared, tmp_path)
    config.train.steps = 6
    return RunFolder(tmp_path / "saved"), config


def test_no_flip_of_a_bit_in_a_tensor_goes_unnoticed(copied: tuple[RunFolder, Config]) -> None:
    draw = random.Random(0)
    checkpoint = copied[0].checkpoint_path(4)
    with zipfile.ZipFile(checkpoint) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    intact = checkpoint.read_bytes()
    places = []
    for entry in draw.choices(tensors, weights=[entry.file_size for entry in tensors], k=40):
        checkpoint.write_bytes(intact)
        header = intact[entry.header_offset : entry.header_offset + 30]
        begin = entry.header_offset + 30 + sum(int.from_bytes(header[n : n + 2], "little") for n in (26, 28))
        places.append(flip(checkpoint, draw, begin, begin + entry.file_size))
        with pytest.raises(
            UserError, match=r"step-00000004\.ckpt: damaged, or not a readable checkpoint: record .*data/"
        ):
            read_weights(checkpoint)
        with pytest.raises(UserError, match=r"step-00000004\.ckpt: damaged"):
            load_run(checkpoint)
    assert len(set(places)) > 35, "many places were tried"


def test_a_flip_anywhere_is_noticed_or_changes_nothing(copied: tuple[RunFolder, Config]) -> None:
    """Bytes that pad a zip archive and dates in it have no checksum, and nothing depends on them."""
    draw = random.Random(1)
    checkpoint = copied[0].checkpoint_path(4)
    intact, wanted = checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True)
    noticed = 0
    for _ in range(100):
        checkpoint.write_bytes(intact)
        flip(checkpoint, draw)
        try:
            verify(checkpoint)
            read_weights(checkpoint)
        except UserError:
            noticed += 1
            continue
        assert_equal(torch.load(checkpoint, weights_only=True), wanted)
    assert noticed > 50


def test_a_flip_in_a_folder_of_shards_is_noticed(tmp_path: Path) -> None:
    draw = random.Random(2)
    folder = tmp_path / "step-00000002.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    for name in ("model.safetensors", "checkpoint/states_0.pt", "checkpoint/states_1.pt"):
        (folder / name).write_bytes(draw.randbytes(3000))
    write_checksums(folder)
    assert json.loads((folder / "checksums.json").read_text())["checkpoint/states_0.pt"]["size"] == 3000
    verify(folder)
    for path in [path for path in folder.rglob("*") if path.is_file()] * 5:
        intact = path.read_bytes()
        flip(path, draw)
        with pytest.raises(UserError, match=r"damaged|missing"):
            verify(folder)
        path.write_bytes(intact[:-9])
        with pytest.raises(UserError, match=r"damaged"):
            verify(folder)
        path.write_bytes(intact)
    shutil.copy(folder / "checkpoint" / "states_1.pt", folder / "checkpoint" / "states_2.pt")
    with pytest.raises(UserError, match=r"states_2\.pt: not part of the checkpoint: checksums\.json does not list it"):
        verify(folder)
    (folder / "checkpoint" / "states_2.pt").unlink()
    (folder / "checkpoint" / "states_1.pt").unlink()
    with pytest.raises(UserError, match=r"states_1\.pt is missing"):
        verify(folder)
    verify(folder, ["model.safetensors"])


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def foreign(file: Path) -> None:
    torch.save({"weights": torch.zeros(3)}, file)


def another_model(file: Path) -> None:
    state = torch.load(file, weights_only=True)
    state["state_dict"]["model.embed.weight"] = torch.zeros(3, 3)
    torch.save(state, file)


def another_step(file: Path) -> None:
    shutil.copy(file.with_name("step-00000002.ckpt"), file)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (cut, "damaged, or not a readable checkpoint"),
    "empty": (lambda file: file.write_bytes(b""), "damaged, or not a readable checkpoint"),
    "flipped": (
        lambda file: flip(file, random.Random(0), 20000, 30000),
        "damaged, or not a readable checkpoint: record",
    ),
    "text": (lambda file: file.write_text("hello"), "damaged, or not a readable checkpoint"),
    "foreign": (foreign, "it has no "),
    "another model": (another_model, r"embed\.weight is \[3, 3\], not \[320, 32\]"),
    "another step": (another_step, "holds step 2, its name says 4"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_line(
    copied: tuple[RunFolder, Config], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    folder, config = copied
    act, message = DAMAGES[damage]
    newest, older = folder.checkpoint_path(4), folder.checkpoint_path(2)
    wanted = load_run(older)[0].state_dict()
    act(newest)
    with pytest.raises(UserError, match=message) as refused:
        train(config, resume=str(newest))
    assert len(str(refused.value)) < 500, "one line"
    with pytest.raises(UserError, match=message):
        load_run(newest)
    with caplog.at_level(logging.WARNING):
        model, _, step = load_run(folder.path)
    assert step == 2
    assert_equal(model.state_dict(), wanted)
    assert [record.getMessage() for record in caplog.records if "falling back to step-00000002.ckpt" in record.message]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(config, resume="auto")
    lines = [record.getMessage() for record in caplog.records if "falling back" in record.message]
    assert len(lines) == 1
    assert "step-00000004.ckpt" in lines[0]
    assert [step for step, _ in folder.checkpoints()] == [4, 6]
    assert load_run(newest)[2] == 4, "the damaged one was replaced"
    assert not list(folder.checkpoint_folder.glob("*.set-aside"))


def test_without_an_intact_checkpoint_a_run_is_refused(copied: tuple[RunFolder, Config]) -> None:
    folder, config = copied
    for _, path in folder.checkpoints():
        cut(path)
    for act in (lambda: train(config, resume="auto"), lambda: load_run(folder.path)):
        with pytest.raises(UserError, match=r"no checkpoint is intact: .*step-00000004.*step-00000002"):
            act()


def test_going_back_leaves_no_later_checkpoint_to_go_on_from(copied: tuple[RunFolder, Config]) -> None:
    folder, config = copied
    config.train.checkpoint_every = 3
    train(config, resume=str(folder.checkpoint_path(2)))
    assert [step for step, _ in folder.checkpoints()] == [3, 6]
    assert [row["step"] for row in folder.metrics() if "train/loss" in row] == [1, 2, 3, 4, 5, 6]


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_on_the_disk_before_an_older_one_goes(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(name)
            return function(*args, **kwargs)

        return noted

    monkeypatch.setattr("cllm.runs.checkpoint.sync_file", noting("file", files.sync_file))
    monkeypatch.setattr(checkpoints, "sync_folder", noting("folder", files.sync_folder))
    monkeypatch.setattr(MetricsLog, "sync", noting("rows", MetricsLog.sync))
    monkeypatch.setattr(RunFolder, "keep_checkpoints", noting("delete", RunFolder.keep_checkpoints))
    train(tiny("--train.steps", "2", "--train.checkpoint_every", "1", "--train.validate_every", "null"))
    assert done == ["file", "rows", "folder", "delete"] * 2


def test_checkpoints_do_not_travel_through_the_temporary_folder(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    folder = train(tiny("--train.steps", "1", "--train.validate_every", "null"))
    assert [step for step, _ in folder.checkpoints()] == [1]


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_leaves_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(state: Any, stream: BinaryIO) -> None:
        stream.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = tiny("--train.steps", "1")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"\.partial: cannot be written: No space left on device[^\n]*$"):
        train(config)
    assert not list((Path(config.runs_dir) / config.name / "checkpoints").iterdir())


# ---- what may change -------------------------------------------------------------------------------------------------


def test_the_documentation_names_what_may_change() -> None:
    lines = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").splitlines()
    begin = lines.index("| may change when a run goes on | how |")
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[begin + 2 :])
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert {key.strip("`"): how for key, how in cells} == CHANGEABLE


def test_every_setting_is_free_or_refused(copied: tuple[RunFolder, Config]) -> None:
    """Whatever the saved config says otherwise: a key that `CHANGEABLE` does not have is refused by its name."""
    folder, config = copied
    config = with_vocabulary(config)
    saved = config.as_yaml_data()
    seen = set()
    for section, content in saved.items():
        for key in content if isinstance(content, dict) else [None]:
            name = section if key is None else f"{section}.{key}"
            seen.add(name)
            if name == "data.validation":  # see below
                continue
            other: Any = "zero1" if name == "train.strategy" else "another"
            changed = {**saved, section: other if key is None else {**content, key: other}}
            now = config.model_construct(**dict(config))
            monkey = pytest.MonkeyPatch()
            monkey.setattr(Config, "as_yaml_data", lambda self, c=changed, n=now: c if self is n else saved)
            try:
                if name in CHANGEABLE and name != "train.strategy":
                    check_resumable(now, folder)
                else:
                    with pytest.raises(UserError, match=rf"^{name} is '(another|zero1)', but the run in"):
                        check_resumable(now, folder)
            finally:
                monkey.undo()
    assert CHANGEABLE.keys() <= seen, "no key of the table is out of date"


def test_another_kernel_of_attention_is_logged(
    copied: tuple[RunFolder, Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder, config = copied
    config = with_vocabulary(config)
    config.attention.backend = "sdpa"
    with caplog.at_level(logging.INFO):
        check_resumable(config, folder)
    assert "attention.backend is sdpa; the run was started with auto" in caplog.text


# ---- data ------------------------------------------------------------------------------------------------------------


def change_data(folder: Path) -> None:
    """As if it had been prepared anew from other text."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            shard["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_records_its_data_and_refuses_others(tiny: Tiny, prepared: Path, tmp_path: Path) -> None:
    copies = {name: Path(shutil.copytree(prepared, tmp_path / name)) for name in ("train", "main", "more")}
    config = tiny("--train.steps", "1", "--data.path", str(copies["train"]))
    config.data.validation = {name: str(copies[name]) for name in ("main", "more")}
    folder = train(config)
    digest = Manifest.load(prepared).digest()
    digests = folder.data_digests()
    assert digests is not None
    assert (digests.train, digests.validation) == (digest, {"main": digest, "more": digest})
    config.train.steps = 2
    for name, key in (("train", "data.path"), ("main", r"data\.validation\.main"), ("more", r"data\.validation\.more")):
        shutil.copy(copies[name] / "manifest.json", tmp_path / "manifest.json")
        change_data(copies[name])
        for how in ("auto", str(folder.checkpoint_path(1))):
            with pytest.raises(UserError, match=rf"^{key}: .*{name} holds other data than the run in"):
                train(config, resume=how)
        shutil.copy(tmp_path / "manifest.json", copies[name] / "manifest.json")
    config.data.validation = {"more": str(copies["more"]), "main": str(copies["main"])}
    with pytest.raises(UserError, match=r"the main set, the first, is 'more', but the run .* was started with 'main'"):
        train(config, resume="auto")
    config.data.validation = {"main": str(prepared)}  # the same data elsewhere, and without the second set
    train(config, resume="auto")
    digests = folder.data_digests()
    assert digests is not None
    assert digests.validation == {"main": digest, "more": digest}, "a set that comes back is still compared"


def test_a_run_without_a_record_of_its_data_goes_on(
    copied: tuple[RunFolder, Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder, config = copied
    folder.data_file.unlink()
    with caplog.at_level(logging.INFO):
        train(config, resume="auto")
    assert "has no record of its data" in caplog.text
    assert folder.data_digests() is not None
    folder.data_file.write_text("[]")
    with pytest.raises(UserError, match=r"data\.json: cannot be read"):
        train(config, resume="auto")

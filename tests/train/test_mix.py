"""`data.mix` in a run: the keys, training and resuming, a validation set for each folder, digests, the dry run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.environment import environment
from cllm.errors import UserError
from cllm.hub.export import export_run
from cllm.runs import RunFolder
from cllm.train.dryrun import dry_run
from cllm.train.run import train

Tiny = Callable[..., Config]
CODE = ["def", "f(x):", "return", "x+1"]


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders `prose` and `code` of one tokenizer, and `other` of another."""
    root, draw = tmp_path_factory.mktemp("mix"), random.Random(1)
    found = {"prose": Path(shutil.copytree(prepared, root / "prose"))}
    for name, tokenizer in (("code", {"load": str(prepared / "tokenizer")}), ("other", {"train": {"vocab_size": 270}})):
        text = root / f"{name}-text"
        text.mkdir()
        for n in range(200):
            (text / f"{n}.txt").write_text(" ".join(draw.choices(CODE, k=draw.randint(5, 40))))
        recipe = {"name": name, "out": str(root / name), "source": {"kind": "files", "paths": [str(text)]}}
        recipe |= {"tokenizer": tokenizer, "validation": {"fraction": 0.1}, "workers": 1}
        found[name] = prepare(Recipe.model_validate(recipe)).folder
    return found


@pytest.fixture
def mixed(tiny: Tiny, folders: dict[str, Path]) -> Tiny:
    """`mixed("--train.steps", "3")`: a config with a mix of 70 % prose and 30 % code."""
    mix = f"{{{folders['prose']}: 0.7, {folders['code']}: 0.3}}"
    return lambda *settings: tiny("--data.path", "null", "--data.mix", mix, *settings)


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--data.mix", "{a: 1}"), r"path is '.*', but mix is given too; allowed: one of them"),
        (("--data.path", "null"), "path is null and mix is empty; allowed: one of them"),
        (("--data.path", "null", "--data.mix", "{a: 0}"), r"data\.mix\.a: .*greater than 0, got 0"),
        (("--data.path", "null", "--data.mix", "{a: -1}"), r"data\.mix\.a: .*greater than 0"),
        (("--data.path", "null", "--data.mix", "{a: .inf}"), r"data\.mix\.a: .*finite"),
        (("--data.path", "null", "--data.mix", "{a: 1, a/: 1}"), "mix has the folder 'a/' twice"),
        (("--data.path", "null", "--data.mix", "{a/x: 1, b/x: 1}"), "mix has two folders of the name 'x'"),
        (("--data.path", "null", "--data.mix", "{..: 1}"), r"the folder '\.\.', whose last part cannot name"),
    ],
)
def test_mistakes_are_one_line(tiny: Tiny, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(*settings)


def test_the_default_path_gives_way_to_a_mix(tiny: Tiny, tmp_path: Path) -> None:
    from cllm.config.load import load_settings

    model = {"d_model": 32, "n_layers": 2, "n_heads": 2}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"model": model, "data": {"mix": {"x/a": 1, "y/b": 3}}}))
    config = load_settings(Config, [tmp_path / "a.yaml"])
    assert (config.data.path, config.data.main_folder) == (None, "x/a")
    assert config.data.validation_sets == {"a": "x/a", "b": "y/b"}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(config.as_yaml_data()))
    assert load_settings(Config, [tmp_path / "b.yaml"]) == config
    sets = tiny("--data.path", "null", "--data.mix", "{a/x: 1, b/x: 1}", "--data.validation", "{x: a/x}").data
    assert sets.validation_sets == {"x": "a/x"}


def test_a_config_from_before_there_was_a_mix_loads(tiny: Tiny, tmp_path: Path) -> None:
    folder = train(tiny("--train.steps", "2", "--train.checkpoint_every", "1"))
    written = yaml.safe_load(folder.config_file.read_text())
    del written["data"]["mix"]
    folder.config_file.write_text(yaml.safe_dump(written))
    assert set(json.loads(folder.data_file.read_text())) == {"train", "validation"}
    folder.checkpoints()[-1][1].unlink()
    train(tiny("--train.steps", "2", "--train.checkpoint_every", "1"), resume="auto")
    assert folder.last_step() == 2


# ---- runs ------------------------------------------------------------------------------------------------------------


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    keys = ("step", "train/loss", "val/loss", "val-code/loss")
    return [{key: row[key] for key in keys if key in row} for row in folder.metrics()]


def test_a_run_is_resumed_to_the_bit_and_validated_on_each_folder(mixed: Tiny, folders: dict[str, Path]) -> None:
    wanted = train(mixed("--name", "uninterrupted"))
    assert len(rows(wanted)) == 8 + 3
    assert {tuple(row) for row in rows(wanted)} == {("step", "train/loss"), ("step", "val/loss", "val-code/loss")}
    alone = train(mixed("--name", "alone", "--data.validation", f"{{x: {folders['code']}}}", "--train.steps", "1"))
    assert rows(alone)[0]["val/loss"] == rows(wanted)[0]["val-code/loss"] != rows(wanted)[0]["val/loss"]
    folder = train(mixed("--name", "resumed"))
    folder.checkpoints()[-1][1].unlink()
    train(mixed("--name", "resumed", "--data.num_workers", "2"), resume="auto")
    assert rows(folder) == rows(wanted)
    saved, resumed = (torch.load(run.checkpoints()[-1][1], weights_only=True) for run in (wanted, folder))
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_digests_are_recorded_and_checked(mixed: Tiny, folders: dict[str, Path]) -> None:
    folder = train(mixed("--train.steps", "1"))
    digests = {name: Manifest.load(folders[name]).digest() for name in ("prose", "code")}
    recorded = folder.data_digests()
    assert recorded is not None
    assert recorded.mix == {str(folders[name]): digest for name, digest in digests.items()}
    assert (recorded.train, recorded.validation) == (digests["prose"], digests)
    held_out = ("--data.validation", f"{{prose: {folders['prose']}}}", "--train.steps", "2")
    manifest = (folders["code"] / "manifest.json").read_text()
    changed = json.loads(manifest)
    changed["splits"]["train"]["shards"][0]["sha256"] = "0" * 64
    (folders["code"] / "manifest.json").write_text(json.dumps(changed))
    try:
        with pytest.raises(UserError, match=r"^data\.mix: .*code holds other data than the run in"):
            train(mixed(*held_out), resume="auto")
    finally:
        (folders["code"] / "manifest.json").write_text(manifest)
    train(mixed(*held_out), resume="auto")


def test_a_run_is_not_resumed_with_other_weights(mixed: Tiny, folders: dict[str, Path]) -> None:
    train(mixed("--train.steps", "1"))
    other = f"{{{folders['prose']}: 0.5}}"
    with pytest.raises(UserError, match=r"data\.mix is .*0\.5.*, but the run in .* was started with .*0\.7"):
        train(mixed("--train.steps", "2", "--data.mix", other), resume="auto")


def test_folders_of_different_tokenizers_are_refused(tiny: Tiny, folders: dict[str, Path]) -> None:
    mix = f"{{{folders['prose']}: 1, {folders['other']}: 1}}"
    config = tiny("--data.path", "null", "--data.mix", mix, "--model.vocab_size", "320")
    message = (
        r"data\.mix: .*other was made with another tokenizer than .*prose; prepare it with --tokenizer\.train null"
    )
    for action in (train, dry_run):
        with pytest.raises(UserError, match=message):
            action(config)


def test_a_mixed_run_is_exported_with_the_tokenizer_of_all(mixed: Tiny, tmp_path: Path) -> None:
    folder = train(mixed("--train.steps", "1"))
    export_run(folder.path, tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.json").exists()


def test_a_mixed_run_is_evaluated_on_each_folder(mixed: Tiny, load_file: Callable[[Path], ModuleType]) -> None:
    folder = train(mixed("--train.steps", "1", "--data.validation_sequences", "null"))
    script = load_file(Path(__file__).resolve().parents[2] / "evaluate.py")
    assert script.main(["--run", str(folder.path)]) == 0
    row = next(folder.metrics())  # before the first step
    for name, tag in (("prose", "val/loss"), ("code", "val-code/loss")):
        measured = json.loads((folder.evaluation_folder / f"{name}.json").read_text())
        assert measured["tokens_scored"] > 0
        assert 0.3 * row[tag] < measured["loss"] < row[tag]


# ---- the dry run -----------------------------------------------------------------------------------------------------


def test_the_dry_run_reports_shares_and_epochs(mixed: Tiny, folders: dict[str, Path]) -> None:
    report = dry_run(mixed("--model.vocab_size", "320", "--train.steps", "2000"), tokens_per_second=3200)
    sizes = {name: Manifest.load(folders[name]).split("train") for name in ("prose", "code")}
    texts = {name: f"{size.tokens:,} tokens in {size.documents:,} documents" for name, size in sizes.items()}
    lines = [
        "data         data.mix of 2 folders; validation sets: prose, code",
        f"             70 % {folders['prose']}: {texts['prose']}",
        f"             30 % {folders['code']}: {texts['code']}",
    ]
    sequences = {name: (size.tokens - 1) // 32 for name, size in sizes.items()}
    prose, code = 5600 / sequences["prose"], 2400 / sequences["code"]
    assert prose > 4
    lines += [
        f"epochs       {folders['prose']} {prose:.3g} (179,200 tokens), {folders['code']} {code:.3g} (76,800 tokens); "
        "after 4, repeated tokens are worth less than new ones",
        "time         0.0222 hours at 3,200 tokens/s, without validation",
    ]
    assert "\n".join(lines) in report


def test_the_dry_run_takes_the_speed_of_an_earlier_run_like_it(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("--model.vocab_size", "320", "--runs_dir", str(tmp_path))
    with pytest.raises(UserError, match=r"--price 2: needs --tokens-per-second N, since no earlier run of this model"):
        dry_run(config, price=2)
    for name, changed in (("same", []), ("wider", ["--model.d_ff", "96"]), ("elsewhere", [])):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        run.write_config(tiny("--model.vocab_size", "320", "--train.steps", "7", *changed))
        hardware = {"gpus": "another GPU"} if name == "elsewhere" else environment()
        (run.path / "env.txt").write_text("".join(f"{key}: {text}\n" for key, text in hardware.items()))
        speeds = {"same": (1.0, 2048.0, 512.0, 1024.0)}.get(name, (9.0, 9.0))
        rows = ({"step": n, "tokens": n, "time": 0.0, "throughput/tokens_per_s": x} for n, x in enumerate(speeds))
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = dry_run(config, price=36.0).splitlines()
    assert f"time         0.000278 hours at 1,024 tokens/s as in {tmp_path / 'same'}, without validation" in report
    assert "cost         0.01: 0.000278 device hours at 36.00" in report


def test_the_dry_run_reports_epochs_of_one_folder(tiny: Tiny, prepared: Path, tmp_path: Path) -> None:
    sequences = (Manifest.load(prepared).split("train").tokens - 1) // 32
    report = dry_run(tiny("--model.vocab_size", "320")).splitlines()
    assert f"epochs       {32 / sequences:.3g} (1,024 tokens)" in report
    assert not any(line.startswith("time") for line in report)
    missing = dry_run(tiny("--model.vocab_size", "320", "--data.path", str(tmp_path / "nosuch"))).splitlines()
    assert "epochs       unknown (not prepared yet)" in missing

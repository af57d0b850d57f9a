"""scripts/convert.py export: what the folder holds, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.vocabulary import tokenizer_sha256
from cllm.evaluate.subjects import load_subject
from cllm.files import MARK
from cllm.hub import companions
from cllm.hub import export as export_module
from cllm.model.sizes import build_decoder
from cllm.runs import DataDigests, RunFolder, load_run
from cllm.runs.names import TIED, WEIGHTS_FILE
from cllm.train.run import train
from tests.ranks import train_on_ranks

REPO = Path(__file__).resolve().parents[2]


def _refused(capsys, status: int) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_as_a_folder(convert, make_run, tmp_path, prepared, capsys) -> None:
    run, decoder = make_run()
    out = tmp_path / "out"
    assert convert("export", run.path, out) == 0
    names = {file.name for file in out.iterdir()}
    assert names == {
        *(
            MARK,
            "README.md",
            "plan.png",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        ),
        "weights.sha256.json",
    }
    stored, expected = load_file(out / "model.safetensors"), decoder.state_dict()
    assert stored.keys() == {f"model.{name}" for name in expected}
    assert all(torch.equal(stored[f"model.{name}"], tensor) for name, tensor in expected.items())
    eos = Manifest.read(prepared).eos_id
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (eos, eos)
    written, summary, how = capsys.readouterr().out.splitlines()
    assert written.startswith(f"written: {out}: README.md, config.json, ")
    parameters = sum(tensor.numel() for tensor in expected.values())
    nbytes = (out / "model.safetensors").stat().st_size
    assert summary == f"step 20, {parameters:,} parameters in fp32, {nbytes:,} bytes of weights"
    assert how.endswith(f'AutoModelForCausalLM.from_pretrained("{out}")')
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_others_may_read_what_the_umask_lets_them(convert, make_run, tmp_path) -> None:
    """safetensors 0.8 makes files for their owner alone, so that a server of another user could not read them."""
    before = os.umask(0o027)
    try:
        run, _ = make_run(kv={"preset": "mha"})
        assert convert("export", run.path, tmp_path / "out", "--max-shard-size", "20KB") == 0
        assert convert("plain", tmp_path / "out", tmp_path / "plain", "--max-shard-size", "20KB") == 0
    finally:
        os.umask(before)
    files = [file for name in ("out", "plain") for file in (tmp_path / name).iterdir()]
    assert sum(file.suffix == ".safetensors" for file in files) >= 4
    assert {file.stat().st_mode & 0o777 for file in files if file.suffix == ".safetensors"} == {0o640}


def test_the_folder_loads_generates_and_is_evaluated(convert, make_run, tmp_path) -> None:
    run, decoder = make_run()
    assert convert("export", run.path, tmp_path / "out") == 0
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = torch.tensor([tokenizer("the first number").input_ids])
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, decoder(ids))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= ids.shape[1] + 4
    subject = load_subject(tmp_path / "out", torch.device("cpu"))
    assert (subject.kind, subject.design, subject.context) == ("huggingface", "fusedkv", 64)
    with torch.no_grad():
        assert torch.equal(subject.logits(ids, None, None, 2), decoder(ids)[:, -2:])


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_run_that_was_trained(strategy, convert, prepared, tmp_path) -> None:
    """Two processes under ddp. The folder computes what the run does."""
    config = {
        "name": "a",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"d_model": 16, "n_layers": 4, "n_heads": 2, "max_seq_len": 32, "kv": {"preset": "fusedkv"}},
        "data": {"path": str(prepared), "seq_len": 16, "num_workers": 0, "validation_sequences": 2},
        "train": {
            **{"steps": 2, "global_batch": 4, "micro_batch": 2, "checkpoint_every": 2, "accelerator": "cpu"},
            **{"strategy": strategy, "devices": 1 if strategy == "single" else 2},
        },
    }
    if strategy == "single":
        train(Config.model_validate(config))
    else:
        train_on_ranks(2, Config.model_validate(config), tmp_path / "log.txt")
    assert convert("export", tmp_path / "runs" / "a", tmp_path / "out") == 0
    decoder, found, step = load_run(tmp_path / "runs" / "a")
    assert (step, found.train.strategy) == (2, strategy)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, decoder(ids))
    new = build_decoder(found.model)  # the fusion's weights were trained, too
    new.init_weights()
    trained, untrained = (dict(m.named_parameters()) for m in (model.model, new))
    fused = [name for name in trained if name.endswith("attention.keys.weight")]
    assert fused
    assert all(not torch.equal(trained[name], untrained[name]) for name in fused)


def test_another_checkpoint_in_bf16_in_several_files(convert, make_run, tmp_path, random_model) -> None:
    run, _ = make_run()
    out = tmp_path / "out"
    options = ("--checkpoint", 10, "--dtype", "bf16", "--max-shard-size", "5KB", "--no-tokenizer")
    assert convert("export", run.path, out, *options) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert not (out / "tokenizer.json").exists()
    expected = random_model(run.config().model, seed=10).state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.bfloat16
    for name, tensor in loaded.model.state_dict().items():
        fused = name.endswith(("keys.weight", "values.weight"))
        assert torch.equal(tensor, expected[name] if fused else expected[name].bfloat16()), name
    assert any(name.endswith("keys.weight") for name in expected)


def test_tied_embeddings_are_one_tensor(convert, make_run, tmp_path, capsys) -> None:
    run, decoder = make_run(tie_embeddings=True)
    assert convert("export", run.path, tmp_path / "out") == 0
    assert f"{sum(p.numel() for p in decoder.parameters()):,} parameters" in capsys.readouterr().out
    assert "model.head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.model.head.weight, decoder.embed.weight)


def test_a_width_that_match_params_found(convert, make_run, tmp_path) -> None:
    run, _ = make_run()
    config = run.config()
    config = config.model_copy(update={"model": config.model.model_copy(update={"match_params": True})})
    run.write_config(config)
    torch.manual_seed(0)
    decoder = build_decoder(config.model)
    decoder.init_weights()
    state = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    torch.save({"state_dict": state}, run.checkpoint_path(30))
    assert convert("export", run.path, tmp_path / "out") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.intermediate_size > 24
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, decoder(ids))


def test_a_checkpoint_folder_of_zero(convert, make_run, tmp_path) -> None:
    run, decoder = make_run(tie_embeddings=True)
    folder = run.checkpoint_path(30)
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in decoder.state_dict().items() if name != "head.weight"}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={TIED: json.dumps({"head.weight": "embed.weight"})})
    assert convert("export", run.path, tmp_path / "out") == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = load_run(folder)[0].state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def test_force_replaces_what_an_export_made(convert, make_run, tmp_path, capsys) -> None:
    run, _ = make_run()
    out = tmp_path / "out"
    assert convert("export", run.path, out, "--checkpoint", 10) == 0
    capsys.readouterr()
    assert f"{out}: exists; give another name, or --force" in _refused(capsys, convert("export", run.path, out))
    (out / "stale.txt").write_text("x")
    assert convert("export", run.path, out, "--force") == 0
    assert not (out / "stale.txt").exists()
    capsys.readouterr()
    for folder in (run.path, tmp_path):
        message = _refused(capsys, convert("export", run.path, folder, "--force"))
        assert f"{folder}: is left alone" in message
    assert run.config_file.exists()
    (out / MARK).unlink()
    before = sorted(path.name for path in out.iterdir())
    message = _refused(capsys, convert("export", run.path, out, "--force"))
    assert f"{out}: is left alone: it has no file {MARK}" in message, "somebody's checkpoint"
    assert sorted(path.name for path in out.iterdir()) == before


@pytest.mark.parametrize("force", [False, True])
def test_two_exports_to_one_folder_do_not_replace_each_other(
    convert, make_run, tmp_path, capsys, monkeypatch, force
) -> None:
    """The second comes while the first writes, and again just when the first has ended."""
    run, _ = make_run()
    out, save = tmp_path / "out", export_module.save
    statuses: list[int] = []

    def save_slowly(*arguments: object) -> None:
        if not statuses:
            statuses.append(0)
            statuses.append(convert("export", run.path, out, *(["--force"] if force else []), "--checkpoint", 10))
        save(*arguments)

    monkeypatch.setattr(export_module, "save", save_slowly)
    assert convert("export", run.path, out) == 0
    output = capsys.readouterr()
    assert statuses == [0, 2]
    assert f"error: {out}: is in use by process {os.getpid()} on " in output.err
    assert "step 20, " in output.out
    weights = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr(export_module, "check_out", lambda *_: None)  # it looked before the first one had ended
    assert f"{out}: exists" in _refused(capsys, convert("export", run.path, out, "--checkpoint", 10))
    assert (out / "model.safetensors").read_bytes() == weights


def test_what_a_killed_export_left_goes_with_the_next(convert, make_run, tmp_path, monkeypatch) -> None:
    run, _ = make_run()
    if (pid := os.fork()) == 0:
        monkeypatch.setattr(export_module, "save", lambda *_: os._exit(9))
        convert("export", run.path, tmp_path / "out")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert any(path.name.startswith(".out.partial-") for path in tmp_path.iterdir())
    assert convert("export", run.path, tmp_path / "out") == 0
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_a_failure_leaves_nothing_behind_and_what_was_there_alone(convert, make_run, tmp_path, monkeypatch) -> None:
    run, _ = make_run()
    out = tmp_path / "out"
    assert convert("export", run.path, out, "--checkpoint", 10) == 0
    before = (out / "model.safetensors").read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(companions.shutil, "copy", full_disk)
    assert convert("export", run.path, out, "--force") == 2
    assert convert("export", run.path, tmp_path / "new") == 2
    assert (out / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_what_is_refused(convert, make_run, tmp_path, prepared, capsys) -> None:
    run, _ = make_run()
    out = tmp_path / "out"
    assert "not a run folder" in _refused(capsys, convert("export", tmp_path / "none", out, "--no-tokenizer"))
    message = _refused(capsys, convert("export", run.path, out, "--checkpoint", 15))
    assert "--checkpoint is 15" in message
    assert "has: 10, 20" in message
    assert "--max-shard-size is huge" in _refused(capsys, convert("export", run.path, out, "--max-shard-size", "huge"))
    config = run.config()
    run.write_config(
        config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "gone")})})
    )
    message = _refused(capsys, convert("export", run.path, out))
    assert "gone: no such folder of prepared data" in message
    assert "--no-tokenizer" in message
    assert not out.exists()


def test_a_tokenizer_that_is_not_the_one_of_the_tokens_is_refused(
    convert, make_run, tmp_path, prepared, capsys
) -> None:
    run, _ = make_run()
    other = tmp_path / "data"
    (other / "tokenizer").mkdir(parents=True)
    for file in (prepared / "tokenizer").iterdir():
        (other / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (other / "manifest.json").write_bytes((prepared / "manifest.json").read_bytes())
    config = run.config()
    run.write_config(config.model_copy(update={"data": config.data.model_copy(update={"path": str(other)})}))
    assert convert("export", run.path, tmp_path / "fine") == 0
    capsys.readouterr()
    changed = json.loads((other / "tokenizer" / "tokenizer.json").read_text())
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    (other / "tokenizer" / "tokenizer.json").write_text(json.dumps(changed))
    message = _refused(capsys, convert("export", run.path, tmp_path / "out"))
    assert "is not the tokenizer that made the tokens" in message


def _record(run: RunFolder, validation: dict[str, Path]) -> None:
    """Record the run's data as training does."""
    config = run.config()
    paths = {name: str(path) for name, path in validation.items()}
    run.write_config(config.model_copy(update={"data": config.data.model_copy(update={"validation": paths})}))
    digests = {name: Manifest.read(path).digest() for name, path in validation.items()}
    run.write_data_digests(DataDigests(train=Manifest.read(config.data.path).digest(), validation=digests))


def _move_data(run: RunFolder, folder: Path, **changes: object) -> Path:
    """Train on a copy of the run's data in `folder`, its manifest changed."""
    config = run.config()
    shutil.copytree(config.data.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))
    run.write_config(config.model_copy(update={"data": config.data.model_copy(update={"path": str(folder)})}))
    return folder


def _with_other_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the tokenizer in a folder of data, and its record of it."""
    file = folder / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer_sha256"] = tokenizer_sha256(folder / "tokenizer")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _drop_a_merge(content: dict[str, Any]) -> None:
    content["model"]["merges"] = content["model"]["merges"][:-1]


def _write_merges_as_text(content: dict[str, Any]) -> None:
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]


def test_data_that_were_moved_are_the_run_s(convert, make_run, tmp_path) -> None:
    run, _ = make_run()
    _record(run, {})
    _move_data(run, tmp_path / "data")
    assert convert("export", run.path, tmp_path / "out") == 0


def test_data_prepared_again_with_another_tokenizer_are_refused(convert, make_run, tmp_path, capsys) -> None:
    run, _ = make_run()
    _record(run, {})
    _with_other_tokenizer(_move_data(run, tmp_path / "data"), _drop_a_merge)
    message = _refused(capsys, convert("export", run.path, tmp_path / "out"))
    assert f"{tmp_path / 'data'}: holds other tokens, or another tokenizer, than when the run in" in message
    assert "give --no-tokenizer" in message
    assert not (tmp_path / "out").exists()
    assert convert("export", run.path, tmp_path / "out", "--no-tokenizer") == 0


def test_an_unchanged_validation_set_tells_whether_the_tokenizer_is_the_run_s(
    convert, make_run, tmp_path, prepared, capsys
) -> None:
    run, _ = make_run()
    _record(run, {"held out": prepared})
    data = _move_data(run, tmp_path / "data", dtype="uint32")  # other data, one tokenizer
    assert convert("export", run.path, tmp_path / "same") == 0
    _with_other_tokenizer(data, _write_merges_as_text)
    assert convert("export", run.path, tmp_path / "equal") == 0, "written in another way"
    capsys.readouterr()
    _with_other_tokenizer(data, _drop_a_merge)
    message = _refused(capsys, convert("export", run.path, tmp_path / "out"))
    assert f"{data}: its tokenizer is not the one that the run was trained with, that of {prepared}" in message


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(convert, make_run, tmp_path, capsys) -> None:
    run, _ = make_run(vocab_size=64)
    message = _refused(capsys, convert("export", run.path, tmp_path / "out"))
    assert "its tokenizer has 300 tokens, the model 64 rows" in message

"""The model card of an exported run, and its upload to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from PIL import Image

from cllm.cache.accounting import kv_bytes
from cllm.plan.describe import plan_table


@pytest.fixture
def validated(make_run):
    """A run with checkpoints at the steps 10 and 20, validated at 8, 10 and 20, and its decoder."""
    run, decoder = make_run()
    rows = [
        {"step": 8, "tokens": 1, "time": 1, "val/loss": 5.5},
        {"step": 10, "tokens": 2, "time": 2, "val/loss": 4.25, "val/ppl": 70.125, "val/broken": float("nan")},
        {"step": 10, "tokens": 2, "time": 2, "train/loss": 4.5},
        {"step": 20, "tokens": 3, "time": 3, "val/loss": 3.125, "train/loss": 1.875},
    ]
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "env.txt").write_text("cllm: 1\ncommand: train.py --config a.yaml\n")
    return run, decoder


def test_the_card_of_a_run(validated, convert, tmp_path, prepared) -> None:
    run, decoder = validated
    assert convert("export", run.path, tmp_path / "out") == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("cllm", "text-generation")
    assert card.data.tags == ["cllm", "fusedkv"]
    assert plan_table(decoder.plan) in card.text
    parameters = sum(tensor.numel() for tensor in decoder.state_dict().values())
    assert f" {parameters:,} " in card.text
    assert f" {kv_bytes(decoder.config).resident:,.0f} bytes a token (50.0% of mha)" in card.text
    assert f"`{prepared.name}`" in card.text
    assert "python train.py --config a.yaml" in card.text
    assert "Validation at step 20" in card.text
    assert "3.125" in card.text
    assert "1.875" not in card.text
    assert "(plan.png)" in card.text
    with Image.open(tmp_path / "out" / "plan.png") as picture:
        picture.verify()


def test_converted_folders_have_a_card(chat_llama, convert, tmp_path) -> None:
    assert convert("import", chat_llama, tmp_path / "ours") == 0
    assert convert("plain", tmp_path / "ours", tmp_path / "back") == 0
    for folder, library, tags in (("ours", "cllm", ["cllm", "mha"]), ("back", "transformers", ["llama", "mha"])):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert (card.data.library_name, card.data.tags) == (library, tags)
        assert ("import cllm" in card.text) == (library == "cllm")
        assert "| KV cache in bf16, stored | 128 bytes a token (100.0% of mha) |" in " ".join(card.text.split())
        assert (tmp_path / folder / "plan.png").exists()
    assert "`chat-llama` from the format of llama" in (tmp_path / "ours" / "README.md").read_text()
    assert "`ours` in the format of llama" in (tmp_path / "back" / "README.md").read_text()


def test_metrics_are_those_of_the_exported_checkpoint(validated, convert, tmp_path) -> None:
    run, _ = validated
    assert convert("export", run.path, tmp_path / "out", "--checkpoint", 10) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Validation at step 10" in text
    for number, shown in (("4.25", True), ("70.125", True), ("5.5", False), ("3.125", False), ("nan", False)):
        assert (f" {number} " in text) is shown


def test_a_run_without_metrics_has_a_card_without_them(validated, convert, tmp_path, caplog) -> None:
    run, _ = validated
    run.metrics_file.write_text("broken\nand more\n")
    (run.path / "env.txt").unlink()
    assert convert("export", run.path, tmp_path / "out") == 0
    assert "the model card has no metrics" in caplog.text
    text = (tmp_path / "out" / "README.md").read_text()
    assert "## KV plan" in text
    assert "Validation" not in text
    assert "## Command" not in text


class FakeApi:
    """Records what is uploaded; raises `error` if there is one."""

    error: Exception | None = None
    uploaded: ClassVar[list[dict]] = []

    def __init__(self) -> None:
        FakeApi.uploaded = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> huggingface_hub.RepoUrl:
        assert private
        assert exist_ok
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, **options) -> None:
        if self.error is not None:
            raise self.error
        FakeApi.uploaded.append(options)


@pytest.fixture
def hub(monkeypatch) -> type[FakeApi]:
    """A Hub that takes everything, and a token for it."""
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    monkeypatch.setattr(FakeApi, "error", None)
    return FakeApi


def test_push_uploads_the_folder(make_run, convert, hub, tmp_path, capsys) -> None:
    run, _ = make_run()
    assert convert("export", run.path, tmp_path / "out", "--push", "me/model") == 0
    (upload,) = hub.uploaded
    assert (upload["repo_id"], Path(upload["folder_path"])) == ("me/model", tmp_path / "out")
    assert upload["commit_message"] == "a at step 20"
    assert upload["ignore_patterns"] == [".cllm"]
    assert capsys.readouterr().out.splitlines()[-1] == "uploaded: https://huggingface.co/me/model"


@pytest.mark.parametrize(("repo", "message"), [("a/b/c", "--push is a/b/c; allowed"), ("", "--push is empty")])
def test_a_name_that_is_no_repository_is_refused(repo, message, make_run, convert, hub, tmp_path, capsys) -> None:
    run, _ = make_run()
    assert convert("export", run.path, tmp_path / "out", "--push", repo) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_token_nothing_is_exported(make_run, convert, hub, monkeypatch, tmp_path, capsys) -> None:
    run, _ = make_run()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert convert("export", run.path, tmp_path / "out", "--push", "me/model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --push me/model: there is no token of the Hugging Face Hub")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_failed_upload_leaves_the_folder(make_run, convert, hub, monkeypatch, tmp_path, capsys) -> None:
    run, _ = make_run()
    monkeypatch.setattr(FakeApi, "error", HTTPError("no route\nto host"))
    assert convert("export", run.path, tmp_path / "out", "--push", "me/model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --push me/model: the upload failed")
    assert error.endswith("no route to host\n")
    assert (tmp_path / "out" / "model.safetensors").exists()

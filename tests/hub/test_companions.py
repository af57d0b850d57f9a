"""Companions of a checkpoint: import, plain, export and uptraining copy the same files."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GenerationConfig

from cllm.config import Config
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.hub.companions import FOLDER, companions, generation_values, keep_companions
from cllm.hub.exchange import export_folder, import_folder
from cllm.hub.export import export_run
from cllm.train.run import train
from cllm.uptrain.complete import complete

CHAT = {"eos_token_id": [1, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
COMPANIONS = [
    *("LICENSE.txt", "additional_chat_templates/tool_use.jinja", "chat_template.jinja", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
]


def names(folder: Path) -> list[str]:
    """Every file in `folder` that is neither weights nor their config, nor cllm's mark or a model card of cllm."""
    found = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    ours = ["config.json", "model.safetensors", "weights.sha256.json", ".cllm"]
    card = (folder / "README.md").read_text() if "README.md" in found else ""
    if card.startswith(("---\nlibrary_name: cllm\n", "---\nlibrary_name: transformers\n")):
        ours += ["README.md", "plan.png"]
    return [name for name in found if name not in ours]


def add_code(file: Path) -> None:
    """Let a JSON file ask for code, as `auto_map` does."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoConfig": "modeling.Evil"}}))


def check(folder: Path) -> None:
    """The companions of `chat_llama` and nothing else are in `folder`, and transformers reads them."""
    assert names(folder) == COMPANIONS
    assert set(AutoTokenizer.from_pretrained(folder).chat_template) == {"default", "tool_use"}
    assert json.loads((folder / "generation_config.json").read_text()) == CHAT
    read = GenerationConfig.from_pretrained(folder)
    assert {key: getattr(read, key) for key in CHAT} == CHAT


def test_import_and_plain_take_the_companions_and_nothing_else(chat_llama, tmp_path) -> None:
    assert companions(chat_llama) == COMPANIONS
    import_folder(chat_llama, tmp_path / "in")
    check(tmp_path / "in")
    export_folder(tmp_path / "in", tmp_path / "out")
    check(tmp_path / "out")


def test_an_uptrained_run_keeps_the_companions_of_its_source(chat_llama, prepared, tmp_path) -> None:
    """The export needs neither the source nor the data, and a run that starts from the run inherits them."""
    data = {
        "runs_dir": str(tmp_path / "runs"),
        "data": {"path": str(prepared), "seq_len": 16, "num_workers": 0, "validation_sequences": 2},
        "train": {"steps": 1, "global_batch": 2, "micro_batch": 2, "accelerator": "cpu", "validate_every": None},
        "model": {"kv": {"preset": "cla"}},
    }
    run = train(validate(Config, complete({**data, "name": "first", "init": {"from": str(chat_llama)}})[0]))
    keep_companions(run.path, tmp_path / "second", 320)
    assert names(tmp_path / "second" / FOLDER) == COMPANIONS
    chat_llama.rename(tmp_path / "gone")
    moved = run.config()
    run.write_config(moved.model_copy(update={"data": moved.data.model_copy(update={"path": str(tmp_path / "no")})}))
    exported = export_run(run.path, tmp_path / "out")
    check(tmp_path / "out")
    assert exported.step == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"]) == ([1, 0], 0)
    export_run(run.path, tmp_path / "bare", tokenizer=False)
    assert names(tmp_path / "bare") == ["LICENSE.txt", "generation_config.json"]
    assert json.loads((tmp_path / "bare" / "generation_config.json").read_text()) == CHAT


def test_named_templates_of_the_data_are_exported(chat_llama, make_run, prepared, tmp_path) -> None:
    run, _ = make_run()
    data = tmp_path / "data"
    shutil.copytree(prepared, data)
    for name in ("chat_template.jinja", "additional_chat_templates"):
        copy = shutil.copytree if (chat_llama / name).is_dir() else shutil.copy
        copy(chat_llama / name, data / "tokenizer" / name)
    (data / "tokenizer" / "modeling.py").write_text("evil")
    config = run.config()
    run.write_config(config.model_copy(update={"data": config.data.model_copy(update={"path": str(data)})}))
    export_run(run.path, tmp_path / "out")
    assert names(tmp_path / "out") == [name for name in COMPANIONS if name != "LICENSE.txt"]


def test_code_is_asked_for_by_no_copy(chat_llama, tmp_path) -> None:
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        add_code(chat_llama / name)
    import_folder(chat_llama, tmp_path / "in")
    export_folder(tmp_path / "in", tmp_path / "out")
    for folder in ("in", "out"):
        check(tmp_path / folder)
        assert not [file for file in (tmp_path / folder).glob("*.json") if "auto_map" in file.read_text()]


def test_links_of_the_hugging_face_cache_are_copied_as_files(chat_llama, tmp_path) -> None:
    """Its snapshots consist of links to ../../blobs."""
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    for file in sorted(chat_llama.rglob("*")):
        if file.is_file():
            blob = tmp_path / "cache" / "blobs" / file.name
            link = snapshot / file.relative_to(chat_llama)
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, blob)
            link.symlink_to(blob)
    import_folder(snapshot, tmp_path / "in")
    check(tmp_path / "in")
    assert not any(file.is_symlink() for file in (tmp_path / "in").rglob("*"))


def test_a_folder_of_templates_elsewhere_is_refused(chat_llama, tmp_path) -> None:
    (chat_llama / "additional_chat_templates").rename(tmp_path / "elsewhere")
    (chat_llama / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"additional_chat_templates: leads out of .* through a symbolic link"):
        import_folder(chat_llama, tmp_path / "in")
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    ("given", "kept", "warning"),
    [
        (CHAT, CHAT, None),
        ({"do_sample": False, "temperature": 0.9}, {"do_sample": False, "temperature": 0.9}, None),
        ({"eos_token_id": [1, 320]}, {"eos_token_id": [1]}, "eos_token_id is [1, 320]"),
        ({"pad_token_id": -1}, {"pad_token_id": None}, "pad_token_id is -1"),
        ({"cache_implementation": "static"}, {"cache_implementation": "static"}, None),
        ({"cache_implementation": "hybrid", "top_k": 3}, {"top_k": 3}, "cache_implementation hybrid is left out"),
    ],
)
def test_generation_values_are_kept_where_the_model_can_follow(tmp_path, caplog, given, kept, warning) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert generation_values(tmp_path, 320) == kept
    assert ("" if warning is None else warning) in caplog.text
    assert (warning is None) == (caplog.text == "")


def test_without_a_generation_config_the_ids_of_config_json_stand(chat_llama, tmp_path) -> None:
    (chat_llama / "generation_config.json").unlink()
    config = json.loads((chat_llama / "config.json").read_text()) | {"eos_token_id": [7, 9], "bos_token_id": 5}
    (chat_llama / "config.json").write_text(json.dumps(config))
    import_folder(chat_llama, tmp_path / "in")
    written = json.loads((tmp_path / "in" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 5, "eos_token_id": [7, 9]}
    keep_companions(chat_llama, tmp_path / "run", 320)
    assert json.loads((tmp_path / "run" / FOLDER / "generation_config.json").read_text()) == written


def test_a_damaged_companion_is_one_line(chat_llama, tmp_path) -> None:
    (chat_llama / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config\.json: holds a list; allowed: a JSON object"):
        import_folder(chat_llama, tmp_path / "in")

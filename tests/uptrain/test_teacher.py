"""What `init.from` may name, and what the student's config takes from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from cllm.config import Config
from cllm.config.uptraining import InitFrom
from cllm.data.manifest import Manifest
from cllm.data.vocabulary import tokenizer_sha256
from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.plan.presets import preset_names
from cllm.runs import RunFolder, load_run
from cllm.train.run import train
from cllm.uptrain.complete import load_config
from cllm.uptrain.init import init_student
from cllm.uptrain.start import check_tokenizer
from cllm.uptrain.teacher import check_student, load_teacher, student_model, teacher_config

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
SIZES |= {"num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A Llama folder made with transformers alone."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            **SIZES,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).save_pretrained(folder)
    return folder


def config_from(folder: Path, *settings: str) -> Config:
    file = folder / "student.yaml"
    file.write_text(yaml.safe_dump({"model": {"kv": {"preset": "fusedkv", "n_kv_heads": 2}}, "data": {"seq_len": 32}}))
    return load_config([file], ["--init.from", str(folder), *settings])


def test_a_llama_folder_gives_its_logits_and_its_shape(llama: Path) -> None:
    ids = torch.randint(0, 320, (2, 16))
    expected = LlamaForCausalLM.from_pretrained(llama).eval()(ids).logits
    torch.testing.assert_close(load_teacher(llama).decoder(ids), expected, atol=1e-4, rtol=1e-4)
    model = config_from(llama).model
    assert (model.d_model, model.n_layers, model.n_heads, model.d_ff, model.vocab_size) == (32, 4, 4, 64, 320)
    assert model.kv.preset == "fusedkv"


def test_an_exported_folder_and_a_run_give_the_weights_they_hold(tiny, tmp_path: Path) -> None:
    config = tiny("--train.steps", "2", "--model.match_params", "true", "--model.kv.preset", "cla")
    run = train(config)
    decoder, saved, _ = load_run(run.path)
    model = CLLMForCausalLM(CLLMConfig(model=saved.model))
    model.model.load_state_dict(decoder.state_dict())
    model.save_pretrained(tmp_path / "export")
    ids = torch.randint(0, 320, (1, 16))
    for path in (run.path, run.checkpoints()[-1][1], tmp_path / "export"):
        assert torch.equal(load_teacher(path).decoder(ids), decoder(ids)), path
        assert not teacher_config(path).match_params
        assert teacher_config(path).d_ff == decoder.blocks[0].mlp.up_proj.out_features
    (tmp_path / "export" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"init.from .*export: its weights cannot be read: .*model\.safetensors"):
        load_teacher(tmp_path / "export")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--model.d_model", "64"], "model.d_model is 64, but the model that init.from names, .*, needs 32"),
        (
            ["--model.rope.theta", "5e5"],
            r"model.rope.theta is 500000.0, but .* needs 10000.0: set it to that, or leave it",
        ),
        (["--model.vocab_size", "512"], "model.vocab_size is 512"),
        (["--model.match_params", "true"], "model.match_params is True"),
        (["--model.max_seq_len", "128"], "model.max_seq_len is 128"),
    ],
)
def test_a_student_of_another_shape_is_refused(llama: Path, prepared: Path, tmp_path, settings, message) -> None:
    settings = [*settings, "--data.path", str(prepared), "--train.accelerator", "cpu", "--runs_dir", str(tmp_path)]
    with pytest.raises(UserError, match=message):
        train(config_from(llama, *settings))


def test_high_frequencies_are_kept_by_another_theta(llama: Path) -> None:
    latent = "{preset: mla, qk_rope_head_dim: 4}"
    assert config_from(llama, "--model.kv", latent).model.rope.theta == 10000.0 ** (4 / 8)
    assert config_from(llama, "--model.kv", latent, "--init.rope_pairs", "uniform").model.rope.theta == 10000.0


def test_the_base_of_rope_that_latents_need_is_named_where_the_config_gives_the_shape(llama: Path, tmp_path) -> None:
    """Such as the config of the teacher's own run."""
    file, settings = tmp_path / "config.yaml", config_from(llama).as_yaml_data()
    file.write_text(yaml.safe_dump({"model": settings["model"], "data": settings["data"]}))

    def check(*settings: str) -> None:
        svd = ["--init.method", "svd", "--model.kv", "{preset: mla, qk_rope_head_dim: 4}", *settings]
        config = load_config([file], ["--init.from", str(llama), *svd])
        check_student(config.model, teacher_config(llama), path=llama, rope_pairs=config.init.rope_pairs)

    message = r"model.rope.theta is 10000.0, but .* needs 100.0: set it to that, or init.rope_pairs to uniform, which"
    with pytest.raises(UserError, match=message):
        check()
    check("--model.rope.theta", "100")
    check("--init.rope_pairs", "uniform")


def test_a_resolved_config_is_read_without_its_teacher(llama: Path, tmp_path: Path) -> None:
    data = config_from(llama).as_yaml_data()
    data["init"]["from"] = str(tmp_path / "gone")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    assert load_config([file]).model.d_model == 32


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such run, checkpoint or Hugging Face folder"),
        ({}, "neither a run .* nor a Hugging Face folder"),
        ({"config.json": "{}"}, "it has no config.json with a model_type"),
        ({"config.json": '{"model_type": "mixtral"}'}, "mixtral"),
        ({"config.yaml": "model: 3"}, "model"),
    ],
)
def test_folders_that_hold_no_model_are_refused(tmp_path: Path, files, message: str) -> None:
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        load_teacher(folder)


def test_damaged_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(UserError, match="holds no weights"):
        load_teacher(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_teacher(tmp_path)
    changed = json.loads((llama / "config.json").read_text()) | {"num_hidden_layers": 5}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"layers\.4"):
        load_teacher(tmp_path)


def test_windows_are_not_dropped_unsaid(prepared: Path, tmp_path: Path) -> None:
    options = {"num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 20, "head_dim": 8}
    MistralForCausalLM(MistralConfig(**SIZES, **options)).save_pretrained(tmp_path)
    teacher = teacher_config(tmp_path)
    layers = [{"layers": "0-1", "own": {"n_kv_heads": 2}, "window": 20}]
    layers += [{"layers": "2-3", "keys": {"share": 1}, "values": {"share": 1}, "window": 20}]
    data = ["--data.path", str(prepared), "--train.accelerator", "cpu", "--runs_dir", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=r"model.kv has no sliding window, but layer 0 .* has one of 20 tokens"):
        train(config_from(tmp_path, *data))
    said = config_from(tmp_path, "--model.kv", yaml.safe_dump({"layers": layers}, default_flow_style=True))
    short = config_from(tmp_path, "--model.max_seq_len", "20", "--data.seq_len", "20")
    for config in (said, short):
        check_student(config.model, teacher, path=tmp_path, rope_pairs="high")


def test_data_of_another_tokenizer_is_refused(llama: Path, prepared: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "llama", Manifest.load(prepared)
    shutil.copytree(llama, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepared / "tokenizer" / name, folder)
    file = folder / "tokenizer.json"
    same = json.loads(file.read_text())
    merges = [" ".join(pair) for pair in same["model"]["merges"]]  # as older programs write them
    file.write_text(json.dumps(same | {"model": same["model"] | {"merges": merges}}))
    check_tokenizer(folder, data)
    file.write_text(json.dumps(same | {"model": same["model"] | {"merges": merges[1:]}}))
    settings = ["--data.path", str(prepared), "--train.accelerator", "cpu", "--runs_dir", str(tmp_path / "runs")]
    for text in (file.read_text(), "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"not prepared with the tokenizer of init.from"):
            train(config_from(folder, *settings))


def test_what_transformers_makes_of_a_folder_is_its_tokenizer(llama: Path, prepared: Path, tmp_path: Path) -> None:
    """The same answer as evaluation gives: the class named in tokenizer_config.json has rules of its own."""
    from transformers import AutoTokenizer

    folder, data = tmp_path / "llama", shutil.copytree(prepared, tmp_path / "data")
    shutil.copytree(llama, folder)
    shutil.copy(prepared / "tokenizer" / "tokenizer.json", folder)
    record = json.loads((prepared / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(record | {"tokenizer_class": "Qwen2Tokenizer"}))
    shutil.rmtree(data / "tokenizer")
    AutoTokenizer.from_pretrained(folder).save_pretrained(data / "tokenizer")
    manifest = Manifest.read(data).model_copy(update={"tokenizer_sha256": tokenizer_sha256(data / "tokenizer")})
    check_tokenizer(folder, manifest)
    with pytest.raises(UserError, match=r"not prepared with the tokenizer of init.from"):
        check_tokenizer(folder, Manifest.read(prepared))


def test_a_run_brings_the_tokenizer_of_its_data(tiny, prepared: Path, tmp_path: Path, caplog) -> None:
    own, other = (shutil.copytree(prepared, tmp_path / name) for name in ("own", "other"))
    run = RunFolder(tmp_path / "run")
    run.write_config(tiny("--data.path", str(own)))
    file = other / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"normalizer": {"type": "NFC"}}))
    manifest = Manifest.read(other)
    check_tokenizer(run.path, manifest)
    manifest.tokenizer_sha256 = tokenizer_sha256(other / "tokenizer")
    for path in (run.path, run.checkpoint_path(3)):
        with pytest.raises(UserError, match=rf"not prepared with the tokenizer of init.from, that of {own}"):
            check_tokenizer(path, manifest)
    shutil.rmtree(own)
    check_tokenizer(run.path, manifest)
    assert "its tokenizer is not compared with that of the data" in caplog.text


@pytest.mark.usefixtures("warm_python")
def test_the_command_line_answers_a_bad_folder_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "student.yaml"
    file.write_text("model: {kv: {preset: cla}}")
    command = [sys.executable, "train.py", "--config", str(file), "--init.from", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "init.from" in done.stderr


LATENTS = [
    {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3},
    {"kv_lora_rank": 5, "qk_nope_head_dim": 2, "qk_rope_head_dim": 4, "v_head_dim": 4},
]
BESIDES = {"layers": [{"layers": 0, "own": {}}, *({"layers": n, "latent": of} for n, of in enumerate(LATENTS, 1))]}
"""Layers that rotate 8, 2 and 4 channels."""


@pytest.mark.parametrize("name", [*sorted(set(preset_names()) - {"yoco_u"}), "latents beside keys and values"])
def test_a_student_with_its_teachers_plan_is_the_teacher(
    name, preset_config, tiny_config, make_teacher, new_student, ids
) -> None:
    """RoPE's theta too, which changes only for latents that the teacher has not. A loop is refused."""
    own = name in preset_names()
    teacher = make_teacher(preset_config(name) if own else tiny_config(n_layers=3, kv=BESIDES))
    student = new_student(teacher, teacher.config.model_dump(mode="json")["kv"])
    init_student(student, teacher, InitFrom())
    with torch.no_grad():
        assert torch.equal(student(ids), teacher(ids))


def test_theta_changes_for_latents_that_the_teacher_has_not(preset_config, tiny_config) -> None:
    latent = preset_config("mla")  # RoPE keys of 4 channels in place of 8
    thetas = [
        student_model(teacher, latent.kv.model_dump(), rope_pairs=pairs)["rope"]["theta"]
        for teacher, pairs in ((tiny_config(), "high"), (tiny_config(), "uniform"), (latent, "high"))
    ]
    assert thetas == [100.0, 10000.0, 10000.0]

"""Damaged checkpoint folders: evaluation, uptraining and `plain` answer with one short line, or compute the same."""

import ast
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cllm.errors import UserError
from cllm.evaluate.subjects import load_subject
from cllm.hub.checksums import CHECKSUMS, check_checksums
from cllm.hub.exchange import export_folder, import_folder
from cllm.uptrain.teacher import load_teacher

WEIGHTS = "model.safetensors"


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def _config(**values: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def _cut(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def _rename_all(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def _elsewhere(folder: Path) -> None:
    """One of two shards is outside of the folder, where the index points."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    places = {name: "../b.safetensors" if "norm" in name else "a.safetensors" for name in tensors}
    for place in ("a.safetensors", "../b.safetensors"):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        save_file(part, folder / place, metadata={"format": "pt"})
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _last(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(tensors, reverse=True) if "norm" in name)


DAMAGES = {
    "no header": lambda f: (f / WEIGHTS).write_bytes(b""),
    "cut header": lambda f: _cut(f, 20),
    "cut data": lambda f: _cut(f, -10),
    "a header of 2^60 bytes": lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}" * 100),
    "noise": lambda f: (f / WEIGHTS).write_bytes(b"\xaa" * 5000),
    "a pickle by that name": lambda f: torch.save({"a": torch.ones(2)}, f / WEIGHTS),
    "no weights": lambda f: (f / WEIGHTS).unlink(),
    "only pickled weights": lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"),
    "a tensor is missing": _tensors(lambda t: t.pop(_last(t))),
    "all tensors have other names": _tensors(_rename_all),
    "a tensor has another shape": _tensors(lambda t: t.update({_last(t): torch.ones(3)})),
    "every tensor has another shape": _tensors(lambda t: t.update({n: torch.ones(3) for n in t})),
    "no JSON": lambda f: (f / "config.json").write_text('{"model_type"'),
    "a list": lambda f: (f / "config.json").write_text("[]"),
    "another model_type": _config(model_type="bert"),
    "an unknown model_type": _config(model_type="x" * 5000),
    "a model_type that is a list": _config(model_type=["llama"]),
    "more layers": _config(num_hidden_layers=3),
    "a billion layers": _config(num_hidden_layers=10**9),
    "a vocabulary of 1e12": _config(vocab_size=10**12),
    "a width of 1e9": _config(hidden_size=10**9),
    "a width that is a text": _config(hidden_size="wide"),
    "a width that is null": _config(hidden_size=None),
    "no heads": _config(num_attention_heads=0),
    "a shard outside of the folder": _elsewhere,
    "code": _config(model_type="evil", auto_map={"AutoConfig": "e.E", "AutoModelForCausalLM": "e.E"}),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_of_another_family_is_one_short_line(chat_llama, tmp_path, name: str) -> None:
    DAMAGES[name](chat_llama)
    for load in (
        lambda: load_subject(chat_llama, torch.device("cpu")),
        lambda: load_teacher(chat_llama),
        lambda: import_folder(chat_llama, tmp_path / "out"),
    ):
        with pytest.raises(UserError) as refused:
            load()
        assert len(str(refused.value)) <= 500 + str(refused.value).count(str(chat_llama)) * len(str(chat_llama))
        assert str(chat_llama) in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in ("another model_type",)])
def test_a_damaged_folder_of_ours_is_one_short_line(chat_llama, tmp_path, name: str) -> None:
    ours = tmp_path / "ours"
    import_folder(chat_llama, ours)
    (ours / CHECKSUMS).unlink()
    DAMAGES[name](ours)
    for load in (
        lambda: load_subject(ours, torch.device("cpu")),
        lambda: load_teacher(ours),
        lambda: export_folder(ours, tmp_path / "out"),
    ):
        with pytest.raises(UserError) as refused:
            load()
        assert len(str(refused.value)) <= 600 + str(refused.value).count(str(ours)) * len(str(ours))
        assert str(ours) in str(refused.value)


def test_every_name_of_a_renamed_checkpoint_is_counted(chat_llama) -> None:
    _tensors(_rename_all)(chat_llama)
    with pytest.raises(UserError, match=r"missing: lm_head\.weight, model\.embed_tokens\.weight and 19 more; not in"):
        load_subject(chat_llama, torch.device("cpu"))


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 10**12), ("hidden_size", 10**9)])
def test_sizes_that_the_files_cannot_hold_are_refused_before_anything_is_built(chat_llama, key, value) -> None:
    _config(**{key: value})(chat_llama)
    with pytest.raises(UserError, match=rf"config\.json: .*{key} {value}.*: the weight files are too small for it"):
        load_subject(chat_llama, torch.device("cpu"))


def test_tensors_that_the_model_has_not_are_said(chat_llama, caplog) -> None:
    _tensors(lambda t: t.update(more=torch.ones(2)))(chat_llama)
    load_subject(chat_llama, torch.device("cpu"))
    assert "tensors are left out: not in the model: more" in caplog.text


def test_a_folder_of_links_as_in_the_hugging_face_cache_is_loaded(chat_llama, tmp_path) -> None:
    """A link is the choice of whoever made the folder; a name in a file's content is not."""
    snapshot = tmp_path / "cache" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (tmp_path / "cache" / "blobs").mkdir()
    for file in chat_llama.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path / "cache" / "blobs" / file.name)
            (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    subject, ids = load_subject(snapshot, torch.device("cpu")), torch.arange(8)[None]
    with torch.no_grad():
        expected = load_subject(chat_llama, torch.device("cpu")).logits(ids, None, None, 8)
        assert torch.equal(subject.logits(ids, None, None, 8), expected)
    assert subject.tokenizer.eos_token_id == 0


def test_the_auto_classes_of_transformers_are_used_in_a_few_places() -> None:
    """They offer to run code. `trust.py` and `loading.py` refuse it, the others do not load folders."""
    root = Path(__file__).resolve().parents[2]
    found = set()
    folders = ("cllm", "scripts", "benchmarks", "experiments", "data")
    for file in (file for folder in folders for file in (root / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and node.id.startswith(("AutoTokenizer", "AutoConfig", "AutoModel")):
                found.add(file.relative_to(root).as_posix())
    registering = {"cllm/hub/config.py", "cllm/hub/base.py", "cllm/hub/model.py"}
    benchmark = {"benchmarks/decode/peers.py"}
    assert found == {"cllm/trust.py", "cllm/hub/loading.py"} | registering | benchmark


# ---- checksums -------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_in_the_weights_is_found(chat_llama, tmp_path) -> None:
    ours = tmp_path / "ours"
    import_folder(chat_llama, ours)
    file = ours / WEIGHTS
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for i in range(40):
        place = header + (len(content) - header) * i // 40
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << i % 8]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"model\.safetensors: damaged: its sha256"):
            check_checksums(ours)
    for load in (lambda: load_subject(ours, torch.device("cpu")), lambda: load_teacher(ours)):
        with pytest.raises(UserError, match=r"model\.safetensors: damaged: its sha256"):
            load()
    file.write_bytes(content)
    check_checksums(ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / WEIGHTS).unlink(), "missing"),
        (lambda f: _cut(f, -1), "damaged: .* bytes"),
        (lambda f: shutil.copy(f / WEIGHTS, f / "model-2.safetensors"), r"model-2\.safetensors: is not in"),
        (lambda f: (f / CHECKSUMS).write_text('{"model.safetensors": 3}'), "allowed: its bytes and sha256"),
        (lambda f: (f / CHECKSUMS).write_text('{"../x": {}}'), r"names '\.\./x'"),
        (lambda f: (f / CHECKSUMS).write_text("["), "cannot be read"),
    ],
)
def test_checksums_that_do_not_fit(chat_llama, tmp_path, change, message: str) -> None:
    import_folder(chat_llama, tmp_path / "ours")
    check_checksums(tmp_path / "ours")
    change(tmp_path / "ours")
    with pytest.raises(UserError, match=message):
        check_checksums(tmp_path / "ours")


def test_every_folder_that_is_written_has_checksums(chat_llama, make_run, tmp_path) -> None:
    from cllm.hub.export import export_run

    import_folder(chat_llama, tmp_path / "in", max_shard_size="5KB")
    export_folder(tmp_path / "in", tmp_path / "plain")
    export_run(make_run()[0].path, tmp_path / "run")
    for name in ("in", "plain", "run"):
        listed = json.loads((tmp_path / name / CHECKSUMS).read_text())
        assert sorted(listed) == sorted(file.name for file in (tmp_path / name).glob("*.safetensors"))
        check_checksums(tmp_path / name)
    assert len(json.loads((tmp_path / "in" / CHECKSUMS).read_text())) > 1

"""Runs and folders that are broken, link elsewhere, bring code or may not be written."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from cllm.config import Config
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.evaluate.comparison import compare as compare_runs
from cllm.evaluate.comparison import find_runs
from cllm.runs import RunFolder, load_run
from cllm.train.folder import open_folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _refused(capsys, status: int) -> str:
    captured = capsys.readouterr()
    assert (status, captured.out) == (2, "")
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def _write_metrics(run: RunFolder, *rows: object) -> None:
    run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _summary(run: RunFolder) -> dict:
    both = {"resident": 1.0, "read": 1.0}
    summary = {"design": "cla", "parameters": 5, "steps": 20, "kv_bytes_per_token": both, "kv_vs_mha": both}
    run.summary_file.write_text(json.dumps(summary))
    _write_metrics(run, {"step": 1, "tokens": 10, "val/loss": 2.0})
    return summary


# ---- where results go ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--posthoc", "none")])
def test_with_out_nothing_is_written_in_the_run(evaluate, make_run, tmp_path, more) -> None:
    run, _ = make_run()
    before = _content(run.path)
    assert evaluate("--run", run.path, "--out", tmp_path / "out", "--max-tokens", 60, *more) == 0
    assert _content(run.path) == before
    assert list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize("name", ["evaluation", "tensorboard"])
def test_a_link_out_of_the_run_is_not_written_through(evaluate, make_run, tmp_path, capsys, name) -> None:
    run, _ = make_run()
    (tmp_path / "elsewhere").mkdir()
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    message = _refused(capsys, evaluate("--run", run.path, "--max-tokens", 20))
    assert f"{run.path / name}: leads out of {run.path} through a symbolic link" in message
    assert not list((tmp_path / "elsewhere").iterdir())
    assert evaluate("--run", run.path, "--max-tokens", 20, "--out", tmp_path / "out") == 0
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["evaluation", "tensorboard", "checkpoints"])
def test_a_link_out_of_the_run_is_not_trained_through(make_run, tmp_path, name) -> None:
    run, _ = make_run()
    config = run.config()
    if (run.path / name).exists():
        shutil.rmtree(run.path / name)
    (tmp_path / "elsewhere").mkdir()
    (run.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=rf"{name}: leads out of .* through a symbolic link"):
        open_folder(config, "auto", False)


def test_an_evaluation_of_another_run_is_not_read_through_a_link(make_run, tmp_path) -> None:
    run, _ = make_run()
    _summary(run)
    (tmp_path / "elsewhere").mkdir()
    run.evaluation_folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"evaluation: leads out of .* through a symbolic link"):
        compare_runs(find_runs([run.path]))


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".x", "", "a\nb"])
def test_a_validation_set_is_not_called_after_a_path(make_run, name) -> None:
    run, _ = make_run()
    data = run.config().as_yaml_data()
    data["data"]["validation"] = {name: "data/prepared/x"}
    with pytest.raises(UserError, match=r"data(\.validation)?: .*names a set"):
        validate(Config, data)


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", ".."])
def test_compare_takes_no_path_as_a_set(make_run, name) -> None:
    run, _ = make_run()
    _summary(run)
    with pytest.raises(UserError, match=r"--set .*is not the name of a validation set"):
        compare_runs(find_runs([run.path]), set_name=name)


def test_compare_finds_the_evaluation_of_a_set_with_spaces(evaluate, make_run, prepared) -> None:
    run, _ = make_run(data={"validation": {"my set": str(prepared(300))}})
    _summary(run)
    assert evaluate("--run", run.path, "--max-tokens", 30) == 0
    assert compare_runs(find_runs([run.path])).rows[0].source == "evaluate"


# ---- broken runs -----------------------------------------------------------------------------------------------------


def test_an_evaluation_goes_on_without_a_broken_run(evaluate, make_run, capsys) -> None:
    broken, good = make_run("broken")[0], make_run("good")[0]
    broken.checkpoint_path(20).write_bytes(b"not a checkpoint")
    assert evaluate("--run", broken.path, "--run", good.path, "--max-tokens", 20) == 1
    captured = capsys.readouterr()
    assert "good" in captured.out
    assert "broken" not in captured.out
    line = f"left out: {broken.checkpoint_folder}: no checkpoint is intact: {broken.checkpoint_path(20)}: damaged"
    assert line in captured.err
    assert good.evaluation_folder.exists()
    other = make_run("other")[0]
    other.checkpoint_path(20).write_bytes(b"not a checkpoint")
    assert evaluate("--run", broken.path, "--run", other.path) == 2
    assert "none of the 2 runs can be used" in capsys.readouterr().err


BROKEN = {
    "summary.json": ["", "[]", "3", '{"design": "x"}', '{"parameters": "many"}', "[" * 100_000, '{"kv_vs_mha": [1]}'],
    "metrics.jsonl": ["[1]\n", "3\n", '{"step": 1}\n', '{"tokens": "x", "step": 1}\n', "{\n{}\n"],
    "evaluation/validation.json": ["", "[]", "{}", '{"loss": "low"}', '{"loss": NaN, "step": []}'],
    "config.yaml": ["model: 3", "- a", "name: [", ""],
}


@pytest.mark.parametrize(("file", "content"), [(file, text) for file in BROKEN for text in BROKEN[file]])
def test_a_comparison_goes_on_without_a_broken_run(make_run, capsys, file, content) -> None:
    runs = [make_run(name)[0] for name in ("broken", "good")]
    for run in runs:
        _summary(run)
    runs[0].evaluation_folder.mkdir()
    (runs[0].path / file).write_text(content)
    capsys.readouterr()
    comparison = compare_runs(find_runs([run.path for run in runs]))
    assert [row.run for row in comparison.rows] == ["good"]
    assert comparison.left_out == [str(runs[0].path)]
    message = capsys.readouterr().err
    assert message.startswith(f"left out: {runs[0].path}")
    assert message.count("\n") == 1
    assert len(message) < 900
    with pytest.raises(UserError):
        compare_runs(find_runs([runs[0].path]))


def test_compare_ends_with_status_1_where_a_run_was_left_out(compare, make_run, tmp_path, capsys) -> None:
    runs = [make_run(name)[0] for name in ("broken", "good")]
    for run in runs:
        _summary(run)
    assert compare(*[run.path for run in runs], "--out", tmp_path / "out") == 0
    runs[0].summary_file.write_text("[]")
    assert compare(*[run.path for run in runs], "--out", tmp_path / "out") == 1
    assert compare(*[run.path for run in runs], "--out", tmp_path / "out", "--baseline", "broken") == 2


@pytest.mark.parametrize("how", ["renamed", "another shape", "integers", "missing"])
def test_weights_that_do_not_fit_are_one_short_line(make_run, how) -> None:
    run, decoder = make_run()
    state = {f"model.{name}": tensor for name, tensor in decoder.state_dict().items()}
    changed = {
        "renamed": {f"model.layer.{name}": tensor for name, tensor in state.items()},
        "another shape": {name: torch.ones(3) for name in state},
        "integers": {name: tensor.long() for name, tensor in state.items()},
        "missing": {},
    }[how]
    torch.save({"state_dict": changed}, run.checkpoint_path(20))
    with pytest.raises(UserError, match=r"does not fit .*config\.yaml: .* and \d+ more") as refused:
        load_run(run.path)
    assert len(str(refused.value)) <= 400 + 2 * len(str(run.path))


# ---- code ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def code_in_the_data(make_run, prepared, tmp_path, monkeypatch) -> Iterator[RunFolder]:
    """A run whose data's tokenizer asks for Python code beside it, which leaves a trace when it is run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    asked = []

    def ask(prompt: str = "") -> str:
        asked.append(prompt)
        return "n"

    monkeypatch.setattr(builtins, "input", ask)
    run, _ = make_run()
    shutil.copytree(prepared(300), tmp_path / "data")
    tokenizer = tmp_path / "data" / "tokenizer"
    (tokenizer / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    file = tokenizer / "tokenizer_config.json"
    named = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    config = run.config()
    run.write_config(
        config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "data")})})
    )
    yield run
    assert not asked
    assert not (tmp_path / "trace").exists()


def test_no_command_runs_or_offers_the_code_of_a_tokenizer(
    code_in_the_data, evaluate, load_file, tmp_path, capsys
) -> None:
    run, tokenizer = code_in_the_data, tmp_path / "data" / "tokenizer"
    repository = Path(__file__).resolve().parents[2]
    recipe = {"name": "x", "source": {"kind": "files", "paths": [str(tokenizer)]}, "validation": {"fraction": 0.5}}
    recipe["tokenizer"] = {"load": str(tokenizer)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "t.txt").write_text("alpha")
    commands = {
        "evaluate": lambda: evaluate("--run", run.path, "--data", tmp_path / "t.txt"),
        "prepare": lambda: load_file(repository / "data" / "prepare.py").main(
            ["--config", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "new")]
        ),
        "export": lambda: load_file(repository / "scripts" / "convert.py").main(
            ["export", str(run.path), str(tmp_path / "out")]
        ),
    }
    for name, command in commands.items():
        message = _refused(capsys, command())
        assert f"{tokenizer / 'tokenizer_config.json'}: auto_map names Python code" in message, name
    assert not (tmp_path / "out").exists()

"""From files and command lines to a config, and what a mistake is told."""

import inspect
import json
from typing import Any

import pytest

from cllm.commands import cli
from cllm.config import Config
from cllm.config.help import settings_about
from cllm.config.load import config_parser, keys_help, load_settings, merge, parse_overrides, read_yaml
from cllm.errors import UserError
from cllm.plan.presets import preset_names
from cllm.plan.presets.sharing import CLA
from cllm.section import Section, create_section
from cllm.uptrain.complete import load_config
from cllm.yaml_text import parse_yaml

BASE = """
model:
  d_model: 64
  n_layers: 8
  n_heads: 4
  max_seq_len: 1024
"""


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(files, overrides=()) -> str:
    with pytest.raises(UserError) as error:
        load_config(files, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- merging -------------------------------------------------------------------------------------------------------


def test_later_files_win_key_by_key_and_the_command_line_wins_over_all(write):
    a = write("a.yaml", BASE + "optim: {lr: 1e-3, weight_decay: 0.5}\ntrain: {steps: 10}")
    b = write("b.yaml", "optim: {lr: 2e-3}\ntrain: {steps: 20}")
    config = load_settings(Config, [a, b], ["--train.steps", "30"])
    assert (config.optim.lr, config.optim.weight_decay, config.train.steps) == (2e-3, 0.5, 30)
    assert load_settings(Config, [b, a]).train.steps == 10


def test_a_preset_replaces_the_plan_it_lands_on(write):
    a = write("a.yaml", BASE + "  kv: {preset: cla, factor: 4, n_kv_heads: 2}")
    b = write("b.yaml", "model: {kv: {preset: mha}}")
    config = load_settings(Config, [a, b])
    assert (config.model.kv.preset, config.model.kv.n_kv_heads) == ("mha", None)


def test_options_without_a_preset_merge_into_the_plan(write):
    a = write("a.yaml", BASE + "  kv: {preset: cla, factor: 4}")
    config = load_settings(Config, [a], ["--model.kv.n_kv_heads", "2"])
    assert (config.model.kv.preset, config.model.kv.factor, config.model.kv.n_kv_heads) == ("cla", 4, 2)


def test_layers_replace_a_preset_and_a_preset_replaces_layers(write):
    a = write("a.yaml", BASE + "  kv: {preset: cla, factor: 4}")
    b = write("b.yaml", "model: {kv: {layers: [{layers: 0-7, own: {}}]}}")
    assert len(load_settings(Config, [a, b]).model.plan().owners) == 8
    assert load_settings(Config, [a, b], ["--model.kv.preset", "yoco"]).model.kv.preset == "yoco"


def test_preset_and_its_options_may_come_together_on_the_command_line(write):
    a = write("a.yaml", BASE + "  kv: {preset: yoco, window: 16}")
    config = load_settings(Config, [a], ["--model.kv.preset", "cla", "--model.kv.factor=4"])
    assert (config.model.kv.preset, config.model.kv.factor) == ("cla", 4)


def test_options_without_a_preset_mean_mha(write):
    assert load_settings(Config, [write("a.yaml", BASE + "  kv: {n_kv_heads: 2}")]).model.kv.preset == "mha"


def test_lists_are_replaced_and_null_overwrites(write):
    a = write("a.yaml", BASE + "optim: {betas: [0.8, 0.9], grad_clip: 2.0}")
    config = load_settings(Config, [a], ["--optim.betas", "[0.7, 0.8]", "--optim.grad_clip", "null"])
    assert (config.optim.betas, config.optim.grad_clip) == ([0.7, 0.8], None)


def test_merging_changes_neither_side():
    base, over = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}}
    assert (base, over) == ({"a": {"b": 1}}, {"a": {"c": 2}})


# ---- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("-2.5e-3", -2.5e-3),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("0.1", 0.1),
        ("12", 12),
        ("true", True),
        ("null", None),
        ("[1e-3, 2]", [1e-3, 2]),
        ("1e", "1e"),
        ("e3", "e3"),
        ("1e-3x", "1e-3x"),
        ('"1e-3"', "1e-3"),
    ],
)
def test_values_are_yaml_with_floats_as_everybody_writes_them(text, value):
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("words", "tree"),
    [
        (["--a", "1"], {"a": 1}),
        (["--a=1"], {"a": 1}),
        (["--a.b.c", "x", "--a.b.d=y"], {"a": {"b": {"c": "x", "d": "y"}}}),
        (["--a", "-1"], {"a": -1}),
        (["--a", "x=y"], {"a": "x=y"}),
        (["--a="], {"a": None}),
        (["--a", "{b: 1}"], {"a": {"b": 1}}),
        (["--a", "1", "--a", "2"], {"a": 2}),
    ],
)
def test_overrides(words, tree):
    assert parse_overrides(words) == tree


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "1"], "command line: unexpected argument 'a'; settings look like --section.key VALUE"),
        (["--a.b"], "command line: --a.b needs a value"),
        (["--a", "1", "--a.b", "2"], "command line: --a.b: a was given a value already"),
        (["--a", "[1"], "command line: --a line 1: not valid YAML: "),
        (["--", "1"], "command line: unexpected argument '--'"),
    ],
)
def test_overrides_refused(words, message):
    with pytest.raises(UserError) as error:
        parse_overrides(words)
    assert str(error.value).startswith(message)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_duplicate_key_is_refused_with_its_line(write):
    path = write("a.yaml", "optim:\n  lr: 1e-3\n  lr: 2e-3\n")
    assert refusal([path]) == f"{path} line 3: not valid YAML: duplicate key 'lr'"


def test_key_that_is_a_list_is_refused(write):
    path = write("a.yaml", "[a, b]: 1\n")
    assert refusal([path]).startswith(f"{path} line 1: not valid YAML: ")


def test_broken_yaml_is_refused_with_its_line(write):
    path = write("a.yaml", "model:\n  d_model: [1\n")
    assert refusal([path]).startswith(f"{path} line ")


def test_missing_file_is_refused(tmp_path):
    assert refusal([tmp_path / "nosuch.yaml"]) == f"{tmp_path / 'nosuch.yaml'}: no such config file"


def test_folder_as_config_is_refused(tmp_path):
    assert refusal([tmp_path]).startswith(f"{tmp_path}: cannot be read: ")


def test_file_that_holds_no_mapping_is_refused(write):
    path = write("a.yaml", "- 1\n")
    assert refusal([path]) == f"{path}: a config file holds a mapping of keys, this one holds a list"


def test_empty_file_is_an_empty_mapping(write):
    assert read_yaml(write("a.yaml", "# nothing\n")) == {}


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_unknown_key_names_its_file_and_the_nearest_key(write):
    a, b = write("a.yaml", BASE), write("b.yaml", "optim: {weight_decy: 0.1}")
    expected = f'{b}: optim.weight_decy: unknown key; did you mean "weight_decay"?'
    assert refusal([a, b]) == expected


def test_unknown_key_that_is_near_none_lists_those_allowed(write):
    message = refusal([write("a.yaml", BASE)], ["--attention.zzz", "1"])
    assert message == 'command line: attention.zzz: unknown key; nearest: "backend"; allowed: backend'


def test_key_of_another_section_is_suggested(write):
    message = refusal([write("a.yaml", BASE)], ["--n_layers", "4"])
    assert message == 'command line: n_layers: unknown key; did you mean "model.n_layers"?'


def test_misspelt_section_is_told_before_what_it_leaves_missing(write):
    path = write("a.yaml", BASE.replace("model:", "modle:"))
    assert refusal([path]) == f'{path}: modle: unknown key; did you mean "model"? (and 1 more)'


def test_missing_key_names_the_file_if_there_is_one(write):
    file = write("a.yaml", "name: a")
    assert refusal([file]).startswith(f"{file}: model: is required and missing")
    assert refusal([file], ["--model.n_layers", "4"]).startswith(f"{file}: model.d_model: is required and missing")
    assert refusal([file, write("b.yaml", "name: b")]).startswith("model: is required and missing")


def test_wrong_type_names_file_key_and_value(write):
    path = write("a.yaml", BASE + '  vocab_size: "2"')
    assert refusal([path]) == f"{path}: model.vocab_size: input should be a valid integer, got '2'"


def test_mistake_is_of_the_file_that_won(write):
    a, b = write("a.yaml", BASE), write("b.yaml", "model: {d_model: wide}")
    assert refusal([a, b]).startswith(f"{b}: model.d_model: ")
    assert refusal([a, b], ["--model.d_model", "wider"]).startswith("command line: model.d_model: ")
    assert load_settings(Config, [a, b], ["--model.d_model", "128"]).model.d_model == 128


def test_unknown_preset_names_the_nearest(write):
    path = write("a.yaml", BASE)
    message = refusal([path], ["--model.kv.preset", "fusedkvlite"])
    assert message == 'command line: model.kv.preset: unknown preset "fusedkvlite"; did you mean "fusedkv_lite"?'
    message = refusal([path], ["--model.kv.preset", "nosuch"])
    assert message.startswith('command line: model.kv.preset: unknown preset "nosuch"; nearest: "')
    assert "allowed: afm, ced, cla, fusedkv," in message


def test_option_of_another_preset_is_refused(write):
    message = refusal([write("a.yaml", BASE)], ["--model.kv.preset", "cla", "--model.kv.windw", "4"])
    assert message.startswith("command line: model.kv.windw: unknown key; ")
    message = refusal([write("a.yaml", BASE)], ["--model.kv.preset", "mha", "--model.kv.factor", "4"])
    assert message.startswith("command line: model.kv.factor: unknown key; nearest: ")


def test_plan_that_is_no_mapping_is_refused(write):
    message = refusal([write("a.yaml", BASE)], ["--model.kv", "cla"])
    assert message == "command line: model.kv: is a mapping with preset or layers, got 'cla'"


def test_all_mistakes_are_counted(write):
    message = refusal([write("a.yaml", BASE)], ["--train.steps", "0", "--train.log_every", "0"])
    assert message.endswith("got 0 (and 1 more)")


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("--optim.learning_rate", "lr"),
        ("--train.batch_size", "global_batch"),
        ("--train.global-batch", "global_batch"),
        ("--optim.seed", "train.seed"),
        ("--train.learning_rate", "optim.lr"),
        ("--hidden_size", "model.d_model"),
        ("--model.N_Layers", "n_layers"),
        ("--Model.n_layers", "model"),
    ],
)
def test_key_by_another_name_or_in_another_section_is_suggested(setting, meant, write):
    message = refusal([write("a.yaml", BASE)], [setting, "1"])
    assert message == f"command line: {setting[2:].split('.')[0] if meant == 'model' else setting[2:]}: " + (
        f'unknown key; did you mean "{meant}"?'
    )


def test_preset_in_capitals_is_suggested(write):
    message = refusal([write("a.yaml", BASE)], ["--model.kv.preset", "MHA"])
    assert message == 'command line: model.kv.preset: unknown preset "MHA"; did you mean "mha"?'


def test_rule_between_keys_names_the_place_of_each(write):
    a, b = write("a.yaml", BASE), write("b.yaml", "model: {kv: {preset: gqa, n_kv_heads: 3}}")
    rule = "model: layer 0: n_heads 4 is not a multiple of n_kv_heads 3"
    assert refusal([a, b]) == f"{rule} (n_heads from {a}, kv.n_kv_heads from {b})"
    assert refusal([a, b], ["--model.n_heads", "8"]) == (
        f"{rule.replace('4', '8')} (n_heads from command line, kv.n_kv_heads from {b})"
    )
    both = write("both.yaml", BASE + "  kv: {preset: gqa, n_kv_heads: 3}")
    assert refusal([both], ["--train.steps", "5"]) == f"{both}: {rule}"


def test_rule_between_sections_names_the_place_of_each(write):
    a = write("a.yaml", BASE)
    assert refusal([a], ["--data.seq_len", "2000"]) == (
        f"data.seq_len 2000 exceeds model.max_seq_len 1024 (model.max_seq_len from {a}, data.seq_len from command line)"
    )


def test_plan_is_of_the_file_that_replaced_it(write):
    a = write("a.yaml", BASE + "  kv: {preset: gqa, n_kv_heads: 2}")
    b = write("b.yaml", "model: {kv: {layers: [{layers: 0-7, own: {}}, {layers: 7, own: {}}]}}")
    assert refusal([a, b]) == f"{b}: model: layer 7: described twice in model.kv.layers"


def test_shape_that_another_model_gives_is_said_to_be_its(tmp_path):
    """`model.kv.n_kv_heads` of a file, and query heads of the checkpoint that `init.from` names."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    llama |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(llama), encoding="utf-8")
    kv = ["--model.kv.preset", "fusedkv", "--model.kv.n_kv_heads", "8"]
    message = refusal([], ["--init.from", str(tmp_path), *kv])
    assert message == (
        "model: layer 0: n_heads 4 is not a multiple of n_kv_heads 8 (n_heads from init.from "
        f"{tmp_path}, kv.n_kv_heads from command line)"
    )


def test_long_values_are_cut(write):
    message = refusal([write("a.yaml", BASE)], ["--train.steps", "x" * 10_000])
    assert len(message) < 300


def test_keys_in_very_many_sections_are_refused(write):
    message = refusal([write("a.yaml", BASE)], ["--" + "a." * 5000 + "b", "1"])
    assert message.endswith("is nested more than 32 levels deep")


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        config_parser(Config, "Train.").parse_args(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for key in ("--model.d_model", "--model.kv.preset", "--model.kv.factor", "--model.rope.scaling.type", "--optim.lr"):
        assert f"  {key}  (default: " in text
    assert "Peak learning rate." in text


def test_help_names_the_presets_of_a_key_and_their_defaults():
    text = keys_help(Config)
    lines = text.splitlines()
    assert '  --model.kv.preset  (default: "mha")' in lines, "mha is the plan of a config without model.kv"
    (names,) = [line.partition("Allowed: ")[2] for line in lines if "Allowed: mha, " in line]
    assert sorted(names.rstrip(".").split(", ")) == preset_names()
    assert "  --model.kv.kv_norm  (default: false; true with yoco, yoco_u, cla)" in lines
    factor = lines.index("  --model.kv.factor  (default: 1 with mla, mlra; 2 with xmla, cla)")
    assert [line.split()[0] for line in lines[factor + 1 : factor + 5]] == ["mla,", "xmla:", "cla:", "--model.kv.bytes"]
    own = lines.index("  --model.kv.layers.own.n_kv_heads  (default: null)")
    assert lines[own + 1] == "      KV heads; null: as many as query heads.", "the key names its variant"


def test_config_files_repeat_in_order_and_the_rest_is_left_over():
    parser = config_parser(Config, "Train.")
    known, rest = parser.parse_known_args(["--config", "a", "--optim.lr", "1e-3", "--config", "b"])
    assert known.config == ["a", "b"]
    assert rest == ["--optim.lr", "1e-3"]


def about(word: str, schema: type = Config) -> dict[str, str]:
    """What `--help WORD` prints about settings, by key."""
    return {text.split()[0]: " ".join(text.split()) for text in settings_about(schema, word)}


def test_help_about_a_word_shows_types_bounds_and_allowed_values() -> None:
    found = about("optim")
    assert list(found)[:2] == ["--optim.name", "--optim.options"], "keys first"
    assert "--train.offload_optimizer" in found, "then meanings"
    assert "--train.seed" not in found
    assert found["--optim.schedule"].endswith("allowed: cosine, linear, wsd, constant")
    assert found["--optim.grad_clip"].endswith("allowed: a number, above 0, or null")
    assert found["--optim.warmup_steps"].endswith("allowed: an integer, at least 0, at most 1,000,000,000, or null")
    assert found["--optim.betas"].endswith("allowed: a list of values, each a number")
    assert about("HEADS").keys() == about("--heads").keys() >= {"--model.n_heads", "--model.kv.n_kv_heads"}
    assert not about("xyzzy")


def test_help_about_a_preset_shows_its_settings_and_their_defaults() -> None:
    found = about("cla")
    assert found["cla:"].startswith("cla: Cross-layer attention (arXiv 2405.12981)")
    assert "(default: true) As in the paper, queries" in found["--model.kv.kv_norm"], "mha's default is false"
    assert found.keys() - {"cla:"} == {f"--model.kv.{key}" for key in CLA.model_fields}
    assert {"--model.n_layers", "--model.kv.layers.layers"} <= about("layers").keys(), "no preset, but a key"


@pytest.mark.parametrize(("command", "word", "shown"), [("train", "seed", "train.seed"), ("prepare", "seed", "seed")])
def test_help_takes_a_word(command: str, word: str, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help", word])
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert f"--{shown}" in told
    assert "usage:" not in told
    assert "--config" not in told
    assert cli.main([command, "--help", "xyzzy"]) == 2
    assert capsys.readouterr().err == "error: --help xyzzy: nothing about it; --help alone lists everything\n"


def test_a_generated_section_is_not_looked_for_in_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """pydantic compares each frame with every module that is loaded: seconds at an import below transformers."""
    modules = []
    monkeypatch.setattr(inspect, "getmodule", lambda *args: modules.append(args))
    generated: Any = create_section("Generated", Section, {"n": (int, 3)})
    assert not modules
    monkeypatch.undo()

    class Declared(generated):
        m: int = 4
        """Described."""

    assert Declared().model_dump() == {"n": 3, "m": 4}
    assert Declared.model_fields["m"].description == "Described."

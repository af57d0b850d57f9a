"""Every YAML file in the project loads, and every model it describes can be built."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from cllm.cache.accounting import kv_bytes, mha_twin
from cllm.config.load import load_settings, read_yaml
from cllm.data.prepare.recipe import Recipe
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.plan.presets import preset_names
from cllm.train.budget import run_tokens
from cllm.train.dryrun import dry_run
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
PLANS = sorted((CONFIGS / "kv").glob("*.yaml"))
QUICK = CONFIGS / "quickstart.yaml"
RECALL = CONFIGS / "tasks" / "mqar.yaml"
RECALL_PLANS = sorted((CONFIGS / "tasks" / "mqar").glob("*.yaml"))


def build(*files: Path, settings: tuple[str, ...] = ()):
    config = load_config(files, settings)
    decoder = meta_decoder(config.model)
    with torch.device("meta"):
        for module in decoder.modules():
            # To draw normal weights, as of these layers, takes most of the time, and no memory is filled.
            if not isinstance(module, torch.nn.Linear | torch.nn.Embedding) and hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return config, decoder


def test_every_config_file_is_covered_by_a_test_here() -> None:
    folders = ("data", "quickstart", "bench", "uptrain", "tradeoff", "studies")
    covered = {*MODELS, *PLANS, QUICK, *(file for folder in folders for file in (CONFIGS / folder).glob("*.yaml"))}
    covered |= {RECALL, *RECALL_PLANS}
    assert set(CONFIGS.rglob("*.yaml")) == covered


def test_every_preset_has_a_file() -> None:
    named = {read_yaml(file)["model"]["kv"].get("preset") for file in PLANS}
    assert named - {None} == set(preset_names())


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_every_model_loads_and_builds_with_every_plan(model: Path) -> None:
    n_layers = read_yaml(model)["model"]["n_layers"]
    for plan in PLANS:
        if "n_layers" in read_yaml(plan)["model"] and n_layers != 24:
            continue  # an explicit plan is for its own depth
        config, decoder = build(model, plan)
        assert count_parameters(decoder) > 0
        assert config.model.n_layers == len(decoder.plan)


@pytest.mark.parametrize("name", ["mha", "fusedkv", "fusedkv_lite", "cla", "yoco", "gqa"])
@pytest.mark.parametrize("file", sorted((CONFIGS / "tradeoff").glob("*.yaml")), ids=lambda path: path.stem)
def test_designs_of_a_tradeoff_are_of_equal_size(file: Path, name: str) -> None:
    settings = ("--model.vocab_size", "4096")
    _, baseline = build(file, settings=settings)
    _, decoder = build(file, CONFIGS / "kv" / f"{name}.yaml", settings=settings)
    assert count_parameters(decoder) == pytest.approx(count_parameters(baseline), rel=0.005)


@pytest.mark.parametrize("plan", sorted((CONFIGS / "quickstart").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_quickstart_loads_with_every_plan_at_equal_size(plan: Path) -> None:
    settings = ("--model.vocab_size", "4096")
    _, baseline = build(QUICK, settings=settings)
    _, decoder = build(QUICK, plan, settings=settings)
    assert count_parameters(decoder) == pytest.approx(count_parameters(baseline), rel=0.005)


@pytest.mark.parametrize("plan", RECALL_PLANS, ids=lambda path: path.stem)
def test_the_recall_task_loads_with_every_plan_at_equal_size_on_sequences_of_its_recipe(plan: Path) -> None:
    recipe = load_settings(Recipe, [ROOT / "data" / "recipes" / "mqar.yaml"])
    assert recipe.source.mqar is not None
    settings = ("--model.vocab_size", str(recipe.source.mqar.numbers))
    _, baseline = build(RECALL, settings=settings)
    config, decoder = build(RECALL, plan, settings=settings)
    assert count_parameters(decoder) == pytest.approx(count_parameters(baseline), rel=0.01)
    assert config.data.path == str(recipe.folder)
    assert config.data.seq_len == recipe.source.mqar.length
    assert recipe.source.mqar.numbers % 64 == 0, "the model's vocabulary is that of the numbers"


@pytest.mark.parametrize(("name", "millions"), [("374m", 374), ("1364m", 1364)])
def test_benchmark_shapes_have_the_size_in_their_name(name: str, millions: int) -> None:
    _, decoder = build(CONFIGS / "bench" / f"{name}.yaml")
    assert count_parameters(decoder) / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml")))
def test_every_data_config_loads_and_names_what_its_recipe_makes(name: str) -> None:
    config = load_config([QUICK, CONFIGS / "data" / f"{name}.yaml"])
    assert load_settings(Recipe, [ROOT / "data" / "recipes" / f"{name}.yaml"]).name == name
    assert config.data.path == f"data/prepared/{name}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "data" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    load_settings(Recipe, [recipe])


def test_every_yaml_in_the_project_is_yaml() -> None:
    for file in [*ROOT.glob("*.yaml"), *CONFIGS.rglob("*.yaml")]:
        yaml.safe_load(file.read_text(encoding="utf-8"))


# ---- token budgets against the data ----------------------------------------------------------------------------------

TOKENS = {
    ("HuggingFaceFW/fineweb-edu", "sample-10BT"): 10e9,
    ("HuggingFaceFW/fineweb-edu", "sample-100BT"): 100e9,
    ("HuggingFaceFW/fineweb-edu", "sample-350BT"): 350e9,
    ("HuggingFaceFW/fineweb-edu", "default"): 1.3e12,
    ("cerebras/SlimPajama-627B", None): 627e9,
}
"""By the cards of the data sets, counted with tokenizers of 50,000."""
OF_A_LARGE_VOCABULARY = 0.9
"""Tokens of a tokenizer of 128,000 relative to one of 50,000, for English text."""
BYTES_A_TOKEN = 4.5
"""At most, for English text and a vocabulary of 50,000."""


def recipe_tokens(recipe: Recipe) -> float:
    """Tokens that a recipe makes, rather too few than too many."""
    if recipe.source.kind == "stdlib":
        return 10e6
    tokens = TOKENS[recipe.source.dataset or "", recipe.source.config]
    tokens *= OF_A_LARGE_VOCABULARY if recipe.tokenizer.train else 1
    return min(tokens, recipe.max_bytes / BYTES_A_TOKEN) if recipe.max_bytes else tokens


def commands() -> list[tuple[str, tuple[str, ...]]]:
    """(file, configs) of every command in configs, docs and scripts that trains one of configs/model."""
    files = [*CONFIGS.rglob("*.yaml"), *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.rglob("slurm/*.sbatch")]
    found = set()
    for file in sorted(files):
        text = re.sub(r"\\\n#?\s*", "", file.read_text(encoding="utf-8"))
        for line in re.findall(r"^.*(?<!_)(?:train\.py|\.sbatch) .*--config configs/model/.*$", text, re.MULTILINE):
            words = shlex.split(line.lstrip("# "))
            configs = tuple(after for word, after in itertools.pairwise(words) if word == "--config")
            if "--dry-run" not in words:
                found.add((str(file.relative_to(ROOT)), configs))
    return sorted(found)


def test_every_model_has_a_command() -> None:
    named = {name for _, configs in commands() for name in configs if name.startswith("configs/model/")}
    assert named == {str(path.relative_to(ROOT)) for path in MODELS}


@pytest.mark.parametrize(("file", "configs"), commands())
def test_no_run_takes_more_tokens_than_its_recipe_makes(file: str, configs: tuple[str, ...]) -> None:
    config = load_config([ROOT / name for name in configs])
    assert any(name.startswith("configs/data/") for name in configs), f"{file}: a command without its data"
    recipe = load_settings(Recipe, [ROOT / "data" / "recipes" / f"{Path(config.data.main_folder).name}.yaml"])
    assert run_tokens(config) <= recipe_tokens(recipe), file


@pytest.mark.parametrize("file", [QUICK, CONFIGS / "tradeoff" / "2m.yaml"], ids=lambda path: path.stem)
def test_no_small_run_takes_more_tokens_than_the_standard_library_has(file: Path) -> None:
    config = load_config([file])
    assert config.data.path == "data/prepared/stdlib"
    assert run_tokens(config) <= recipe_tokens(load_settings(Recipe, [ROOT / "data" / "recipes" / "stdlib.yaml"]))


# ---- sizes, counted by hand -----------------------------------------------------------------------------------------

# (vocabulary, width, layers, heads, head_dim, d_ff, QK norm, tied), from the headers of the files
HAND = {
    "332m": (128000, 1024, 16, 16, 64, 2720, True, True),
    "650m": (128000, 1536, 16, 16, 96, 4096, True, True),
    "1.5b": (128000, 2048, 24, 16, 128, 5504, True, True),
    "4b": (128000, 3072, 32, 16, 192, 8192, True, True),
    "cla_1b": (50432, 2048, 20, 16, 128, 5472, False, False),
    "cla_3b": (50432, 3072, 32, 24, 128, 8192, False, False),
}
NOMINAL = {"332m": 332e6, "650m": 650e6, "1.5b": 1.5e9, "4b": 4e9}


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_parameters_of_paper_sizes_equal_a_hand_count(model: Path) -> None:
    vocab, d, layers, heads, head, ff, qk_norm, tied = HAND[model.stem]
    a_layer = 4 * d * heads * head + 3 * d * ff + 2 * d + (2 * head if qk_norm else 0)
    mha = layers * a_layer + d + vocab * d * (1 if tied else 2)
    _, decoder = build(model)
    assert count_parameters(decoder) == mha
    if model.stem in NOMINAL:
        assert mha == pytest.approx(NOMINAL[model.stem], rel=0.02)
    half = layers // 2
    _, decoder = build(model, CONFIGS / "kv" / "fusedkv_lite.yaml")
    assert count_parameters(decoder) == mha - half * (2 * d * heads * head + (head if qk_norm else 0))
    _, decoder = build(model, CONFIGS / "kv" / "fusedkv.yaml")
    fusion = half * 2 * (head // 2 + head)  # two sources: a weight a pair for keys, a channel for values
    assert count_parameters(decoder) == mha - half * (2 * d * heads * head + (head if qk_norm else 0)) + fusion


@pytest.mark.parametrize("plan", PLANS, ids=lambda path: path.stem)
def test_match_params_lands_within_half_a_percent(plan: Path) -> None:
    settings = ("--model.match_params", "true", "--model.n_layers", "24")
    config, decoder = build(CONFIGS / "model" / "1.5b.yaml", plan, settings=settings)
    target = count_parameters(meta_decoder(mha_twin(config.model)))
    assert count_parameters(decoder) == pytest.approx(target, rel=0.005)


# ---- cache bytes, counted by hand -----------------------------------------------------------------------------------

# resident and read bytes a token, bf16, of the 332M shape (16 layers, 16 heads of 64, context 8192) as shares of mha's
# 2 tensors x 16 layers x 1024 channels x 2 bytes
MHA_BYTES = 2 * 16 * 1024 * 2
BYTES = {
    "mha": (1, 1),
    "gqa": (1 / 2, 1 / 2),
    "mqa": (1 / 16, 1 / 16),
    "mla": ((256 + 32) / 2048, (256 + 32) / 2048),
    "mlra": ((4 * 64 + 32) / 2048, (4 * 64 + 32) / 2048),  # four blocks of 64 channels
    "xmla": (8 * (992 + 32) / (16 * 2048), 16 * (992 + 32) / (16 * 2048)),  # 8 latents of rank 992, read twice each
    "cla": (1 / 2, 1),
    "yoco": ((8 * 1024 / 8192 + 1) / 16, (8 * 1024 / 8192 + 8) / 16),
    "yoco_u": ((12 * 512 / 8192 + 1) / 16, (12 * 512 / 8192 + 4) / 16),  # three turns of 4 layers with a window each
    "fusedkv": (1 / 2, 3 / 2),
    "fusedkv_lite": (1 / 2, 1),
    "fusedkv_lite_learnable": (1 / 2, 1),
    "fusedkv_lite_reversed": (1 / 2, 1),
    "pizza_bottom": (1 / 2, 1),
    "sandwich_top": (1 / 2, 1),
    "lckv": (3 / 16, 1),
    "trailing": (1 / 2, 1),
    "afm": (10 / 16, 1),
    "swiftkv": (1, 1),
    "yoco_pp": (1 / 2, 1),
    "resformer": (1, (16 + 1 + 15 * 2) / 32),
    "kv_tie": (1 / 2, 1 / 2),
    "svformer": (17 / 32, 1),
    "ced": ((16 + 8 * 128 / 8192) / 16, (16 + 8 * 128 / 8192) / 16),
    "hysparse": ((2 + 14 * 128 / 8192) / 16, (16 + 14 * 128 / 8192) / 16),
}


@pytest.mark.parametrize("name", BYTES)
def test_cache_bytes_equal_a_hand_count(name: str) -> None:
    config, _ = build(CONFIGS / "model" / "332m.yaml", CONFIGS / "kv" / f"{name}.yaml")
    found = kv_bytes(config.model)
    resident, read = BYTES[name]
    assert found.resident == pytest.approx(resident * MHA_BYTES)
    assert found.read == pytest.approx(read * MHA_BYTES)


def test_the_dry_run_says_what_a_reader_wants_to_know() -> None:
    config = load_config([CONFIGS / "model" / "332m.yaml", CONFIGS / "kv" / "fusedkv.yaml"])
    report = dry_run(config)
    assert "0.5x resident, 1.5x read" in report
    assert "315,133,952" in report
    assert "fuse 0 + 7" in report
    assert "FLOPs" in report

"""The memory of a step, told without training: against measured peaks, against the strategy's shares, by passes."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config import Config
from cllm.config.load import validate
from cllm.data.manifest import Manifest
from cllm.errors import UserError
from cllm.model.sizes import build_decoder, count_parameters, meta_decoder
from cllm.plan.plan import Iterations, KVPlan
from cllm.train.dryrun import GIB, block_activation_bytes, dry_run, memory_estimate
from cllm.train.launch import Launch
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
RESULTS = sorted((ROOT / "docs" / "results").glob("*-train-*-h200.json"))


def measured() -> list[tuple[str, dict[str, Any], float]]:
    """(file and design, config, GiB) of what `benchmarks.train` has measured in bf16 without accumulation."""
    found = []
    for file in RESULTS:
        result = json.loads(file.read_text(encoding="utf-8"))
        rows = {row["name"]: row["peak_gib"] for row in result["rows"]}
        found += [
            (f"{file.stem[11:]}-{name}", result["configs"][name], rows[name])
            for name in rows
            if name in result["configs"]
        ]
    return found


MEASURED = measured()


def test_the_measured_designs_are_those_of_the_log() -> None:
    names = " ".join(name for name, _, _ in MEASURED)
    for part in ("332m", "650m", "4b", "cla1b", "374m-h200-mha", "374m-h200-yoco"):
        assert part in names
    assert sum("train-374m-h200" in name for name, _, _ in MEASURED) == 5


def estimate(written: dict[str, Any], micro_batches: int = 1, *, devices: int, **train: Any) -> float:
    """GiB at the peak, by the config that a file of results has, with so many micro-batches a step on so many GPUs."""
    given = {key: value for key, value in written.items() if key not in ("init", "uptrain")}
    batch = written["train"]["micro_batch"] * devices * micro_batches
    older = {"swiglu": "torch"}  # what there was before there was a choice
    given["train"] = (
        older | written["train"] | {"devices": devices, "global_batch": batch, "accelerator": "gpu"} | train
    )
    config = validate(Config, given)
    model = meta_decoder(config.model)
    return memory_estimate(model, config, Launch.planned(config))["total"]


@pytest.mark.parametrize(("config", "gib"), [row[1:] for row in MEASURED], ids=[row[0] for row in MEASURED])
def test_the_estimate_is_within_a_tenth_of_what_was_measured(config: dict[str, Any], gib: float) -> None:
    assert estimate(config, devices=1) == pytest.approx(gib, rel=0.1)


SCALED = [
    (result, row)
    for file in sorted((ROOT / "docs" / "results").glob("*-scaling-*.json"))
    for result in [json.loads(file.read_text(encoding="utf-8"))]
    for row in result["rows"]
]


@pytest.mark.parametrize(
    ("result", "row"),
    SCALED,
    ids=[f"{row['strategy']}-x{row['devices']}-{i}" for i, (_, row) in enumerate(SCALED)],
)
def test_the_estimate_of_a_strategy_is_within_a_tenth_too(result: dict[str, Any], row: dict[str, Any]) -> None:
    found = estimate(result["config"], result["accumulate"], devices=row["devices"], strategy=row["strategy"])
    assert found == pytest.approx(row["peak_gib"], rel=0.1)


@pytest.mark.parametrize("file", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_header_of_a_config_says_what_its_dry_run_says(file: Path) -> None:
    told = re.search(r"about (\d+) GiB", file.read_text(encoding="utf-8"))
    assert told is not None
    settings = ["--train.devices", "1", "--train.accelerator", "gpu", "--train.swiglu", "torch"]
    report = dry_run(load_config([file], settings))
    total = re.search(r"total ([\d.]+) GiB at the peak on one GPU", report)
    assert total is not None
    assert float(total[1]) == pytest.approx(float(told[1]), abs=0.6)


# On each of N devices, bytes a parameter without and with accumulation: the table of docs/distributed.md
SHARES = {
    "ddp": lambda n: (16, 16),
    "zero1": lambda n: (4 + 12 / n, 8 + 12 / n),
    "zero2": lambda n: (2 + 14 / n, 2 + 16 / n),
    "zero3": lambda n: (16 / n, 18 / n),
}


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("strategy", SHARES)
def test_states_are_shared_as_the_strategy_shares_them(strategy: str, devices: int) -> None:
    def estimate(*settings: str) -> tuple[dict[str, float], int]:
        base = ["--train.strategy", strategy, "--train.devices", str(devices), "--train.accelerator", "gpu"]
        config = load_config([CONFIGS / "model" / "332m.yaml"], [*base, *settings])
        model = meta_decoder(config.model)
        return memory_estimate(model, config, Launch.planned(config)), count_parameters(model)

    for accumulate, wanted in zip((1, 2), SHARES[strategy](devices), strict=True):
        found, parameters = estimate("--train.global_batch", str(4 * devices * accumulate))
        states = sum(found[part] for part in ("weights", "optimizer", "gradients"))
        assert states == pytest.approx(wanted * parameters / GIB)
        assert sum(v for k, v in found.items() if k != "total") == pytest.approx(found["total"])
    if strategy != "ddp":
        assert estimate("--train.offload_optimizer", "true")[0]["optimizer"] == 0


def test_fusion_made_again_is_not_kept() -> None:
    files = [CONFIGS / "model" / "332m.yaml", CONFIGS / "kv" / "fusedkv.yaml"]
    found = []
    for again in ("false", "true"):
        config = load_config(files, ["--train.recompute_fusion", again, "--train.accelerator", "gpu"])
        found.append(memory_estimate(meta_decoder(config.model), config, Launch.planned(config))["activations"])
    bf16_keys_and_values_of_8_layers = 2 * 2 * 1024 * 8
    tokens = config.train.micro_batch * config.data.seq_len
    assert found[0] - found[1] == pytest.approx(tokens * bf16_keys_and_values_of_8_layers / GIB)


def test_a_cycle_keeps_activations_of_every_pass_with_gradients() -> None:
    """Counted in the backward's graph of a small model, each storage once, parameters left out."""
    files = [CONFIGS / "model" / "332m.yaml", CONFIGS / "kv" / "lckv.yaml"]
    small = ["--model.d_model", "64", "--model.n_heads", "2", "--model.d_ff", "192", "--model.vocab_size", "64"]
    config = load_config(files, [*small, "--train.precision", "fp32", "--train.accelerator", "cpu"])
    model = build_decoder(config.model)
    model.init_weights()
    own = {p.data_ptr() for p in model.parameters()}
    ids = torch.randint(64, (1, 64))
    kept, estimated = [], []
    for backward in (1, 2, 3):
        model.plan = KVPlan.of(model.plan.layers, Iterations(forward=1, backward=backward))
        saved: list[weakref.ref[torch.Tensor]] = []  # addresses of what the graph has let go are used again

        def pack(tensor: torch.Tensor, saved: list[weakref.ref[torch.Tensor]] = saved) -> torch.Tensor:
            saved.append(weakref.ref(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = model.hidden(ids)
        alive = [tensor for reference in saved if (tensor := reference()) is not None and tensor.data_ptr() not in own]
        kept.append(sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values()))
        assert hidden.requires_grad
        estimated.append(memory_estimate(model, config, Launch.planned(config))["activations"])
    assert kept[2] - kept[1] == pytest.approx(kept[1] - kept[0], rel=0.05), "a pass is a pass"
    assert estimated[2] - estimated[1] == pytest.approx(estimated[1] - estimated[0])
    tokens = config.train.micro_batch * config.data.seq_len
    launch = Launch.planned(config)
    once = tokens * sum(block_activation_bytes(model, config, launch, i) for i in range(len(model.plan))) / GIB
    assert (estimated[1] - estimated[0]) / once == pytest.approx((kept[1] - kept[0]) / kept[0], rel=0.1)


def report(*settings: str) -> str:
    return dry_run(load_config([CONFIGS / "quickstart.yaml"], ["--model.vocab_size", "512", *settings]))


def test_data_to_be_prepared_are_said_to_be_missing(tmp_path: Path) -> None:
    lines = report("--data.path", str(tmp_path / "nosuch")).splitlines()
    assert f"data         data.path {tmp_path / 'nosuch'}: not prepared yet" in lines


def test_settings_without_effect_are_listed() -> None:
    lines = report("--model.kv.preset", "mla", "--model.q_bias", "true", "--optim.decay_fraction", "0.5").splitlines()
    assert [line for line in lines if line.startswith("unused")] == [
        "unused       model.qk_norm is true, without effect: it needs a layer that reads keys and values, not latents",
        "unused       model.q_bias is true, without effect: it needs a layer that reads keys and values, not latents",
        "unused       optim.decay_fraction is 0.5, without effect: it needs optim.schedule wsd",
    ]


def test_validation_sets_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.validation\.web: .*nosuch: no such folder of prepared data; make it with"
    ):
        report("--data.validation", f"{{web: {tmp_path / 'nosuch'}}}")


def test_data_that_are_no_prepared_folder_are_refused(tmp_path: Path) -> None:
    for setting in ("--data.path", "--data.validation.web"):
        with pytest.raises(UserError, match=r"manifest\.json: missing, so .* is not a prepared folder"):
            report(setting, str(tmp_path))


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    settings = ["--optim.warmup_steps", "21", "--train.steps"]
    with pytest.raises(
        UserError, match=r"optim\.warmup_steps is 21, but train\.steps is 20, .*; allowed: up to 20, or null"
    ):
        report(*settings, "20")
    assert "21 steps of" in report(*settings, "21")


def test_prepared_data_are_counted(tmp_path: Path, prepare_texts: Callable[..., Path]) -> None:
    folder = prepare_texts(tmp_path, [f"text number {n}" for n in range(20)], 0.4)
    text = report("--data.path", str(folder), "--data.validation", f"{{held_out: {folder}}}")
    train = Manifest.load(folder).split("train")
    line = f"{folder}: {train.tokens:,} tokens in {train.documents:,} documents; validation sets: held_out"
    assert f"data         data.path {line}" in text.splitlines()

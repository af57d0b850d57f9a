"""Results of studies, sweeps, records and decode benchmarks as tables of measurements.

Sweeps know a design by its name only. Its number of KV heads follows from the bytes of its cache against mha's; a sweep
whose bytes fit no number of KV heads of the preset's default settings is refused.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cllm.cache.accounting import kv_bytes, mha_twin
from cllm.config import ModelConfig
from cllm.data.manifest import text_label
from cllm.errors import UserError
from cllm.plan.presets import preset_names
from cllm.planner.keys import (
    Size,
    config_key,
    mha_key,
    own_settings,
    plan_at,
    query_heads_per_kv_head,
)
from cllm.planner.table import DecodeStep, LossChange, Table, read_table
from cllm.posthoc import UNCOMPRESSED
from cllm.statistics import Mean
from cllm.trust import parse_json

TRAINED = "as trained"
"""The `spec` of a sweep's uncompressed run."""
_LEAST_HEADS = 64
"""Query heads with which the bytes of presets are compared: every power of two below divides them."""
_CONDITIONS = {"window": "context", "trained_tokens": "tokens", "parameters": "parameters"}
"""Columns of sweeps and records, where they have them, as fields of `LossChange`."""
_LAYERS = 24
"""Layers with which they are compared."""
_CLOSE = 0.02


def read_losses(path: Path) -> Table:
    """The table that `--losses` names: a table, a sweep's CSV, records of `evaluate --posthoc`, or a folder of results
    of a study.

    Raises `UserError`, naming the file, for anything else, and for a study without mha or a sweep of unknown designs.
    """
    if path.is_dir():
        records = [_json(file) for file in sorted(path.glob("*.json"))]
        try:
            return Table(losses=study_changes([r for r in records if _is_study(r)], str(path)))
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"--losses {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"--losses {path}: has a JSON file that is no result of a study") from None
    if path.suffix == ".csv":
        return Table(losses=sweep_changes(path))
    record = _json(path)
    if _is_study(record):
        raise UserError(f"--losses {path}: is one point of a study, which has no mha beside it; give its folder")
    if _has_rows(record):
        return Table(losses=sweep_changes(path))
    table = read_table(path)
    for i, change in enumerate(table.losses):
        _check_design(change, f"--losses {path}: losses.{i}")
    return table


def _check_design(change: LossChange, where: str) -> None:
    """Raise `UserError`, beginning with `where`, for a design that can be compared with no other."""
    try:
        key = change.key
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if key is None and (name := change.kv.get("preset")) not in preset_names():
        raise UserError(f"{where}.kv.preset is {name!r}; allowed: the name of a preset")


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--losses {path}: cannot be read as JSON: {error}") from None


def _is_study(record: Any) -> bool:
    return isinstance(record, dict) and record.keys() >= {"config", "loss", "seed", "tokens", "data", "summary"}


def _has_rows(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("rows"), list)


def _config(model: Mapping[str, Any], source: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        raise UserError(f"{source}: config.model: {error.errors()[0]['msg']}") from None


def _design_of(config: ModelConfig) -> dict[str, Any]:
    """The fields of a measurement that identify the design."""
    size = dataclasses.asdict(Size.of(config))
    return {"kv": own_settings(config), "query_heads_per_kv_head": query_heads_per_kv_head(config), **size}


# ---- studies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Point:
    """A result of a study."""

    key: str
    seed: int
    loss: float
    about: dict[str, Any]
    """Fields of `LossChange`."""


def study_changes(records: Iterable[Mapping[str, Any]], source: str) -> list[LossChange]:
    """Changes of the loss against mha of the same tokens, data, text, shape and seed; a mean and spread over seeds.

    Runs of a search for learning rates are left out: they are shorter than those that the study compares. Several
    learning rates of one design, tokens and seed count as one point, that with the least loss.

    Raises `UserError` if there is no such mha for any design.
    """
    groups: dict[tuple[Any, ...], list[_Point]] = {}
    for record in records:
        config = _config(record["config"]["model"], source)
        if record.get("search") or not math.isfinite(record["loss"]) or (key := config_key(config)) is None:
            continue
        about = {**_design_of(config), "parameters": record["summary"]["parameters"], "tokens": record["tokens"],
                 "context": config.max_seq_len, "text": (text := _text_of_point(record)), "source": source}  # fmt: skip
        shape = config.d_model, config.n_layers, config.n_heads, config.max_seq_len
        group = (record["tokens"], record["data"], text, *shape)
        groups.setdefault(group, []).append(_Point(key, record["seed"], record["loss"], about))
    found = [change for points in groups.values() for change in _against_mha(points)]
    if not found:
        raise UserError(f"--losses {source}: has no result of another design beside mha at the same tokens and seed")
    return found


def _text_of_point(record: Mapping[str, Any]) -> str | None:
    """The text of a result's loss. Results from before 2026-11-29 have the digest of the training folder only, which
    holds that text if the run had no validation sets of its own."""
    if record.get("text") or not record["data"]:
        return record.get("text")
    sets = record["config"].get("data", {}).get("validation")
    return None if sets else text_label("validation", record["data"])


def _against_mha(points: Iterable[_Point]) -> Iterator[LossChange]:
    """The change of each design, of points that differ in design, seed and learning rate only."""
    designs: dict[str, dict[int, _Point]] = {}
    for point in points:
        seeds = designs.setdefault(point.key, {})
        if point.seed not in seeds or point.loss < seeds[point.seed].loss:
            seeds[point.seed] = point
    exact = designs.pop(mha_key(), {})
    for seeds in designs.values():
        pairs = [(point, exact[seed]) for seed, point in seeds.items() if seed in exact]
        changes = [point.loss - base.loss for point, base in pairs]
        if pairs:
            mean = Mean.of(changes)
            count = None if mean.error is None else mean.n
            yield LossChange(**pairs[0][0].about, loss_change=mean.mean, standard_error=mean.error, seeds=count)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def sweep_changes(path: Path, about: Mapping[str, Any] | None = None, *, suffix: str = "") -> list[LossChange]:
    """Changes of the loss by compression, each against the same run uncompressed, from a sweep's CSV or records.

    Args:
        path: a CSV, with columns `spec` (or `method`), `perplexity`, and `ratio_to_own` (or `bf16_ratio`); or a JSON
            file whose `rows` are records of `evaluate --posthoc`, in which others, as of suites, are passed over.
        about: fields of `LossChange` for all rows, such as `parameters`; `kv` in place of the column `design`. `text`
            may have columns in braces, such as `novel {novel}`.
        suffix: an option that every spec had, such as `sinks=0`, where the column does not say so.
    """
    rows = _rows(path)
    exact = {
        _uncompressed(row): row["perplexity"] for row in rows if row.get("spec") == TRAINED and row.get("perplexity")
    }
    found = []
    for row in rows:
        spec = row.get("spec") or row.get("method") or ""
        if spec in (TRAINED, UNCOMPRESSED):
            continue
        try:
            base = float(row.get("uncompressed_perplexity") or exact[_uncompressed(row)])
            ratio = float(row.get("bf16_ratio") or row["ratio_to_own"])
            change = math.log(float(row["perplexity"]) / base)
            design = {} if about and "kv" in about else _design(row["design"], float(row["ratio_to_mha"]) / ratio, path)
            known: dict[str, Any] = {
                field: int(row[column]) for column, field in _CONDITIONS.items() if row.get(column)
            }
            known |= _texts_and_models(row, about or {})
            entry = {
                **design,
                **(about or {}),
                **known,
                "spec": _with(spec, suffix),
                "ratio": ratio,
                "loss_change": change,
            }
            found.append(LossChange.model_validate({"source": str(path), **entry}))
            _check_design(found[-1], f'--losses {path}: "{spec}"')
        except KeyError as error:
            raise UserError(f"--losses {path}: column or uncompressed run {error.args[0]!r} is missing") from None
        except UserError:
            raise
        except (TypeError, ValidationError, ValueError, ZeroDivisionError):
            raise UserError(f'--losses {path}: "{spec}": perplexity and ratio must be positive numbers') from None
    if not found:
        raise UserError(f"--losses {path}: has no compressed run")
    return found


def _uncompressed(row: Mapping[str, str]) -> str:
    """A name for the run of a row on its text, by which its uncompressed loss is found."""
    return f"{row['run']} on {row['text']}" if row.get("text") else row["run"]


def _texts_and_models(row: Mapping[str, str], about: Mapping[str, Any]) -> dict[str, str]:
    """`text` and `base_model` of a row, as far as they are known.

    A row says the text since 2026-11-29. Earlier records have its set and a hash of its files' sizes and times, which
    differs between copies. A model without training tokens is known by its name.
    """
    found = dict[str, str]()
    if row.get("text"):
        found["text"] = row["text"]
    elif "text" in about:
        found["text"] = about["text"].format_map(row)
    elif row.get("set") and row.get("data_files"):
        found["text"] = f"{row['set']}, files {row['data_files']}"
    trained = row.get("trained_tokens") or "tokens" in about or "base_model" in about
    if not trained and row.get("run") and ("trained_tokens" in row or row.get("kind") == "huggingface"):
        found["base_model"] = row["run"]
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".json":
        return _records(path)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--losses {path}: cannot be read: {error}") from None


def _records(path: Path) -> list[dict[str, str]]:
    """The perplexities among records, as rows of a sweep; ratios are those of 16-bit caches."""
    record, found = _json(path), list[dict[str, str]]()
    if not _has_rows(record):
        raise UserError(f"--losses {path}: has no rows; allowed: records of evaluate --posthoc in rows")
    for row in record["rows"]:
        if not isinstance(row, dict) or "perplexity" not in row or "suite" in row:
            continue
        try:
            stored = float(row["bf16_bytes_per_token"])
            ratios = {"bf16_ratio": float(row["own_bf16_bytes_per_token"]) / stored,
                      "ratio_to_mha": float(row["mha_bf16_bytes_per_token"]) / stored}  # fmt: skip
        except KeyError as error:
            raise UserError(f"--losses {path}: a record has no {error.args[0]}") from None
        except (TypeError, ValueError, ZeroDivisionError):
            raise UserError(f"--losses {path}: bytes of a record must be positive numbers") from None
        known = {key: str(value) for key, value in row.items() if value is not None}
        known |= {"trained_tokens": ""} if "trained_tokens" in row and row["trained_tokens"] is None else {}
        found.append({**known, **{key: repr(ratio) for key, ratio in ratios.items()}})
    return found


def _with(spec: str, option: str) -> str:
    if not option:
        return spec
    first, plus, coder = spec.partition("+")
    return f"{first}{',' if ':' in first else ':'}{option}{plus}{coder}"


def _design(name: str, mha_over_own: float, path: Path) -> dict[str, Any]:
    """`kv` and `query_heads_per_kv_head` of a design whose cache is so much smaller than mha's."""
    if name not in preset_names():
        raise UserError(f'--losses {path}: design "{name}" is no preset, so its plan is not known')
    kv = {"preset": name}
    scaled = mha_over_own / _mha_over(name, 1)  # fewer KV heads divide the bytes of most presets
    guess = max(1, round(scaled)) if math.isfinite(scaled) else 1
    for ratio in (None, guess):
        if math.isclose(_mha_over(name, ratio), mha_over_own, rel_tol=_CLOSE):
            return {"kv": kv, "query_heads_per_kv_head": _heads(kv, ratio)}
    raise UserError(
        f'--losses {path}: design "{name}": mha\'s cache is {mha_over_own:.3g} times its cache, which the preset '
        "has with no number of KV heads"
    )


@functools.cache
def _mha_over(name: str, ratio: int | None) -> float:
    heads = _LEAST_HEADS if ratio is None or _LEAST_HEADS % ratio == 0 else ratio
    kv = {"preset": name} if ratio is None else {"preset": name, "n_kv_heads": heads // ratio}
    try:
        config = ModelConfig.model_validate({"d_model": heads * 64, "n_heads": heads, "n_layers": _LAYERS, "kv": kv})
    except (ValidationError, UserError):
        return math.nan
    return kv_bytes(mha_twin(config)).resident / kv_bytes(config).resident


def _heads(kv: dict[str, Any], ratio: int | None) -> int | None:
    if ratio is not None:
        return ratio
    plan = plan_at(kv, layers=_LAYERS, heads=_LEAST_HEADS)
    assert plan is not None
    counts = {getattr(plan.owned(slot), "n_kv_heads", None) for slot in plan.slots}
    count = counts.pop()
    return None if counts or count is None else _LEAST_HEADS // count


# ---- decode steps ----------------------------------------------------------------------------------------------------


def decode_steps(path: Path) -> list[DecodeStep]:
    """The steps of a decode benchmark's JSON that read a 16-bit cache through cllm's own kernels."""
    record = _json(path)
    gpu, configs = record["environment"]["gpus"], record.get("configs", {})
    found = []
    for row in record["rows"]:
        if row.get("step_ms") is None or row.get("peer_of") or row.get("storage") != "model":
            continue
        if row["design"] not in configs:
            continue
        config = _config(configs[row["design"]]["model"], str(path))
        found.append(DecodeStep(**_design_of(config), gpu=gpu, bytes_read=row["bytes_read"],
                                step_s=row["step_ms"] / 1e3, parameters=row["weight_bytes"] / 2,
                                source=str(path)))  # fmt: skip
    return found

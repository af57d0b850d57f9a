"""The model card of a folder that is written: README.md, and the picture of the KV plan that it shows."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cllm.cache.accounting import kv_bytes, mha_twin
from cllm.config import Config
from cllm.errors import UserError
from cllm.files import write_atomic
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters
from cllm.plan.describe import plan_table
from cllm.plan.picture import plan_png
from cllm.rows import Row, rows_backwards
from cllm.runs import RunFolder
from cllm.tables import Column, markdown

log = logging.getLogger(__name__)

CARD, PICTURE = "README.md", "plan.png"


def write_card(folder: Path, run: RunFolder, config: Config, decoder: Decoder, step: int) -> None:
    """Write README.md and plan.png.

    Args:
        folder: the exported folder.
        run: the run that was exported; the card has the metrics of its last validation up to `step`.
        config: of the run.
        decoder: its model.
        step: of the checkpoint.

    Raises:
        OSError: if a file cannot be written.
    """
    title = f"{config.name}: {config.model.design}"
    write_atomic(folder / PICTURE, plan_png(decoder.plan, title))
    write_atomic(folder / CARD, card_text(run, config, decoder, step))


def write_conversion_card(folder: Path, decoder: Decoder, *, source: Path, family: str, plain: bool = False) -> None:
    """Write README.md and plan.png for a model that was converted and not trained.

    Args:
        folder: the converted folder.
        decoder: its model.
        source: the folder that was converted.
        family: the other format: that of `source`, or with `plain` that of `folder`.
        plain: the folder is one of the family, and not one of this package.

    Raises:
        OSError: if a file cannot be written.
    """
    name = source.resolve().name
    design = decoder.config.design
    write_atomic(folder / PICTURE, plan_png(decoder.plan, f"{name}: {design}"))
    header = ModelCardData(
        library_name="transformers" if plain else "cllm",
        pipeline_tag="text-generation",
        tags=[family if plain else "cllm", design],
    )
    origin = f"in the format of {family}" if plain else f"from the format of {family}"
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {name}",
        f"A decoder language model, converted by cllm from the folder {_inline(name)} {origin}; nothing was trained.",
        _usage(with_cllm=not plain),
        *_plan(decoder, name),
        "## Facts",
        _table(_sizes(decoder)),
    ]
    write_atomic(folder / CARD, "\n\n".join(parts) + "\n")


def card_text(run: RunFolder, config: Config, decoder: Decoder, step: int) -> str:
    """The card in Markdown, with the YAML header that the Hub reads; arguments as in `write_card`."""
    design = config.model.design
    header = ModelCardData(library_name="cllm", pipeline_tag="text-generation", tags=["cllm", design])
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# {config.name}",
        "A decoder language model whose layers declare where their keys and values come from, trained with cllm.",
        _usage(with_cllm=True),
        *_plan(decoder, config.name),
        "## Facts",
        _table(_facts(config, decoder, step)),
    ]
    if row := _last_validation(run, step):
        parts += [f"## Validation at step {row['step']:,}", _table(_metrics(row))]
    if command := _command(run):
        parts += ["## Command", f"```bash\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _usage(*, with_cllm: bool) -> str:
    first = 'import cllm  # makes transformers know model_type "cllm"\n' if with_cllm else ""
    return (
        f"```python\n{first}from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH OF THIS FOLDER")\n```'
    )


def _plan(decoder: Decoder, name: str) -> list[str]:
    return ["## KV plan", f"```\n{plan_table(decoder.plan)}\n```", f"![the KV plan of {name}]({PICTURE})"]


def _table(rows: dict[str, str]) -> str:
    columns = [Column[tuple[str, str]]("", lambda row: row[0], left=True), Column("", lambda row: row[1], left=True)]
    return markdown(columns, rows.items())


def _sizes(decoder: Decoder) -> dict[str, str]:
    own, twin = kv_bytes(decoder.config), kv_bytes(mha_twin(decoder.config))
    resident, read = own.relative_to(twin)
    return {
        "parameters": f"{count_parameters(decoder):,}",
        "parameters without embeddings": f"{count_parameters(decoder, embeddings=False):,}",
        "context": f"{decoder.config.max_seq_len:,} tokens",
        "KV cache in bf16, stored": f"{own.resident:,.0f} bytes a token ({resident:.1%} of mha)",
        "KV cache in bf16, read": f"{own.read:,.0f} bytes a token of context ({read:.1%} of mha)",
    }


def _facts(config: Config, decoder: Decoder, step: int) -> dict[str, str]:
    facts = {
        **_sizes(decoder),
        "training data": ", ".join(
            _inline(Path(folder).name) + ("" if len(config.data.weights) == 1 else f" ({weight:g})")
            for folder, weight in config.data.weights.items()
        ),
        "validation data": ", ".join(_inline(Path(path).name) for path in config.data.validation.values()),
        "training": f"{step:,} steps of {config.train.global_batch:,} x {config.data.seq_len:,} tokens",
        "started from": "" if config.init.path is None else _inline(Path(config.init.path).name),
    }
    return {name: text for name, text in facts.items() if text}


def _inline(text: str) -> str:
    """`text` as code in a cell of a table."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _last_validation(run: RunFolder, step: int) -> Row | None:
    """The row of the last validation up to `step`; None without one, and, with a warning, for unreadable rows."""
    try:
        rows = (row for _, row in rows_backwards(run.metrics_file) if row["step"] <= step)
        return next((row for row in rows if "val/loss" in row), None)
    except UserError as error:
        log.warning("%s; the model card has no metrics", error)
        return None


def _metrics(row: dict[str, Any]) -> dict[str, str]:
    """Finite numbers of a validation, by the tag without `val/`."""
    found = {tag.removeprefix("val/"): value for tag, value in row.items() if tag.startswith("val/")}
    return {_inline(tag): f"{v:.5g}" for tag, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}


def _command(run: RunFolder) -> str | None:
    """The command that started the run, from its env.txt."""
    command = run.environment().get("command", "").strip()
    return f"python {command}" if command else None

#!/usr/bin/env python
"""Write cllm/planner/measured.json, the measurements that come with `cllm plan`, from docs/results/.

python scripts/planner_tables.py [--out FILE]
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cllm.arguments import Parser  # noqa: E402
from cllm.files import write_atomic  # noqa: E402
from cllm.planner.collect import decode_steps, read_losses, sweep_changes  # noqa: E402
from cllm.planner.table import SHIPPED, LossChange, Table  # noqa: E402
from cllm.posthoc.method import Compressor, TensorCoder  # noqa: E402
from cllm.posthoc.registry import parse  # noqa: E402

RESULTS = Path("docs/results")
SMOLLM2 = {"kv": {"preset": "gqa"}, "query_heads_per_kv_head": 3, "parameters": 134515008, "tokens": 2e12,
           "context": 4096, "base_model": "SmolLM2-135M-Instruct"}  # fmt: skip
"""SmolLM2-135M-Instruct, see docs/posthoc.md."""
SMOLLM2_VALID = {**SMOLLM2, "text": "valid.jsonl of the study's corpus"}
"""On one H200, see docs/posthoc.md."""
THREE_WINDOWS = {**SMOLLM2, "text": "three windows of novels"}
"""Two sweeps on the same three windows, with the same perplexity of the exact cache."""
NOVELS = {**SMOLLM2, "text": "novel {novel} of the validation text"}
TRAINED_45M = {"parameters": 46938112, "tokens": 490e6, "context": 4096, "text": "validation 592c6512044d"}
"""Runs of the study on its validation text; `evaluate` refuses data with another digest than the run recorded."""
TRADEOFF_45M = {"parameters": 46938112, "tokens": 128e6, "context": 4096, "text": "books and technical prose"}
STUDIES = (
    "2026-11-28-study-equal-bytes-h200", "2026-11-27-study-100m-h200", "2026-11-27-study-490m-h200",
    "2026-11-29-study-110m-h200",
)  # fmt: skip
SWEEPS: tuple[tuple[str, Mapping[str, Any], str], ...] = (
    ("2026-11-28-methods-45m-again-h200.json", TRAINED_45M, ""),
    ("2026-11-28-methods-45m-h200.json", TRAINED_45M, ""),
    ("2026-11-28-methods-calibrated-smollm2-h200.json", SMOLLM2_VALID, ""),
    ("2026-11-28-methods-smollm2-h200.json", SMOLLM2_VALID, ""),
    ("2026-11-28-calibration-texts-smollm2-cpu.csv", {**NOVELS, "context": 1024}, ""),
    ("2026-11-27-methods-smollm2-h200.json", SMOLLM2_VALID, ""),
    ("2026-11-27-suites-smollm2-h200.json", SMOLLM2_VALID, ""),
    ("2026-11-27-wikitext-smollm2-cpu.json", {**SMOLLM2, "context": 1024, "text": "wikitext2-test"}, ""),
    ("2026-11-27-weighted-errors-smollm2-cpu.csv", SMOLLM2, ""),
    ("2026-11-27-quantisers-smollm2-cpu.csv", THREE_WINDOWS, ""),
    ("2026-11-27-low-rank-smollm2-cpu.csv", SMOLLM2, ""),
    ("2026-11-27-eviction-smollm2-cpu.csv", THREE_WINDOWS, ""),
    ("2026-11-28-low-rank-after-eviction-smollm2-cpu.csv", NOVELS, ""),
    ("2026-11-28-head-bits-smollm2-cpu.csv", SMOLLM2, ""),
    ("2026-11-26-sinks-smollm2-cpu.csv", SMOLLM2, ""),
    ("2026-11-26-tradeoff-45m-h200.csv", TRADEOFF_45M, "sinks=0"),
)
"""Sweeps and records, what their files do not say about the models, and an option that all specs had when they were
measured. The newest and largest come first: of equal models and windows the first measurement is the estimate."""
FP32 = ("2026-11-26-sinks-smollm2-cpu.csv",)
"""Sweeps with bytes of fp32 caches only, where the ratio of a quantiser is not that of a 16-bit cache."""
DECODE = (
    "2026-11-29-decode-latents-1364m-h200.json",
    "2026-11-28-decode-few-rows-1364m-h200.json", "2026-11-28-decode-designs-1364m-h200.json",
    "2026-11-22-decode-1364m-h200.json", "2026-11-22-decode-374m-h200.json",
    "2026-11-22-decode-1364m-halves-h200.json", "2026-11-25-decode-1364m-h100.json",
    "2026-11-25-decode-capacity-h200.json",
)  # fmt: skip
LEFT_OUT = {
    "2026-11-29-study-rates-norm-1m-cpu": "models of 1 M parameters after 1 M tokens",
    "2026-11-29-study-rates-50m-h200": "designs after 50 M tokens, all of which have 490 M",
    "2026-11-30-study-rates-swiftkv-h200": "a design after 50 M tokens, which has 490 M",
    "2026-11-22-decode-1364m-peers-h200.json": "repeats steps of 2026-11-22-decode-1364m-h200.json",
    "2026-11-29-decode-latents-before-1364m-h200.json": "latents, with an older kernel",
    "2026-11-28-decode-kv-tie-1364m-h200.json": "repeats a step of 2026-11-28-decode-few-rows-1364m-h200.json",
    "2026-11-28-decode-profile-1364m-h200.json": "repeats steps of 2026-11-28-decode-few-rows-1364m-h200.json",
    "2026-11-25-tradeoff-2m-cpu.csv": "models of 2 M parameters",
    "2026-11-27-new-tokens-smollm2-cpu.csv": "losses while new tokens join, not of a compressed prompt",
    "2026-11-28-calibrated-smollm2-cpu.csv": "windows of 256 tokens; calibration-texts has 1,024",
    "2026-11-28-head-bits-short-prompts-smollm2-cpu.csv": "prompts of 256 and 1,024 tokens",
    "2026-11-28-weighted-errors-again-smollm2-cpu.csv": "specs of 2026-11-27-weighted-errors, in two versions",
    "2026-11-28-head-bits-lengths-smollm2-cpu.csv": "prompts of 64 to 3,072 tokens, in two versions",
    "2026-11-28-methods-rest-cpu.json": "four to seven windows in fp32, of two models",
}
"""Results with losses or steps that are not shipped, and why."""


def quantises(spec: str | None) -> bool:
    """Whether a compression stores codes of fixed bits."""
    return spec is not None and ("+" in spec or isinstance(parse(spec), TensorCoder))


def without_default(change: LossChange) -> LossChange:
    """A change whose compression does not state the default number of sinks, which other sweeps leave out."""
    default = f"sinks={Compressor.model_fields['sinks'].default}"
    kept = [
        ",".join(option for option in part.split(",") if option != default)
        for part in (change.spec or "").replace(f":{default}", ":").split("+")
    ]
    spec = "+".join(part.removesuffix(":").replace(":,", ":") for part in kept) or None
    return change.model_copy(update={"spec": spec})


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    parser = Parser(prog="scripts/planner_tables.py", description=__doc__)
    parser.add_argument("--out", type=Path, default=SHIPPED, metavar="FILE", help="(default: %(default)s)")
    out = parser.parse_args(argv).out.absolute()
    with contextlib.chdir(ROOT):  # sources are paths in the repository
        losses = [change for name in STUDIES for change in read_losses(RESULTS / name).losses]
        for name, about, suffix in SWEEPS:
            changes = sweep_changes(RESULTS / name, about, suffix=suffix)
            losses += [without_default(c) for c in changes if name not in FP32 or not quantises(c.spec)]
        steps = [step for name in DECODE for step in decode_steps(RESULTS / name)]
    table = Table(losses=losses, decode=steps)
    write_atomic(out, table.model_dump_json(indent=1) + "\n")
    print(f"{len(losses)} changes of the loss and {len(steps)} decode steps: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Random plans from a model whose layers all own: every method sets all weights, or is refused in one line by name.

More plans, and others every time:

    CLLM_PLANS=200 python -m pytest tests/uptrain/test_random_starts.py
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from cllm.config.load import validate
from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.uptrain.init import init_student
from tests.plan.random_plans import GIVEN, PROPERTY, File, formed, reshaped

METHODS: list[dict[str, Any]] = [
    *({"method": method} for method in ("copy", "mean", "aligned", "ridge", "fit", "svd")),
    {"method": "fit", "fold": "joint"},
    {"method": "fit", "fold": "mean", "outputs": "all"},
    {"method": "fit", "heads": "merge"},
]


def started(student, teacher, settings: InitFrom, text) -> str | dict[str, float]:
    """Start `student`, whose weights were NaN; returns the refusal, or the errors of the fits."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(torch.nan)
    try:
        return init_student(student, teacher, settings, text).errors
    except UserError as error:
        return str(error)


@settings(PROPERTY, max_examples=int(GIVEN or 40))
@given(section=st.one_of(formed(), reshaped(formed())))
def test_every_weight_is_set_or_the_start_is_refused_by_name(
    section, tiny_config, make_teacher, new_student, text
) -> None:
    try:
        plan = validate(File, {"model": section}).model.plan()
    except UserError:
        return
    heads = [plan.owned(j).kv_heads or 1 for j in plan.owners if plan.owned(j).is_plain]
    kv = {"preset": "mha", "n_kv_heads": max(heads, default=section["n_heads"])}
    shape = {key: value for key, value in section.items() if key not in ("kv", "rope")}
    rope = {key: value for key, value in section.get("rope", {}).items() if key != "windowed_theta"}
    teacher = make_teacher(tiny_config(kv=kv, rope=rope, **shape))
    try:
        student = new_student(teacher, section["kv"], rope_pairs="uniform")
    except UserError as error:
        event(f"no student: {error}")
        return
    for method in METHODS:
        found = started(student, teacher, InitFrom(rope_pairs="uniform", **method), text)
        if isinstance(found, str):
            refusal = found
            assert "\n" not in refusal
            event(f"refused, {method}")
            assert "init." in refusal or "model.kv" in refusal, refusal
            continue
        event(f"started, {method}")
        missing = [name for name, p in student.named_parameters() if not p.isfinite().all()]
        assert not missing, f"{method} leaves {missing} as they were"
        assert student(text[0]["input_ids"]).isfinite().all()
        # A fit is as good as zeros at least. Heads that are only turned, as those with norms are, may be worse.
        fits = {name: error for name, error in found.items() if not name.endswith("before")}
        assert section["qk_norm"] or all(0 <= error < 1.01 for error in fits.values()), fits

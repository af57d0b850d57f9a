"""Random plans against the slow decoder of tests/reference.py: logits, gradients, and decoding token by token.

The table that the slow decoder reads is written here from the YAML alone. More plans, and others every time:

    CLLM_PLANS=300 python -m pytest tests/plan/test_random_equations.py
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.plan.numbers import layer_range
from tests.plan.random_plans import GIVEN, LATENTS, PROPERTY, File, everything, model

IDS = [5, 17, 3, 17, 30, 8, 1]


# ---- tables ---------------------------------------------------------------------------------------------------------


def rows_of(section: dict[str, Any]) -> list[str]:
    """The table of tests/reference.py for a `model` section."""
    found = {i: row_of(entry, i, section) for entry in section["kv"]["layers"] for i in layer_range(entry["layers"])}
    rows = [found[i] for i in range(section["n_layers"])]
    if loop := section["kv"].get("loop"):
        turn = layer_range(loop["layers"])
        for i in range(turn[-1] + 1, turn[0] + len(turn) * loop["times"]):
            rows[i] += f" as {turn[0] + (i - turn[0]) % len(turn)}"
    return [row.strip() for row in rows]


def row_of(entry: dict[str, Any], i: int, section: dict[str, Any]) -> str:
    """The row of layer `i`."""
    text = own_text(entry["own"], section) if "own" in entry else ""
    if "latent" in entry:
        text = "latent" if entry["latent"].get("blocks", 1) == 1 else f"latent:{entry['latent']['blocks']}"
    elif "retention" in entry:
        text = "retention"
    read = entry.get("read", {})
    for how in ("join", "gate"):
        if how in read:
            return parts_text(how, read, i, section)
    keys, values = (entry.get(half) or read for half in ("keys", "values"))
    if keys or values:
        text += f" keys {read_text(keys, i)} values {read_text(values, i)}"
    return text + (f" window {entry['window']}" if entry.get("window") else "")


def own_text(own: dict[str, Any], section: dict[str, Any]) -> str:
    text = f"own:{own.get('n_kv_heads') or section['n_heads']}"
    if own.get("head_dim") not in (None, section["head_dim"]):
        text += f" of {own['head_dim']}"
    text += " norm" if own.get("kv_norm") else ""
    text += f" input {own['input']}" if own.get("input") is not None else ""
    text += f" only {own['only']}" if own.get("only") else ""
    text += " tied" if own.get("tie") else ""
    return text + (f" mix {'+'.join(map(str, own['mix']))}" if own.get("mix") else "")


def read_text(read: dict[str, Any], i: int) -> str:
    if "fuse" in read:
        return "+".join(f"w{j}" for j in read["fuse"])
    return str(read.get("share", i))


def parts_text(how: str, read: dict[str, Any], i: int, section: dict[str, Any]) -> str:
    """The row of a layer that reads several slots."""
    owned: list[dict[str, Any]] = []
    names = []
    for part in read[how]:
        part = {"share": part} if isinstance(part, int) else part
        name = str(part["share"]) if "share" in part else "and" if owned else "own"
        owned += [part["own"]] if "own" in part else []
        window = part.get("own", part).get("window")
        names.append(name + (f"/{window}" if window else ""))
    text = own_text(owned[0], section) if owned else ""
    for local in owned[1:]:
        text += f" and:{local.get('n_kv_heads') or section['n_heads']}"
        text += (" norm" if local.get("kv_norm") else "") + (" tied" if local.get("tie") else "")
    how = "blend" if read.get("gates") == "complementary" else how
    return f"{text} {how} {'+'.join(names)}" + (" sink" if read.get("sink") else "")


# ---- plans ----------------------------------------------------------------------------------------------------------


def listed(*layers: dict[str, Any], **kv: Any) -> dict[str, Any]:
    """A `model` section with one entry for each layer."""
    section = model([{"layers": i, **layer} for i, layer in enumerate(layers)])
    return section | {"kv": section["kv"] | kv, "qk_norm": True, "q_bias": True, "kv_bias": True}


WIDE: dict[str, Any] = {"n_kv_heads": 2, "head_dim": 6}
TIES_AND_HALVES = listed(
    {"own": {"tie": "kv"}},
    {"own": {"only": "keys", "input": 0}, "values": {"share": 0}},
    {"own": {"only": "values"}, "keys": {"fuse": [0, 1], "granularity": "complex"}},
    {"keys": {"fuse": [0, 1], "granularity": "complex"}, "values": {"fuse": [0, 2], "granularity": "matrix"}},
    {"own": {**WIDE, "tie": "kv", "input": 3}},
    {"own": {**WIDE, "only": "keys"}, "values": {"share": 4}},
    {"own": {**WIDE, "mix": [4]}, "keys": {"fuse": [5, 6]}, "values": {"fuse": [4, 6], "granularity": "matrix"}},
)
"""Halves beside ties: shared, fused, mixed, projected from elsewhere, in two sizes of heads."""
JOINS_OF_EVERYTHING = listed(
    {"own": {**WIDE, "tie": "kv"}},
    {"own": {**WIDE, "mix": [0], "input": 0}, "window": 5},
    {"read": {"join": [0, {"share": 1, "window": 3}, {"own": {**WIDE, "input": 1, "tie": "kv"}}], "sink": True}},
    {"read": {"gate": [2, {"own": {"head_dim": 6, "window": 3}}]}},
    {"keys": {"fuse": [0, 2], "granularity": "complex"}, "values": {"fuse": [2, 0], "granularity": "matrix"}},
    {"read": {"join": [{"own": {**WIDE, "mix": [2, 0]}}, {"own": {"head_dim": 6, "n_kv_heads": 1, "window": 2}}]}},
)
"""Slots that are tied, mixed and projected from elsewhere, read at once and fused."""
LOOPED = listed(
    {"own": {}},
    {"own": {"tie": "kv", "input": 0}, "window": 4},
    {"read": {"join": [{"own": {"n_kv_heads": 2, "window": 3}}, {"share": 1, "window": 2}], "sink": True}},
    {"own": {"tie": "kv", "input": 0}, "window": 4},
    {"read": {"gate": [{"share": 2, "window": 2}, {"own": {"n_kv_heads": 2, "window": 3}}]}},
    {"keys": {"share": 1}, "values": {"fuse": [3, 1], "granularity": "matrix"}, "window": 3},
    {"read": {"join": [{"share": 4, "window": 3}, {"share": 2, "window": 3}]}},
    {"own": {"mix": [1, 3]}, "keys": {"fuse": [7, 0]}, "values": {"fuse": [0, 7]}, "window": 4},
    loop={"layers": "1-2", "times": 3},
)
"""Three turns that own and read less from turn to turn, and a layer above them that mixes slots of two turns."""
LATENT = listed(
    {"latent": LATENTS[0]},
    {"read": {"share": 0}},
    {"latent": LATENTS[2]},
    {"own": {}},
    {"read": {"share": 2}},
    {"keys": {"share": 3}, "values": {"fuse": [3], "granularity": "matrix"}},
    {"latent": LATENTS[1]},
    {"retention": {}},
)
"""Latents of three shapes beside keys and values and a recurrent state."""
GEMMA = listed(
    {"own": {"n_kv_heads": 2}, "window": 4},
    {"own": {"n_kv_heads": 2}},
    {"keys": {"share": 0}, "values": {"share": 0}, "window": 3},
    {"own": {"tie": "kv"}, "window": 3},
    {"read": {"join": [{"share": 3, "window": 2}, {"own": {"window": 2}}, {"own": {"window": 3, "tie": "kv"}}]}},
    {"own": {"n_kv_heads": 2, "mix": [1]}},
    {"keys": {"fuse": [1, 5]}, "values": {"fuse": [0, 5]}, "window": 4},
    {"latent": LATENTS[1], "window": 4},
    {"read": {"gate": [{"own": {"window": 3}}, {"own": {"window": 2}}]}},
)
GEMMA |= {"rope": {"windowed_theta": 30.0}, "scale_embeddings": True, "qk_norm": True, "mlp_activation": "gelu_tanh"}
"""Layers like Gemma's: one RoPE for slots that keep a window, one for the others, with owners and reads of many forms.
The layer that fuses sees a window of slots that keep all tokens, and values of a slot that does not."""


# ---- the comparison -------------------------------------------------------------------------------------------------


def assert_equal_to_reference(section: dict[str, Any], config: ModelConfig, reference: Any, random_model: Any) -> None:
    """The model computes in fp64 but for its norms, RoPE and sums, which are fp32."""
    model = random_model(config).double()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights.setdefault("head.weight", weights["embed.weight"])
    owners = [entry for entry in section["kv"]["layers"] if "latent" in entry]
    latents = {i: {"q_lora_rank": None, **entry["latent"]} for entry in owners for i in layer_range(entry["layers"])}
    shape = {"n_heads": config.n_heads, "head_dim": config.resolved_head_dim, "scales": config.scale_embeddings}
    shape |= {"activation": config.mlp_activation, "windowed_theta": config.rope.windowed_theta}
    shape |= {"theta": config.rope.theta, "scaling": config.rope.scaling and config.rope.scaling.model_dump()}
    slow = reference.SlowDecoder(weights, rows_of(section), latent=latents, **shape)
    expected = slow.by_layers(IDS, **(section["kv"].get("iterations") or {}))
    logits = model(torch.tensor([IDS]))[0]
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=5e-5)
    if not config.plan().cyclic_spans():
        with torch.no_grad():
            torch.testing.assert_close(slow.by_tokens(IDS), expected, atol=1e-9, rtol=1e-9)

    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    # A norm after attention takes out a factor on all values, so that the gradient of the factor is almost 0.
    least = 1e-3 * max(float(w.grad.norm()) for w in weights.values() if w.grad is not None)
    for name, parameter in model.named_parameters():
        wanted = weights[name].grad
        assert wanted is not None, name
        assert parameter.grad is not None, name
        error = (parameter.grad - wanted).norm() / wanted.norm().clamp(min=least)
        assert error < 5e-4, f"{name}: the gradient is {error:.1e} off"


@settings(PROPERTY, max_examples=int(GIVEN or 20))
@example(section=TIES_AND_HALVES, norms_after=False)
@example(section=JOINS_OF_EVERYTHING, norms_after=False)
@example(section=LOOPED, norms_after=False)
@example(section=LATENT, norms_after=False)
@example(section=GEMMA, norms_after=True)
@given(section=everything(), norms_after=st.booleans())
def test_accepted_plans_compute_the_equations_and_others_are_refused_by_layer(
    section, norms_after, reference, random_model
):
    """`norms_after` is drawn here alone: with random weights it enlarges the rounding of fp32 a thousandfold."""
    section, refusal = section | {"norms_after": norms_after}, ""
    try:
        config = validate(File, {"model": section}).model
    except UserError as error:
        refusal = str(error)
    event("refused" if refusal else "accepted")
    if refusal:
        assert "\n" not in refusal
        assert re.match(r"model: layer \d+: ", refusal), refusal
        return
    for row in rows_of(section):
        for word in {"tied", "only", "mix", "input", "join", "gate", "blend", "as", "latent"} & set(row.split()):
            event(f"accepted, {word}")
    assert_equal_to_reference(section, config, reference, random_model)


@pytest.mark.parametrize("section", [TIES_AND_HALVES, JOINS_OF_EVERYTHING, LOOPED, LATENT, GEMMA])
def test_the_examples_are_accepted(section):
    validate(File, {"model": section})

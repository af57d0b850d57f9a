"""What the papers say, twice: every preset's plan as a table written by hand, and a slow decoder that computes their
equations with loops over layers, tokens and heads.

Nothing here uses the package. A plan is a list of one row a layer:

    own:2            the layer projects keys and values of 2 heads and reads them; `norm`: with a norm of their own;
                     `input 3`: it projects the output of layer 3; `only keys`: it has no values;
                     `tied`: one projection is both, keys with RoPE and values without;
                     `mix 0+1`: the slots of layers 0 and 1 are mixed into what it stores
    own:2 of 6       heads of 6 channels; a second slot has the same. Queries have those of the slot that they read
    latent           the layer owns a latent (MLA) and reads it; `latent:3`: of three blocks (MLRA)
    retention        the layer keeps a recurrent state
    read 3           keys and values are those of layer 3
    keys 3 values 0  keys are those of layer 3, values those of layer 0
    keys w0+w3 ...   a sum with learned weights
    window 4         a query sees 4 tokens, its own included
    and:2            the layer has a second slot, of 2 heads, which it alone reads
    join 4+own/3     one softmax over slot 4 and the layer's own slot, of which a query sees 3 tokens; `and` in place of
                     a number is the second slot; `sink`: with a learned term in the denominator
    as 2             the layer has the weights of layer 2, except those of sums, gates and sinks
    gate 0+own/3     a sum of two attentions with a gate for each; `blend`: with g and 1 - g
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# ---- tables ---------------------------------------------------------------------------------------------------------


def targets(text: str, heads: int = 4) -> list[str]:
    """LCKV's `layer_types`: `0_20x20_21` is layer 0, then twenty layers that read layer 20, then layer 21."""
    numbers: list[int] = []
    for part in text.split("_"):
        target, _, count = part.partition("x")
        numbers += [int(target)] * int(count or 1)
    return [f"own:{heads}" if target == i else f"read {target}" for i, target in enumerate(numbers)]


LATENT = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
ITERATIONS = {"forward": 2, "backward": 2}
CYCLIC = {"n_kv_heads": 2, "iterations": ITERATIONS}

# Options and rows of every preset on 8 layers with 4 query heads.
PRESETS: dict[str, tuple[dict, list[str]]] = {
    "mha": ({}, ["own:4"] * 8),
    "gqa": ({}, ["own:2"] * 8),
    "mqa": ({}, ["own:1"] * 8),
    "mla": ({"factor": 2, **LATENT}, ["latent", "read 0", "latent", "read 2", "latent", "read 4", "latent", "read 6"]),
    "mlra": (
        {"factor": 2, "blocks": 3, **LATENT},
        ["latent:3", "read 0", "latent:3", "read 2", "latent:3", "read 4", "latent:3", "read 6"],
    ),
    "xmla": ({"factor": 4, **LATENT}, ["latent", *["read 0"] * 3, "latent", *["read 4"] * 3]),
    "cla": (
        {"n_kv_heads": 2},
        ["own:2 norm", "read 0", "own:2 norm", "read 2", "own:2 norm", "read 4", "own:2 norm", "read 6"],
    ),
    "yoco": (
        {"window": 3, "n_kv_heads": 2},
        ["own:4 window 3"] * 4 + ["own:2 norm", "read 4", "read 4", "read 4"],
    ),
    "yoco_u": (
        {"window": 3, "n_kv_heads": 2, "times": 2, "n_lower": 2},
        ["own:4 window 3"] * 2 + ["own:4 window 3 as 0", "own:4 window 3 as 1", "own:2 norm"] + ["read 4"] * 3,
    ),
    "fusedkv": ({"n_kv_heads": 2}, ["own:2"] * 4 + ["keys w0+w3 values w0+w3"] * 4),
    "fusedkv_lite": ({"n_kv_heads": 2}, ["own:2"] * 4 + ["keys 3 values 0"] * 4),
    "fusedkv_lite_learnable": ({"n_kv_heads": 2}, ["own:2"] * 4 + ["keys w3 values w0"] * 4),
    "fusedkv_lite_reversed": ({"n_kv_heads": 2}, ["own:2"] * 4 + ["keys 0 values 3"] * 4),
    "kv_tie": ({"n_kv_heads": 2}, ["own:2 tied"] * 8),
    "yoco_pp": (
        {"n_kv_heads": 2, "window": 3},
        ["own:2 window 3", "own:2 mix 0 window 3", "own:2 mix 0 window 3", "own:2 mix 0", *["read 3"] * 4],
    ),
    "resformer": ({"n_kv_heads": 2}, ["own:2", *(f"own:2 keys {i} values w0+w{i}" for i in range(1, 8))]),
    "svformer": (
        {"n_kv_heads": 2, "kv_norm": True},
        ["own:2 norm", *(f"own:2 norm only keys keys {i} values 0" for i in range(1, 8))],
    ),
    "swiftkv": ({"n_kv_heads": 2}, ["own:2"] * 4 + ["own:2 input 3"] * 4),
    "ced": (
        {"n_kv_heads": 2, "window": 3, "kv_norm": True},
        ["own:2 norm"] * 4 + ["own:2 input 3 and:2 join own+and/3 sink"] * 4,
    ),
    "hysparse": (
        {"n_kv_heads": 2, "window": 2, "n_gated": 3},
        ["own:2", *["own:2 gate 0+own/2"] * 3, "own:2", *["own:2 gate 4+own/2"] * 3],
    ),
    "trailing": (
        {"n_kv_heads": 2, "window": 3, "full_every": 2},
        ["own:2 window 3", "own:2"] * 2 + ["read 2 window 3", "read 3"] * 2,
    ),
    "afm": ({"n_kv_heads": 2}, ["own:2"] * 5 + ["read 4"] * 3),
    "pizza_bottom": ({"n_kv_heads": 2}, targets("0_1_2_3x5", 2)),
    "pizza_middle": (CYCLIC, targets("0_1_2_5x5", 2)),
    "pizza_top": (CYCLIC, targets("0_1_2_7x5", 2)),
    "sandwich_bottom": ({"n_kv_heads": 2}, targets("0_1_2x5_7", 2)),
    "sandwich_middle": (CYCLIC, targets("0_1_4x5_7", 2)),
    "sandwich_top": (CYCLIC, targets("0_1_6x5_7", 2)),
    "lasagna_bottom": ({"n_kv_heads": 2}, targets("0x2_2x2_4x2_6x2", 2)),
    "lasagna_middle": (CYCLIC, targets("0_2x3_4x2_6x2", 2)),
    "lasagna_top": (CYCLIC, targets("0_3x3_5x2_7x2", 2)),
    "lckv": (CYCLIC, targets("0_6x6_7", 2)),
}

# More to compute: options of presets that change the equations.
VARIANTS: dict[str, tuple[dict, list[str]]] = {
    "yoco with retention": (
        {"preset": "yoco", "lower": "retention", "n_kv_heads": 2},
        ["retention"] * 4 + ["own:2 norm", "read 4", "read 4", "read 4"],
    ),
    "mla, full-rank queries": ({"preset": "mla", **LATENT, "q_lora_rank": None}, ["latent"] * 8),
    "fusedkv, scalar weights": (
        {"preset": "fusedkv", "granularity": "scalar", "n_kv_heads": 2},
        ["own:2"] * 4 + ["keys w0+w3 values w0+w3"] * 4,
    ),
    "fusedkv, weights per head": (
        {"preset": "fusedkv", "per_head": True, "n_kv_heads": 2},
        ["own:2"] * 4 + ["keys w0+w3 values w0+w3"] * 4,
    ),
    "fusedkv, scalar weights per head": (
        {"preset": "fusedkv", "granularity": "scalar", "per_head": True, "n_kv_heads": 2},
        ["own:2"] * 4 + ["keys w0+w3 values w0+w3"] * 4,
    ),
    "fusedkv, complex keys and matrix values": (
        {"preset": "fusedkv", "keys": "complex", "values": "matrix", "n_kv_heads": 2},
        ["own:2"] * 4 + ["keys w0+w3 values w0+w3"] * 4,
    ),
    "fusedkv, three sources": (
        {"preset": "fusedkv", "n_storage": 3, "sources": [2, 0, 1], "n_kv_heads": 2},
        ["own:2"] * 3 + ["keys w2+w0+w1 values w2+w0+w1"] * 5,
    ),
    "learnable, weights per head": (
        {"preset": "fusedkv_lite_learnable", "per_head": True, "n_kv_heads": 2},
        ["own:2"] * 4 + ["keys w3 values w0"] * 4,
    ),
    "cla, factor 3": (
        {"preset": "cla", "factor": 3, "n_kv_heads": 2, "kv_norm": False},
        ["own:2", "own:2", "read 1", "read 1", "own:2", "read 4", "read 4", "read 4"],
    ),
    "tied slots of other layers": (
        {
            "layers": [
                {"layers": 0, "own": {"n_kv_heads": 2, "tie": "kv", "kv_norm": True}},
                {"layers": 1, "own": {"n_kv_heads": 2, "tie": "kv"}, "window": 3},
                {"layers": [2, 4], "own": {"n_kv_heads": 2, "tie": "kv", "input": 0}, "values": {"share": 0}},
                {"layers": [3, 5], "keys": {"share": 2}, "values": {"share": 0}},
                {"layers": [6, 7], "keys": {"fuse": [0, 4]}, "values": {"fuse": [2, 0]}},
            ]
        },
        [
            *("own:2 norm tied", "own:2 tied window 3"),
            *("own:2 input 0 tied keys 2 values 0", "keys 2 values 0"),
            *("own:2 input 0 tied keys 4 values 0", "keys 2 values 0"),
            *["keys w0+w4 values w2+w0"] * 2,
        ],
    ),
    "mixes of mixes": (
        {
            "layers": [
                {"layers": 0, "own": {"n_kv_heads": 2, "tie": "kv"}},
                {"layers": 1, "own": {"n_kv_heads": 2, "mix": [0], "kv_norm": True}},
                {"layers": [2, 4, 6], "own": {"n_kv_heads": 2, "mix": [1, 0], "input": 0}},
                {"layers": [3, 5, 7], "keys": {"fuse": [0, 2]}, "values": {"fuse": [1, 2]}},
            ]
        },
        [
            *("own:2 tied", "own:2 norm mix 0"),
            *["own:2 input 0 mix 1+0", "keys w0+w2 values w1+w2"] * 3,
        ],
    ),
    "halves of other layers": (
        {
            "layers": [
                {"layers": [0, 3], "own": {"n_kv_heads": 2}},
                {"layers": "1-2", "own": {"n_kv_heads": 2, "only": "values"}, "keys": {"share": 0}},
                {"layers": [4, 6], "own": {"n_kv_heads": 2, "only": "keys", "input": 1}, "values": {"fuse": [1, 3]}},
                {"layers": [5, 7], "keys": {"fuse": [0, 4]}, "values": {"fuse": [2]}},
            ]
        },
        [
            *("own:2", "own:2 only values keys 0 values 1", "own:2 only values keys 0 values 2", "own:2"),
            *("own:2 input 1 only keys keys 4 values w1+w3", "keys w0+w4 values w2"),
            *("own:2 input 1 only keys keys 6 values w1+w3", "keys w0+w4 values w2"),
        ],
    ),
    "swiftkv, groups of two": (
        {"preset": "swiftkv", "n_lower": 3, "group": 2, "n_kv_heads": 2},
        ["own:2"] * 3 + ["own:2 input 2", "own:2 input 2", "read 4", "own:2 input 2", "read 6"],
    ),
    "ced, groups of two": (
        {"preset": "ced", "n_lower": 3, "window": 2, "group": 2, "sink": False, "n_kv_heads": 4},
        [
            *["own:4"] * 3,
            "own:4 input 2 and:4 join own+and/2",
            *("own:4 input 2 and:4 join own+and/2", "own:4 join 4+own/2"),
            *("own:4 input 2 and:4 join own+and/2", "own:4 join 6+own/2"),
        ],
    ),
    "joins of every slot": (
        {
            "layers": [
                {"layers": 0, "own": {"n_kv_heads": 2, "tie": "kv"}},
                {"layers": [1, 4], "read": {"join": [{"own": {"n_kv_heads": 1, "window": 4}}], "sink": True}},
                {
                    "layers": [2, 5],
                    "read": {
                        "join": [
                            0,
                            {"share": 1, "window": 1},
                            {"own": {"n_kv_heads": 4, "window": 3}},
                            {"own": {"n_kv_heads": 2, "tie": "kv", "kv_norm": True}},
                        ]
                    },
                },
                {"layers": [3, 6], "read": {"join": [{"share": 0, "window": 3}, {"share": 2, "window": 2}]}},
                {"layers": 7, "read": {"gate": [0, {"share": 5, "window": 2}], "gates": "complementary"}},
            ]
        },
        [
            "own:2 tied",
            "own:1 join own/4 sink",
            "own:4 and:2 norm tied join 0+1/1+own/3+and",
            "join 0/3+2/2",
            "own:1 join own/4 sink",
            "own:4 and:2 norm tied join 0+1/1+own/3+and",
            "join 0/3+2/2",
            "blend 0+5/2",
        ],
    ),
    "a loop that reads its first turn": (
        {
            "layers": [
                {"layers": [0, 7], "own": {"n_kv_heads": 2}},
                {"layers": [1, 3], "own": {"n_kv_heads": 2, "kv_norm": True}},
                {"layers": 2, "keys": {"fuse": [0, 1]}, "values": {"share": 1}},
                {"layers": 4, "keys": {"fuse": [1, 3]}, "values": {"share": 3}},
                {"layers": 5, "read": {"gate": [1, {"own": {"n_kv_heads": 2, "kv_norm": True, "window": 2}}]}},
                {"layers": 6, "keys": {"share": 1}, "values": {"share": 0}},
            ],
            "loop": {"layers": "1-2", "times": 3},
        },
        [
            *("own:2", "own:2 norm", "keys w0+w1 values 1", "own:2 norm as 1", "keys w1+w3 values 3 as 2"),
            *("own:2 norm gate 1+own/2 as 1", "keys 1 values 0 as 2", "own:2"),
        ],
    ),
    "heads of three sizes": (
        {
            "layers": [
                {"layers": [0, 2], "own": {"n_kv_heads": 2}, "window": 3},
                {"layers": 1, "own": {"n_kv_heads": 2, "head_dim": 12, "tie": "kv"}},
                {
                    "layers": 3,
                    "own": {"n_kv_heads": 2, "head_dim": 12, "mix": [1]},
                    "keys": {"share": 2},
                    "values": {"share": 2},
                    "window": 2,
                },
                {
                    "layers": 4,
                    "keys": {"fuse": [1, 3], "granularity": "complex"},
                    "values": {"fuse": [3, 1], "granularity": "matrix"},
                    "window": 2,
                },
                {
                    "layers": 5,
                    "read": {
                        "join": [
                            {"own": {"n_kv_heads": 4, "head_dim": 6, "input": 2}},
                            {"own": {"n_kv_heads": 1, "head_dim": 6, "window": 2}},
                        ]
                    },
                },
                {"layers": 6, "read": {"gate": [5, {"own": {"n_kv_heads": 2, "head_dim": 6, "window": 3}}]}},
                {"layers": 7, "own": {"n_kv_heads": 2, "head_dim": 12, "only": "keys"}, "values": {"share": 1}},
            ]
        },
        [
            *("own:2 window 3", "own:2 of 12 tied", "own:2 window 3"),
            *("own:2 of 12 mix 1 read 2 window 2", "keys w1+w3 values w3+w1 window 2"),
            *("own:4 of 6 input 2 and:1 join own+and/2", "own:2 of 6 gate 5+own/3"),
            "own:2 of 12 only keys keys 7 values 1",
        ],
    ),
    "mha, window and kv norm": ({"preset": "mha", "window": 2, "kv_norm": True}, ["own:4 norm window 2"] * 8),
}

_ROW = re.compile(
    r"(?:own:(?P<heads>\d+)(?: of (?P<size>\d+))?|(?P<kind>latent|retention)(?::(?P<blocks>\d+))?)?"
    r"(?P<norm> norm)?"
    r"(?: input (?P<input>\d+))?"
    r"(?: only (?P<only>keys|values))?"
    r"(?P<tied> tied)?"
    r"(?: mix (?P<mix>[0-9+]+))?"
    r"(?: and:(?P<local>\d+)(?P<local_norm> norm)?(?P<local_tied> tied)?)?"
    r"(?: ?(?P<how>join|gate|blend) (?P<parts>\S+)(?P<sink> sink)?)?"
    r"(?: ?read (?P<read>\d+)| ?keys (?P<keys>\S+) values (?P<values>\S+))?"
    r"(?: window (?P<window>\d+))?"
    r"(?: as (?P<origin>\d+))?"
)


@dataclass
class Row:
    """One layer of a table: what it owns, and where its keys and values come from."""

    owns: bool
    heads: int
    size: int | None
    origin: int
    kind: str | None
    blocks: int
    kv_norm: bool
    input: int | None
    only: str | None
    tied: bool
    mix: list[int]
    keys: list[int]
    values: list[int]
    window: int | None
    local: bool
    local_norm: bool
    local_tied: bool
    how: str | None
    sink: bool
    parts: list[tuple[object, int | None]]
    weighted: dict[str, bool]

    @classmethod
    def parse(cls, text: str, layer: int) -> Row:
        found = _ROW.fullmatch(text)
        assert found, text
        keys, values = found["keys"] or found["read"] or str(layer), found["values"] or found["read"] or str(layer)
        parts: list[tuple[object, int | None]] = []
        for name, _, window in (part.partition("/") for part in (found["parts"] or "").split("+") if part):
            slot = layer if name == "own" else ("and", layer) if name == "and" else int(name)
            parts.append((slot, int(window) if window else None))
        if parts:
            keys = values = "+".join(str(slot) for slot, _ in parts if isinstance(slot, int))
        return cls(
            owns=bool(found["heads"] or found["kind"]),
            heads=int(found["heads"] or 0),
            size=int(found["size"]) if found["size"] else None,
            origin=int(found["origin"] or layer),
            kind=found["kind"],
            blocks=int(found["blocks"] or 1),
            kv_norm=bool(found["norm"]),
            input=int(found["input"]) if found["input"] else None,
            only=found["only"],
            tied=bool(found["tied"]),
            mix=[int(number) for number in re.findall(r"\d+", found["mix"] or "")],
            keys=[int(number) for number in re.findall(r"\d+", keys)],
            values=[int(number) for number in re.findall(r"\d+", values)],
            window=int(found["window"]) if found["window"] else None,
            local=bool(found["local"]),
            local_norm=bool(found["local_norm"]),
            local_tied=bool(found["local_tied"]),
            how=found["how"],
            sink=bool(found["sink"]),
            parts=parts,
            weighted={"keys": "w" in keys, "values": "w" in values},
        )


# ---- the equations -------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) ⊙ weight."""
    normed = x / torch.sqrt((x * x).mean() + eps)
    return normed if weight is None else normed * weight


Base = tuple[float, dict | None]
"""theta of RoPE, and its scaling to longer contexts."""


def frequency(j: int, d: int, base: Base) -> float:
    """Radians by which pair j of d/2 turns for each position: theta^(-2j/d), or less where it is scaled by a factor.

    `linear`: all pairs. `llama3`: those whose wavelength is longer than L / low_freq_factor of the original context L,
    in part from L / high_freq_factor on. `yarn`: those that turn less than beta_slow times in L, in part from beta_fast
    on, by a ramp over whole pairs."""
    theta, scaling = base
    f = theta ** (-2 * j / d)
    if scaling is None:
        return f
    slow = f / scaling["factor"]
    if scaling["type"] == "linear":
        return slow
    length = scaling["original_max_seq_len"]
    if scaling["type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        share = (length / (2 * math.pi / f) - low) / (high - low)
    else:
        first, last = (
            d * math.log(length / (scaling[turns] * 2 * math.pi)) / (2 * math.log(theta))
            for turns in ("beta_fast", "beta_slow")
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), d - 1)
        share = 1 - (j - first) / max(last - first, 0.001)
    share = min(max(share, 0.0), 1.0)
    return share * f + (1 - share) * slow


def rotate(x: Tensor, position: int, base: Base) -> Tensor:
    """RoPE: channels j and j + d/2 turn by position · frequency. YaRN multiplies by 0.1 ln(factor) + 1 too."""
    half, scaling = len(x) // 2, base[1]
    factor = 1.0
    if scaling is not None and scaling["type"] == "yarn":
        factor = scaling["attention_factor"] or 0.1 * math.log(scaling["factor"]) + 1
    turned = list(x)
    for j in range(half):
        angle = position * frequency(j, len(x), base)
        turned[j] = factor * (x[j] * math.cos(angle) - x[j + half] * math.sin(angle))
        turned[j + half] = factor * (x[j] * math.sin(angle) + x[j + half] * math.cos(angle))
    return torch.stack(turned)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax_read(query: Tensor, keys: list[Tensor], values: list[Tensor], width: int) -> Tensor:
    """Σ_s softmax_s(q·k_s / √d) v_s; zeros where there is nothing to see."""
    if not keys:
        return torch.zeros(width, dtype=query.dtype)
    scores = [torch.exp(query @ key / math.sqrt(len(query))) for key in keys]
    total = sum(scores)
    read = (score / total * value for score, value in zip(scores, values, strict=True))
    return sum(read, start=torch.zeros(width, dtype=query.dtype))


class SlowDecoder:
    """Logits of one sequence, from a dictionary of weights by name and a table of rows.

    `slots[i][t]` is what layer i caches for token t: keys and values of each KV head, or a latent and its RoPE key.
    `latent` has the widths of all latents, or those of each owner by its layer.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        rows: list[str],
        *,
        n_heads: int,
        head_dim: int,
        latent: dict,
        theta: float = 10000.0,
        scaling: dict | None = None,
        windowed_theta: float | None = None,
        activation: str = "silu",
        scales: bool = False,
    ):
        self.windowed_theta, self.scales = windowed_theta, scales
        self.activation = {"silu": silu, "gelu_tanh": gelu_tanh}[activation]
        self.weights, self.n_heads, self.head_dim, self.latent = weights, n_heads, head_dim, latent
        self.layers = [Row.parse(text, i) for i, text in enumerate(rows)]
        self.rope, self.eps = (theta, scaling), 1e-5

    # ---- two orders of computing the same steps ---------------------------------------------------------------------

    def by_layers(self, ids: list[int], forward: int = 0, backward: int = 0) -> Tensor:
        """Layer by layer, (T, vocab). Layers that read from above, and those up to the layer they read, are computed
        forward + backward times, each time with the slots of the time before, which are zeros for the first time; the
        first `forward` times pass on no gradient."""
        slots: dict = {}
        xs, i = self.embed(ids), 0
        while i < len(self.layers):
            last = i
            for j in range(i, len(self.layers)):  # the run of layers that reads no further up than itself
                if j <= last:
                    last = max(last, *self.layers[j].keys, *self.layers[j].values)
            if last == i:
                xs = self.layer(i, xs, slots)
                i += 1
                continue
            entering = xs
            for turn in range(forward + backward):
                xs = entering
                for j in range(i, last + 1):
                    xs = self.layer(j, xs, slots)
                if turn < forward:
                    for layer in range(i, last + 1):
                        slots[layer] = {t: self.detached(slot) for t, slot in slots.get(layer, {}).items()}
            i = last + 1
        return self.output(xs)

    def by_tokens(self, ids: list[int]) -> Tensor:
        """Token by token, (T, vocab): each passes every layer before the next begins. So does decoding, and so plans
        that read from above are defined."""
        slots: dict = {}
        ends = []
        for t, x in enumerate(self.embed(ids)):
            for i in range(len(self.layers)):
                x = self.step(i, t, x, slots)
            ends.append(x)
        return self.output(ends)

    def layer(self, i: int, xs: list[Tensor], slots: dict) -> list[Tensor]:
        return [self.step(i, t, x, slots) for t, x in enumerate(xs)]

    @staticmethod
    def detached(slot: tuple) -> tuple:
        return tuple([t.detach() for t in part] if isinstance(part, list) else part.detach() for part in slot)

    def embed(self, ids: list[int]) -> list[Tensor]:
        factor = math.sqrt(self.weights["embed.weight"].shape[1]) if self.scales else 1.0
        return [self.weights["embed.weight"][i] * factor for i in ids]

    def output(self, xs: list[Tensor]) -> Tensor:
        normed = [rms_norm(x, self.weights["norm.weight"], self.eps) for x in xs]
        return torch.stack([self.weights["head.weight"] @ x for x in normed])

    # ---- one layer, one token ---------------------------------------------------------------------------------------

    def w(self, i: int, name: str) -> Tensor:
        found = self.has(i, name)
        assert found is not None, f"layer {i} has no {name}"
        return found

    def has(self, i: int, name: str) -> Tensor | None:
        """A weight of the layer, or in a loop that of the first turn's layer; None if neither has it."""
        own = self.weights.get(f"blocks.{i}.{name}")
        return self.weights.get(f"blocks.{self.layers[i].origin}.{name}") if own is None else own

    def base(self, slot: object) -> Base:
        """The RoPE base of the keys of a slot: another one, without scaling, where the slot keeps a window."""
        row = self.layers[slot[1] if isinstance(slot, tuple) else slot]
        window = dict(row.parts)[slot] if row.parts else row.window
        return self.rope if window is None or self.windowed_theta is None else (self.windowed_theta, None)

    def size(self, i: int) -> int:
        """Channels of a head of the slot of layer i."""
        return self.layers[i].size or self.head_dim

    def linear(self, i: int, name: str, x: Tensor) -> Tensor:
        bias = self.has(i, f"{name}.bias")
        y = self.w(i, f"{name}.weight") @ x
        return y if bias is None else y + bias

    def step(self, i: int, t: int, x: Tensor, slots: dict) -> Tensor:
        """x + attention(norm(x)), then x + MLP(norm(x)); or x + norm(attention(norm(x))) and x + norm(MLP(norm(x)))."""
        row, source = self.layers[i], self.layers[self.layers[i].keys[0]]
        normed = rms_norm(x, self.w(i, "attention_norm.weight"), self.eps)
        if row.kind == "latent":
            slots.setdefault(i, {})[t] = self.project_latent(i, t, normed)
        elif row.owns and row.kind is None:
            slots.setdefault(i, {})[t] = self.project(i, t, x, normed, slots)
        if row.local:
            slots.setdefault(("and", i), {})[t] = self.project_local(i, t, x, normed)
        if row.kind == "retention":
            heads = self.retention(i, t, normed, slots)
        elif source.kind == "latent":
            heads = self.latent_attention(i, t, normed, slots)
        elif row.how is not None:
            heads = self.attention_to_parts(i, t, normed, slots)
        else:
            heads = self.attention(i, t, normed, slots)
        x = x + self.after(i, "attention", self.linear(i, "attention.o_proj", torch.cat(heads)))
        normed = rms_norm(x, self.w(i, "mlp_norm.weight"), self.eps)
        gate, up = self.linear(i, "mlp.gate_proj", normed), self.linear(i, "mlp.up_proj", normed)
        x = x + self.after(i, "mlp", self.linear(i, "mlp.down_proj", self.activation(gate) * up))
        slots["output", i, t] = x
        return x

    def after(self, i: int, name: str, x: Tensor) -> Tensor:
        weight = self.has(i, f"after_{name}_norm.weight")
        return x if weight is None else rms_norm(x, weight, self.eps)

    def latent_of(self, i: int) -> dict:
        """The widths of the latent that layer i reads."""
        return self.latent.get(self.layers[i].keys[0], self.latent)

    def visible(self, i: int, t: int) -> list[int]:
        """The tokens that token t sees in layer i; a layer that reads from above does not see the token itself."""
        row = self.layers[i]
        above = max(row.keys + row.values) > i
        first = 0 if row.window is None else max(0, t - row.window + 1)
        return list(range(first, t if above else t + 1))

    def project(self, i: int, t: int, x: Tensor, normed: Tensor, slots: dict) -> tuple[list[Tensor], list[Tensor]]:
        source = self.layers[i].input
        if source is not None:  # SwiftKV, section 3.2: one norm of that output for all layers above
            normed = rms_norm(slots["output", source, t], self.weights[f"stream_norms.{source}.weight"], self.eps)
        if self.layers[i].kv_norm:
            normed = rms_norm(x, self.w(i, "attention.owner.norm.weight"), self.eps)
        keys: Sequence[Tensor] = ()
        values: Sequence[Tensor] = ()
        if self.layers[i].tied:
            keys = values = self.linear(i, "attention.owner.kv_proj", normed).split(self.size(i))
        elif self.layers[i].only != "values":
            keys = self.linear(i, "attention.owner.k_proj", normed).split(self.size(i))
        if self.layers[i].only != "keys" and not self.layers[i].tied:
            values = self.linear(i, "attention.owner.v_proj", normed).split(self.size(i))
        norm = self.has(i, "attention.owner.k_norm.weight")
        if norm is not None:
            keys = [rms_norm(key, norm, self.eps) for key in keys]
            values = keys if self.layers[i].tied else values
        keys = [rotate(key, t, self.base(i)) for key in keys]
        if self.layers[i].mix:
            keys = self.mixed(i, "keys", keys, [slots[j][t][0] for j in self.layers[i].mix])
            values = self.mixed(i, "values", values, [slots[j][t][1] for j in self.layers[i].mix])
        return list(keys), list(values)

    def project_local(self, i: int, t: int, x: Tensor, normed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The second slot, always of the layer's own input."""
        if self.layers[i].local_norm:
            normed = rms_norm(x, self.w(i, "attention.local.norm.weight"), self.eps)
        name = "kv_proj" if self.layers[i].local_tied else "k_proj"
        keys = self.linear(i, f"attention.local.{name}", normed).split(self.size(i))
        norm = self.has(i, "attention.local.k_norm.weight")
        keys = keys if norm is None else [rms_norm(key, norm, self.eps) for key in keys]
        tied = self.layers[i].local_tied
        values = keys if tied else self.linear(i, "attention.local.v_proj", normed).split(self.size(i))
        return [rotate(key, t, self.base(("and", i))) for key in keys], list(values)

    def attention_to_parts(self, i: int, t: int, normed: Tensor, slots: dict) -> list[Tensor]:
        """One softmax over the keys of several slots, with exp(s_h) in its denominator if there is a sink:
        Σ_j exp(z_j) v_j / (Σ_j exp(z_j) + exp(s_h)); or one for each slot, and Σ_p g_ph o_ph."""
        row = self.layers[i]
        size = self.size(self.layers[i].keys[0])
        queries = self.linear(i, "attention.q_proj", normed).split(size)
        norm = self.has(i, "attention.q_norm.weight")
        sink = self.w(i, "attention.sink.weight") if row.sink else None
        heads = []
        for h, query in enumerate(queries):
            query = rotate(query if norm is None else rms_norm(query, norm, self.eps), t, self.base(row.parts[0][0]))
            read: list[tuple[list[Tensor], list[Tensor]]] = []
            for slot, window in row.parts:
                seen = range(0 if window is None else max(0, t - window + 1), t + 1)
                g = h * len(slots[slot][t][0]) // self.n_heads
                read.append(([slots[slot][s][0][g] for s in seen], [slots[slot][s][1][g] for s in seen]))
            if row.how == "join":
                scores = [
                    (torch.exp(query @ key / math.sqrt(size)), v)
                    for ks, vs in read
                    for key, v in zip(ks, vs, strict=True)
                ]
                total = sum(score for score, _ in scores) + (0 if sink is None else torch.exp(sink[h]))
                heads.append(torch.stack([score * v for score, v in scores]).sum(0) / total)
                continue
            weight = self.w(i, "attention.gates.weight")
            gates = [1 / (1 + torch.exp(-row @ normed)) for row in weight[h :: self.n_heads]]
            gates = [gates[0], 1 - gates[0]] if row.how == "blend" else gates
            outs = [softmax_read(query, ks, vs, size) for ks, vs in read]
            heads.append(torch.stack([gate * out for gate, out in zip(gates, outs, strict=True)]).sum(0))
        return heads

    def mixed(self, i: int, part: str, own: Sequence[Tensor], others: list[list[Tensor]]) -> list[Tensor]:
        """YOCO++: 35 (Σ_j w_j X_j + w X) of one token, head by head."""
        *weights, last = self.w(i, f"attention.owner.mixed_{part}.weight")
        return [
            35 * (last * x + sum(weight * other[g] for weight, other in zip(weights, others, strict=True)))
            for g, x in enumerate(own)
        ]

    def read(self, i: int, part: str, sources: list[int], slots: dict, s: int, head: int) -> Tensor:
        """Σ_j w_j ⊙ X_j of one token and KV head, or X_j as it is. One weight may serve a whole head, a rotated pair
        (channels j and j + d/2, keys only) or a channel."""
        parts: list = []
        for j in sources:  # in the first pass over a cycle, slots of layers above are zeros
            slot = slots[j][s][0 if part == "keys" else 1][head] if j in slots else None
            parts.append(self.weights["embed.weight"].new_zeros(self.size(j)) if slot is None else slot)
        if not self.layers[i].weighted[part]:
            return parts[0]
        weight = self.w(i, f"attention.{part}.weight")  # sources, 1 or heads, channels
        if weight.ndim == 4:  # sources, heads, (real and imaginary part, pairs) or (channels in, channels out)
            return torch.stack([self.times(x, weight[n, head], part) for n, x in enumerate(parts)]).sum(0)
        of_head = weight[:, head if weight.shape[1] > 1 else 0]
        channels = [c % weight.shape[2] for c in range(len(parts[0]))]
        return sum(of_head[n, channels] * x for n, x in enumerate(parts))

    @staticmethod
    def times(x: Tensor, weight: Tensor, part: str) -> Tensor:
        """A key's pairs x_c + i x_{c+d/2} times complex numbers, or a value times a matrix, channel by channel."""
        if part == "values":
            return torch.stack([torch.stack([x[c] * weight[c, e] for c in range(len(x))]).sum() for e in range(len(x))])
        half, (real, imaginary) = len(x) // 2, weight
        first = [real[c] * x[c] - imaginary[c] * x[c + half] for c in range(half)]
        second = [imaginary[c] * x[c] + real[c] * x[c + half] for c in range(half)]
        return torch.stack(first + second)

    def attention(self, i: int, t: int, normed: Tensor, slots: dict) -> list[Tensor]:
        row = self.layers[i]
        size = self.size(self.layers[i].keys[0])
        queries = self.linear(i, "attention.q_proj", normed).split(size)
        norm = self.has(i, "attention.q_norm.weight")
        seen = self.visible(i, t)
        heads = []
        for h, query in enumerate(queries):
            query = rotate(query if norm is None else rms_norm(query, norm, self.eps), t, self.base(row.keys[0]))
            g = h * self.layers[row.keys[0]].heads // self.n_heads
            keys = [self.read(i, "keys", row.keys, slots, s, g) for s in seen]
            values = [self.read(i, "values", row.values, slots, s, g) for s in seen]
            heads.append(softmax_read(query, keys, values, size))
        return heads

    def project_latent(self, i: int, t: int, normed: Tensor) -> tuple[list[Tensor], Tensor]:
        """c = norm(W_DKV h), k_R = RoPE(W_KR h). MLRA: c is cut into blocks, each √(d / r) norm(c_i), r its width."""
        rank, blocks = self.latent.get(i, self.latent)["kv_lora_rank"], self.layers[i].blocks
        both = self.linear(i, "attention.owner.down_proj", normed)
        weights = self.w(i, "attention.owner.norm.weight").chunk(blocks)
        latent = [rms_norm(c, w, self.eps) for c, w in zip(both[:rank].chunk(blocks), weights, strict=True)]
        if blocks > 1:
            latent = [math.sqrt(len(normed) / len(c)) * c for c in latent]
        return latent, rotate(both[rank:], t, self.base(i))

    def latent_attention(self, i: int, t: int, normed: Tensor, slots: dict) -> list[Tensor]:
        """DeepSeek-V2, eq. 9 to 19: q_i = [W_UQ c_Q; RoPE(W_QR c_Q)], k_i = [W_UK c; k_R], v_i = W_UV c.

        MLRA: c_Q is scaled by √(d / r_Q), and n blocks of c give n attentions: o = n^-½ Σ_b o_b."""
        widths = self.latent_of(i)
        nope, rope = widths["qk_nope_head_dim"], widths["qk_rope_head_dim"]
        x = normed
        if widths["q_lora_rank"]:
            x = rms_norm(self.linear(i, "attention.q_down_proj", x), self.w(i, "attention.q_norm.weight"), self.eps)
        blocks = self.layers[self.layers[i].keys[0]].blocks
        if blocks > 1 and widths["q_lora_rank"]:
            x = math.sqrt(len(normed) / len(x)) * x
        queries = self.linear(i, "attention.q_proj", x).split(nope + rope)
        cached = slots.get(self.layers[i].keys[0])
        seen = [] if cached is None else self.visible(i, t)  # a latent of zeros has values of zero
        heads = []
        for h, query in enumerate(queries):
            query = torch.cat((query[:nope], rotate(query[nope:], t, self.base(self.layers[i].keys[0]))))
            out = torch.zeros(widths["v_head_dim"], dtype=query.dtype)
            for block in range(blocks):
                name = "attention.kv_up_proj" + (f".{block}" if blocks > 1 else "")
                keys, values = [], []
                for s in seen:
                    latent, k_rope = cached[s]
                    up = self.linear(i, name, latent[block]).split(nope + widths["v_head_dim"])[h]
                    keys.append(torch.cat((up[:nope], k_rope)))
                    values.append(up[nope:])
                out = out + softmax_read(query, keys, values, widths["v_head_dim"])
            heads.append(out / math.sqrt(blocks))
        return heads

    def retention(self, i: int, t: int, normed: Tensor, slots: dict) -> list[Tensor]:
        """YOCO, eq. 5 to 7: S_t = γ_t S_{t-1} + k_tᵀ v_t, γ = σ(W_γ x)^(1/16), silu(gate) ⊙ norm(q_t S_t / √d)."""
        q, k, v, gate = (
            self.linear(i, f"attention.{name}_proj", normed).split(self.head_dim) for name in ("q", "k", "v", "gate")
        )
        decay = (1 / (1 + torch.exp(-self.linear(i, "attention.decay_proj", normed)))) ** (1 / 16)
        heads = []
        for h in range(self.n_heads):
            key, query = rotate(k[h], t, self.rope), rotate(q[h], t, self.rope)
            state = key[:, None] * v[h]
            if t > 0:
                state = state + decay[h] * slots["state", i, h, t - 1]
            slots["state", i, h, t] = state
            out = query @ state / math.sqrt(self.head_dim)
            heads.append(silu(gate[h]) * rms_norm(out, None, self.eps))
        return heads

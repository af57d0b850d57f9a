"""Students: their plans, and the starts and recipes to try."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cllm.cache.accounting import kv_bytes
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.uptrain.teacher import student_model, teacher_config

ROOT = Path(__file__).resolve().parents[2]
HALF, QUARTER, EIGHTH, WHOLE = Fraction(1, 2), Fraction(1, 4), Fraction(1, 8), Fraction(1)
SHARES = {str(share): share for share in (HALF, QUARTER)}
"""Shares of the teacher's cache that `--share` may name."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of a teacher that plans depend on."""

    n_layers: int
    n_heads: int
    kv_heads: int

    @classmethod
    def of(cls, model: ModelConfig, teacher: Path) -> Shape:
        """Raises `UserError` for a teacher whose layer 0 has no keys and values."""
        heads = model.plan().source(0).kv_heads
        if heads is None:
            raise UserError(f"--teacher {teacher}: layer 0 has no keys and values; allowed: mha, gqa, mqa")
        return cls(model.n_layers, model.n_heads, heads)

    def fewer_heads(self, share: Fraction) -> int:
        """`share` of the KV heads, as the largest number that divides theirs; at least 1."""
        most = max(math.floor(self.kv_heads * share), 1)
        return max(n for n in range(1, most + 1) if self.kv_heads % n == 0)

    def slots(self, share: Fraction) -> int:
        """`share` of the layers, rounded down; at least 1."""
        return max(math.floor(self.n_layers * share), 1)


Plan = Callable[[Shape], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of student."""

    share: Fraction
    """Of the teacher's cache, at most."""
    plan: Plan
    """`model.kv` for a teacher's shape."""
    latent: bool = False
    """Whether it caches latents, which start by svd."""
    fewer_heads: bool = False
    """Whether it has fewer KV heads than the teacher, which its starts merge."""
    saves_cache: bool = True
    """False for students that keep the entire cache or somewhat more than half; their bytes are not checked."""


def _plain(preset: str, **settings: Any) -> Plan:
    return lambda shape: {"preset": preset, **settings, "n_kv_heads": shape.kv_heads}


def _cla(share: Fraction) -> Plan:
    def plan(shape: Shape) -> dict[str, Any]:
        slots = shape.slots(share)
        factor = next(n for n in range(2, shape.n_layers + 1) if -(-shape.n_layers // n) <= slots)
        return {"preset": "cla", "factor": factor, "kv_norm": False, "n_kv_heads": shape.kv_heads}

    return plan


def _storage(preset: str, share: Fraction) -> Plan:
    return lambda shape: {"preset": preset, "n_storage": shape.slots(share), "n_kv_heads": shape.kv_heads}


def _acrosskv(share: Fraction) -> Plan:
    def plan(shape: Shape) -> dict[str, Any]:
        slots = shape.slots(share)
        groups = min(max(slots // 5, 1), max(slots - 1, 1))
        lower = max(slots - groups, 1)
        group = -(-(shape.n_layers - lower) // groups)
        return {"preset": "swiftkv", "n_lower": lower, "group": group, "n_kv_heads": shape.kv_heads}

    return plan


def _trailing(share: Fraction) -> Plan:
    return lambda shape: {
        "preset": "trailing",
        "n_shared": shape.n_layers - shape.slots(share),
        "n_kv_heads": shape.kv_heads,
    }


def _mixing(share: Fraction) -> Plan:
    return lambda shape: {"preset": "yoco_pp", "n_owners": shape.slots(share), "n_kv_heads": shape.kv_heads}


def _latent(share: Fraction, factor: int) -> Plan:
    return lambda shape: {
        "preset": "xmla",
        "factor": factor,
        "bytes": float(share * shape.kv_heads / shape.n_heads),
    }


def _heads(share: Fraction, preset: str, **settings: Any) -> Plan:
    return lambda shape: {"preset": preset, **settings, "n_kv_heads": shape.fewer_heads(share)}


KINDS: dict[str, Kind] = {
    "control": Kind(WHOLE, _plain("gqa"), saves_cache=False),
    "swiftkv": Kind(WHOLE, _plain("swiftkv"), saves_cache=False),
    "svformer": Kind(WHOLE, _plain("svformer"), saves_cache=False),
    "cla2": Kind(HALF, _cla(HALF)),
    "fusedkv": Kind(HALF, _storage("fusedkv", HALF)),
    "fusedkv_rich": Kind(HALF, _plain("fusedkv", keys="complex", values="matrix")),
    "fusedkv_lite": Kind(HALF, _storage("fusedkv_lite", HALF)),
    "acrosskv": Kind(HALF, _acrosskv(HALF)),
    "trailing": Kind(HALF, _trailing(HALF)),
    "yoco_pp": Kind(HALF, _mixing(HALF)),
    "kv_tie": Kind(HALF, _plain("kv_tie")),
    "gqa": Kind(HALF, _heads(HALF, "gqa"), fewer_heads=True),
    "mla": Kind(HALF, _latent(HALF, 1), latent=True),
    "xmla": Kind(HALF, _latent(HALF, 2), latent=True),
    "cla4": Kind(QUARTER, _cla(QUARTER)),
    "cla2_gqa": Kind(QUARTER, _heads(HALF, "cla", factor=2, kv_norm=False), fewer_heads=True),
    "fusedkv_4": Kind(QUARTER, _storage("fusedkv", QUARTER)),
    "fusedkv_gqa": Kind(QUARTER, _heads(HALF, "fusedkv"), fewer_heads=True),
    "acrosskv_4": Kind(QUARTER, _acrosskv(QUARTER)),
    "kv_tie_gqa": Kind(QUARTER, _heads(HALF, "kv_tie"), fewer_heads=True),
    "gqa_4": Kind(QUARTER, _heads(QUARTER, "gqa"), fewer_heads=True),
    "mla_4": Kind(QUARTER, _latent(QUARTER, 1), latent=True),
    "xmla_4": Kind(QUARTER, _latent(QUARTER, 2), latent=True),
    "kv_tie_8": Kind(EIGHTH, _heads(QUARTER, "kv_tie"), fewer_heads=True),
    "mla_8": Kind(EIGHTH, _latent(EIGHTH, 1), latent=True),
    "xmla4_4": Kind(QUARTER, _latent(QUARTER, 4), latent=True),
}
"""Kinds of students by name. `control` is the teacher's own plan: what the training text does without any sharing.
`acrosskv` has about a fifth of its slots in groups of upper layers. `xmla4` reads one latent in four layers."""
DEFAULT = ("control", "fusedkv", "fusedkv_rich", "cla2", "acrosskv", "kv_tie", "xmla")
"""Students of the default command, at half of the cache."""
DEFAULT_QUARTER = ("control", "cla4", "cla2_gqa", "fusedkv_4", "fusedkv_gqa", "acrosskv_4", "gqa_4", "mla_4", "xmla_4")
"""Students of `--share 1/4`."""
STARTS: dict[str, dict[str, Any]] = {
    "copy": {"method": "copy"},
    "fit": {"method": "fit"},
    "fit+outputs": {"method": "fit", "outputs": "all", "ridge": 1e-3},
    "fit+mean": {"method": "fit", "fold": "mean"},
    "fit+joint": {"method": "fit", "fold": "joint"},
    "fit+joint+outputs": {"method": "fit", "fold": "joint", "outputs": "all", "ridge": 1e-3},
    "svd": {"method": "svd"},
}
"""`init` by name. Latents start by svd, keys and values by the others."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of training, as far as they differ from the config's."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    curriculum: float = 0.0
    """`uptrain.curriculum_steps` as a share of all steps."""
    warmup: float = 0.0
    """`optim.warmup_steps` as a share of all steps, if it is more than a tenth."""
    about: str = ""


def _loss(about: str, **weights: Any) -> Recipe:
    return Recipe({"uptrain": {"loss": weights}}, about=about)


def _rates(about: str, **rates: float) -> Recipe:
    return Recipe({"optim": {"rates": rates}}, about=about)


def _curriculum(order: str, share: float) -> Recipe:
    settings = {"uptrain": {"curriculum_mix": "outputs", "curriculum_order": order}}
    return Recipe(settings, share, about=f"attention handed over {order}, in {share:g} of the steps")


RECIPES: dict[str, Recipe] = {
    "plain": _loss("next-token cross-entropy alone", kl=0.0, hidden=0.0, next_token=1.0),
    "kl": _loss("KL alone", hidden=0.0, next_token=0.0),
    "labels": _loss("next-token cross-entropy with weight 1", next_token=1.0),
    "warm": _loss("KL at temperature 2", temperature=2.0),
    "all_layers": _loss("hidden states of all layers", hidden_layers="all"),
    "attention": _loss("outputs of attention", attention=1.0),
    "attention_4": _loss("outputs of attention, with weight 4", attention=4.0),
    "attention_16": _loss("outputs of attention, with weight 16", attention=16.0),
    "attention_all": _loss("outputs of attention, hidden states of all layers", attention=1.0, hidden_layers="all"),
    "together": _curriculum("together", 0.5),
    "top": _curriculum("top", 0.5),
    "bottom": _curriculum("bottom", 0.5),
    "top_long": _curriculum("top", 0.8),
    "kv": Recipe({"uptrain": {"trainable": "kv"}}, about="queries, keys, values trained"),
    "attention_only": Recipe({"uptrain": {"trainable": "attention"}}, about="attention trained"),
    "slots": Recipe({"uptrain": {"trainable": "slots"}}, about="keys, values trained"),
    "fast_kv": _rates("rate of K/V times 3", kv=3.0),
    "fast_attention": _rates("rate of attention times 3", kv=3.0, queries=3.0, outputs=3.0),
    "faster_attention": _rates("rate of attention times 8", kv=8.0, queries=8.0, outputs=8.0),
    "slow_attention": _rates("rate of K/V and of attention's output times 0.1", kv=0.1, outputs=0.1),
    "slow_rest": _rates("rate outside of attention times 0.3", rest=0.3),
    "wsd": Recipe({"optim": {"schedule": "wsd", "decay_fraction": 0.3}}, about="constant rate, then linear decay"),
    "long_warmup": Recipe(warmup=0.3, about="warm-up in the first 0.3 of the steps"),
    "mean_heads": Recipe({"init": {"heads": "mean"}}, about="fewer KV heads as means of neighbours"),
    "half_rate": Recipe(about="half of the rate"),
    "twice_rate": Recipe(about="twice the rate"),
    "four_rate": Recipe(about="four times the rate"),
    "half_batch": Recipe(about="half of the sequences in a step"),
    "twice_batch": Recipe(about="twice the sequences in a step"),
}
"""Recipes of training by name. A student `KIND+RECIPE+...` combines them; later ones overwrite."""


@dataclass(frozen=True, slots=True)
class Student:
    """One student: a kind, recipes and a seed."""

    kind: str
    recipes: tuple[str, ...] = ()
    seed: int = 0
    """Of the order of the training text."""

    @classmethod
    def parse(cls, name: str) -> Student:
        """The student `KIND+RECIPE+...` or, with another seed than 0, `KIND+RECIPE+...-s1`.

        Raises:
            UserError: for unknown names.
        """
        seeded = re.fullmatch(r"(.*)-s(\d{1,9})", name)
        kind, *recipes = (seeded[1] if seeded else name).split("+")
        check_names([kind], KINDS, "--students")
        check_names(recipes, RECIPES, f"--students {name}: recipe")
        return cls(kind, tuple(recipes), int(seeded[2]) if seeded else 0)

    @property
    def name(self) -> str:
        """The name of its run, such as `cla4.top-s1`."""
        group = ".".join((self.kind, *self.recipes))
        return f"{group}-s{self.seed}" if self.seed else group

    def starts(self, wanted: Sequence[str]) -> list[str]:
        """Those of `wanted` that suit it: svd alone for latents, and copied weights for the control.

        Raises:
            UserError: if `wanted` is svd alone, and the student has no latents.
        """
        if self.kind == "control":
            return ["copy"]
        if KINDS[self.kind].latent:
            return ["svd"]
        if not (found := [start for start in wanted if start != "svd"]):
            allowed = ", ".join(start for start in STARTS if start != "svd")
            raise UserError(f"--starts svd: {self.kind} has no latents; allowed for it: {allowed}")
        return found


def check_names(names: Iterable[str], allowed: Iterable[str], option: str) -> None:
    """Raise `UserError` for a name that `allowed` lacks."""
    allowed = list(allowed)
    for name in names:
        if name not in allowed:
            raise UserError(f"{option} {name}: allowed: {', '.join(allowed)}")


def check_bytes(student: Student, teacher: ModelConfig, shape: Shape, path: Path) -> float:
    """The cache of a student as a share of the teacher's.

    Raises:
        UserError: if it is more than the kind's share, as with a number of layers that the share does not divide; or if
            the plan does not exist for the teacher's shape.
    """
    kind = KINDS[student.kind]
    try:
        model = ModelConfig.model_validate(student_model(teacher, kind.plan(shape), rope_pairs="uniform"))
    except ValidationError as error:
        raise UserError(
            f"--students {student.kind}: {error.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from None
    share = kv_bytes(model).resident / kv_bytes(teacher).resident
    if kind.saves_cache and share > float(kind.share) * 1.001:
        raise UserError(
            f"--students {student.kind}: caches {share:.3f} of what --teacher {path} does, with {shape.n_layers} "
            f"layers and {shape.kv_heads} KV heads; allowed: up to {kind.share}"
        )
    return share


def chosen_students(
    names: Sequence[str] | None, defaults: Sequence[str], teacher: Path, log: Callable[[str], object]
) -> list[Student]:
    """The students `names`, or those of `defaults` that the teacher's shape allows; the others are logged.

    Raises:
        UserError: for a name that is unknown or, in `names`, not possible.
    """
    model = teacher_config(teacher)
    shape, found = Shape.of(model, teacher), []
    for student in (Student.parse(name) for name in dict.fromkeys(names or defaults)):
        try:
            check_bytes(student, model, shape, teacher)
        except UserError as error:
            if names:
                raise
            log(f"left out: {error}")
        else:
            found.append(student)
    return found


def with_seeds(students: Sequence[Student], n: int) -> list[Student]:
    """Each student with its seed and the `n - 1` next ones; all students of a seed before those of the next."""
    return list(dict.fromkeys(replace(s, seed=s.seed + more) for more in range(n) for s in students))

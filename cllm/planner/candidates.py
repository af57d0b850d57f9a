"""Costs of plans at a context and a concurrency: bytes, time of a decode step, loss; and the front.

cache bytes    concurrency x `cllm.cache.accounting.cache_bytes` / the measured ratio of the compression
weight bytes   2 x parameters
read bytes     weights without the embedding's table, a row of it for each sequence, and what layers read of caches
bound          read bytes / bandwidth
step           bound x (measured seconds x bandwidth / bytes) of the nearest measured step
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cllm.cache.accounting import KVBytes, cache_bytes, kv_bytes, mha_twin
from cllm.config import ModelConfig
from cllm.config.designs import parse_preset
from cllm.errors import UserError
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.plan.presets import preset_names
from cllm.planner.gpus import GPU
from cllm.planner.keys import Size, config_key, mha_key, own_settings, plan_key, query_heads_per_kv_head
from cllm.planner.measured import Estimate, Measurements
from cllm.planner.table import DecodeStep

OWN = "config"
"""The design that a config or a checkpoint has itself, if no preset gives the same plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """The use that a design is chosen for."""

    gpu: GPU
    context: int
    """Tokens of each sequence."""
    concurrency: int
    """Sequences at once."""
    headroom: float = 0.05
    """Share of the memory left for activations and workspaces."""

    @property
    def budget(self) -> float:
        """Bytes for weights and caches."""
        return self.gpu.memory * (1 - self.headroom)

    @property
    def text(self) -> str:
        """`16 sequences of 32,768 tokens`."""
        return f"{self.concurrency:,} sequence{'s' * (self.concurrency > 1)} of {self.context:,} tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan, its KV heads and a compression, with costs. Bytes and seconds are of all sequences together."""

    design: str
    """`NAME[:KEY=VALUE,...]`, as `--designs` takes it."""
    sharing: str
    """Which layers share: the design without its KV heads, by the first of its names."""
    n_kv_heads: int | None
    """KV heads of every owner; None: latents, or different numbers."""
    spec: str | None
    """The compression, as `--posthoc` takes it; None: none."""
    parameters: int
    weight_bytes: int
    cache_bytes: int
    cache_vs_mha: float
    """Bytes of the cache relative to mha's without compression."""
    read_bytes: float
    """Bytes that a decode step reads."""
    bound_s: float
    """Seconds to read them at the data sheet's bandwidth."""
    step_s: float | None
    """Predicted seconds of a step; None: no measured step, as of every compression."""
    factor_from: DecodeStep | None
    factor_is_of_this_plan: bool
    """Whether the factor was measured on this GPU with this plan."""
    fits: bool
    most_sequences: int
    """Largest concurrency that fits the budget."""
    design_loss: Estimate | None
    """Change of the loss against mha; None: not measured."""
    spec_loss: Estimate | None
    """Change of the loss by the compression, measured on this design; None: no compression."""
    is_reference: bool
    """Whether losses are changes against this design, uncompressed."""
    front: bool = False
    key: str | None = None
    """The plan's key in tables of measurements; None: it has none."""

    @property
    def loss_change(self) -> float | None:
        """Nats a token against the reference without compression; None: not measured."""
        if not self.is_reference and self.design_loss is None:
            return None
        return sum(part.value for part in (self.design_loss, self.spec_loss) if part is not None)

    @property
    def loss_range(self) -> tuple[float, float] | None:
        """The range of `loss_change`; None if a part of it was measured once, without seeds."""
        parts = [part for part in (self.design_loss, self.spec_loss) if part is not None]
        if self.loss_change is None or any(part.low is None or part.high is None for part in parts):
            return None
        return sum(p.low for p in parts if p.low is not None), sum(p.high for p in parts if p.high is not None)

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes

    @property
    def name(self) -> str:
        return self.design if self.spec is None else f"{self.design} + {self.spec}"


# ---- designs ---------------------------------------------------------------------------------------------------------


def with_kv(model: ModelConfig, kv: dict[str, Any], label: str) -> ModelConfig:
    """`model` with another plan. Raises `UserError`, beginning with `label`, for settings that do not fit it."""
    try:
        return ModelConfig.model_validate({**model.model_dump(mode="json", exclude={"kv"}), "kv": kv})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][2:])
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{label}: {key + ': ' if key else ''}{reason}") from None


def default_heads(n_heads: int) -> list[int]:
    """`n_heads`, and its divisors by powers of two, down to an odd number, and 1."""
    found = [n_heads]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found if found[-1] == 1 else [*found, 1]


def designs(
    model: ModelConfig, *, words: Sequence[str] = (), heads: Sequence[int] = (), own: bool = True
) -> dict[str, ModelConfig]:
    """Models with the same shape by design, each plan once.

    Args:
        model: the shape, and with `own` a further design.
        words: designs; empty: every preset with its default settings. One of these that does not fit is left out.
        heads: KV heads to try with each; empty: those of `default_heads`.

    Raises:
        UserError: for a design of `words` that does not fit the shape, and for `heads` that do not divide
            the query heads.
    """
    if wrong := [n for n in heads if model.n_heads % n]:
        raise UserError(f"--kv-heads is {wrong[0]}; allowed: divisors of model.n_heads {model.n_heads}")
    tried = list(_words(model, words, heads))
    if own:
        tried.append((OWN, model))
    found: dict[str, ModelConfig] = {}
    plans = set()
    for word, config in tried:
        plan = (repr(config.plan()), config.q_bias)
        if plan not in plans:
            plans.add(plan)
            found[word] = config
    return found


def _words(model: ModelConfig, words: Sequence[str], heads: Sequence[int]) -> Iterator[tuple[str, ModelConfig]]:
    counts = heads or default_heads(model.n_heads)
    settings = {word: parse_preset(word) for word in words} or {name: {"preset": name} for name in preset_names()}
    later = []
    for word, kv in settings.items():
        try:
            config = with_kv(model, kv, f"--designs {word}")
        except UserError:
            if words:
                raise
            continue
        own = _kv_heads(config)
        if not heads or own is None or own in heads or "n_kv_heads" in kv:
            yield word, config
        if own is not None and "n_kv_heads" not in kv:
            later += [(word, kv, n) for n in counts if n != own]
    for word, kv, n in later:
        full = f"{word}{',' if ':' in word else ':'}n_kv_heads={n}"
        try:
            config = with_kv(model, {**kv, "n_kv_heads": n}, full)
        except UserError:  # a preset with one number of KV heads, such as mqa
            continue
        if _kv_heads(config) == n:
            yield full, config


def _kv_heads(config: ModelConfig) -> int | None:
    ratio = query_heads_per_kv_head(config)
    return None if ratio is None else config.n_heads // ratio


# ---- costs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Design:
    """A design without a compression, and the sizes that all its candidates share, in bytes of 16-bit numbers."""

    word: str
    sharing: str
    config: ModelConfig
    key: str | None
    parameters: int
    pass_bytes: int
    """Weights that a decode step reads."""
    kv: KVBytes
    """Of one sequence, uncompressed."""
    cache: int
    """Bytes of one sequence, uncompressed."""
    mha_cache: int
    is_reference: bool
    loss: Estimate | None

    @classmethod
    def of(
        cls,
        word: str,
        config: ModelConfig,
        request: Request,
        *,
        sharing: str,
        key: str | None,
        is_reference: bool,
        loss: Estimate | None,
    ) -> _Design:
        model, context = meta_decoder(config), request.context
        n_parameters = count_parameters(model)
        table = 0 if model.embed.weight is model.head.weight else model.embed.weight.numel()
        return cls(
            word=word,
            config=config,
            parameters=n_parameters,
            pass_bytes=2 * (n_parameters - table + request.concurrency * config.d_model),
            kv=kv_bytes(config, context=context),
            cache=cache_bytes(config, context=context),
            mha_cache=cache_bytes(mha_twin(config), context=context),
            sharing=sharing,
            key=key,
            is_reference=is_reference,
            loss=loss,
        )

    def candidate(
        self, request: Request, measured: Measurements, spec: str | None, change: Estimate | None
    ) -> Candidate | None:
        """The design with a compression; None if the compression's bytes were not measured."""
        ratio = 1.0 if change is None else change.measurements[0].ratio
        if ratio is None:
            return None
        each = round(self.cache / ratio)
        read = self.pass_bytes + self.kv.read * request.context * request.concurrency / ratio
        bound, room = read / request.gpu.bandwidth, request.budget - 2 * self.parameters
        # A compressed cache is also rebuilt when it is read, which no measured step covers.
        factor = None if spec is not None else measured.decode_factor(self.key, request.gpu.reported, bound)
        return Candidate(
            design=self.word,
            sharing=self.sharing,
            n_kv_heads=_kv_heads(self.config),
            spec=spec,
            parameters=self.parameters,
            weight_bytes=2 * self.parameters,
            cache_bytes=each * request.concurrency,
            cache_vs_mha=each / self.mha_cache,
            read_bytes=read,
            bound_s=bound,
            step_s=None if factor is None else bound * factor[0],
            factor_from=None if factor is None else factor[1],
            factor_is_of_this_plan=factor is not None and factor[2],
            fits=each * request.concurrency <= room,
            most_sequences=max(0, int(room // each)) if each else 0,
            design_loss=self.loss,
            spec_loss=change,
            is_reference=self.is_reference,
            key=self.key,
        )


def candidates(
    found: Mapping[str, ModelConfig],
    request: Request,
    measured: Measurements,
    *,
    specs: set[str] | None = None,
    reference: ModelConfig | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Iterator[Candidate]:
    """Each design without compression, and with each compression that was measured on it.

    Args:
        found: designs, as `designs` returns them. `vocab_size` must be set.
        request: the GPU and its use.
        measured: losses and decode steps.
        specs: the compressions to try; None: all with a measurement.
        reference: the model that changes of the loss are against, such as a checkpoint; None: mha. The measured changes
            of designs are against mha, so they are used with that reference only.
        progress: wraps the iteration over designs, for a progress bar.
    """
    mha = mha_key()
    base = mha if reference is None else config_key(reference)
    sharing = _sharing_names(found)
    for word, config in progress(found.items()):
        key = config_key(config)
        is_reference = config is reference or (key is not None and key == base)
        design = _Design.of(
            word,
            config,
            request,
            key=key,
            sharing=sharing[_sharing_key(config)],
            is_reference=is_reference,
            loss=measured.design(key) if base == mha and not is_reference else None,
        )
        changes = measured.compressions(key)
        chosen = [spec for spec in changes if specs is None or spec in specs]
        made = [design.candidate(request, measured, spec, changes[spec]) for spec in chosen]
        made.insert(0, design.candidate(request, measured, None, None))
        yield from (candidate for candidate in made if candidate is not None)


def _sharing_names(found: Mapping[str, ModelConfig]) -> dict[str | None, str]:
    """Names of plans without their KV heads, by `_sharing_key`: those of the designs with the most KV heads."""
    ordered = sorted(found.items(), key=lambda pair: -(_kv_heads(pair[1]) or 0))
    return {_sharing_key(config): _without_heads(word) for word, config in reversed(ordered)}


def _without_heads(word: str) -> str:
    name, _, text = word.partition(":")
    rest = ",".join(option for option in text.split(",") if option and not option.startswith("n_kv_heads="))
    return f"{name}:{rest}" if rest else name


def _sharing_key(config: ModelConfig) -> str | None:
    """A text that is equal for plans which differ in KV heads only."""
    heads = None if query_heads_per_kv_head(config) is None else 1
    return plan_key(own_settings(config), heads, Size.of(config))


def mark_front(found: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, those on the front marked, least cache first.

    A candidate that fits and has a measured loss is on the front if no other one has at most its cache and at most its
    loss, and less of one of them.
    """
    points = [(c.cache_bytes, c.loss_change) for c in found if c.fits and c.loss_change is not None]

    def beaten(n_bytes: int, loss: float) -> bool:
        return any(b <= n_bytes and x <= loss and (b, x) != (n_bytes, loss) for b, x in points)

    marked = [
        dataclasses.replace(c, front=c.fits and c.loss_change is not None and not beaten(c.cache_bytes, c.loss_change))
        for c in found
    ]
    return sorted(marked, key=lambda c: (c.cache_bytes, c.bound_s, c.name))

"""Settings of uptraining: `init:`, the model to start from, and `uptrain:`, how the student is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from cllm.config.training import Rates
from cllm.section import MAX_COUNT, MAX_WIDTH, Section, create_section

Method = Literal["copy", "mean", "aligned", "ridge", "fit", "svd"]
Align = Literal["none", "heads", "turn", "map"]
Fold = Literal["none", "mean", "joint"]
Heads = Literal["mean", "merge"]
Outputs = Literal["none", "shared", "all"]
KeepPairs = Literal["high", "uniform"]

TRAINED: dict[str, frozenset[str]] = {
    "slots": frozenset({"kv", "fusion"}),
    "kv": frozenset({"kv", "queries", "fusion"}),
    "attention": frozenset({"kv", "queries", "outputs", "fusion"}),
    "lora": frozenset({"fusion"}),
}
"""Parts of the model (`cllm.model.parts`) that are trained, by `uptrain.trainable`; `all` leaves out nothing. `lora`
also trains updates of the linear layers, which have the rates of their layers."""

if TYPE_CHECKING:
    _From = Section
else:  # `from` is a keyword of Python and cannot be the name of a field in a class
    _FROM = "A run folder, one of its checkpoints, or a Hugging Face folder to start from; null: random weights."
    _From = create_section("_From", Section, {"from": (str | None, Field(None, description=_FROM))})


class InitFrom(_From):
    """The source of the initial weights."""

    method: Method = "copy"
    """Initial K/V weights if the plan differs from that of the model in `from`, the teacher. copy: the projections of
    the owner's layer; mean: the mean over all layers that read the owner; aligned: the mean after matching their KV
    heads. On calibration text: ridge, regression of the shared projections; fit, least squares for fusion weights and
    for the queries and outputs of layers that share; svd, for latents (docs/uptraining.md)."""
    align: Align = "map"
    """With aligned, ridge and fit: how layers without own K/V are adapted to the K/V that they read. none: not at all;
    heads: KV heads are matched; turn: channels are rotated too; map: with ridge and fit, channels are also scaled and
    mixed."""
    heads: Heads = "mean"
    """If the student has fewer KV heads. mean: the mean of neighbours; merge: clusters of similar heads, each in common
    coordinates and replaced by its principal directions on the calibration text."""
    fold: Fold = "none"
    """With fit: values that several layers share, brought into common coordinates first. none: those of the owner's
    layer; mean: the mean over all layers that share them (VFOLD); joint: their principal directions."""
    outputs: Outputs = "none"
    """With fit: output projections of attention refitted to the teacher's residual stream, from the lowest layer up.
    shared: in layers that read other keys or values than the teacher's, merged heads included; all: in those and all
    layers above the lowest of them."""
    calibration_sequences: int = Field(32, ge=0, le=MAX_COUNT)
    """With ridge, fit and svd: number of training sequences, of data.seq_len tokens each, to calibrate on. 0: svd uses
    the weights alone."""
    sources: Literal["plan", "best"] = "plan"
    """With fit: the layers that a fusing layer reads. plan: those of the plan; best: as many, chosen on the calibration
    text for the least squared error and written to the run's config.yaml."""
    ridge: float = Field(1e-4, ge=0)
    """With ridge, fit, and svd for latents that several layers read: penalty on the distance from the starting weights,
    relative to the mean square of the inputs."""
    rope_pairs: KeepPairs = "high"
    """With svd: the channel pairs that keep RoPE. high: those of highest frequency; uniform: evenly spaced ones."""

    @property
    def path(self) -> str | None:
        """`from`."""
        return getattr(self, "from")

    @property
    def reads_text(self) -> bool:
        """Whether a calibration text is used."""
        return self.method in ("ridge", "fit", "svd") or self.heads == "merge"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.method in ("ridge", "fit") and not self.calibration_sequences:
            raise ValueError(f"method is {self.method}, but calibration_sequences is 0; allowed with it: 1 or more")
        if self.heads == "merge" and not self.calibration_sequences:
            raise ValueError("heads is merge, but calibration_sequences is 0; allowed with it: 1 or more")
        for key in ("fold", "outputs"):
            if getattr(self, key) != "none" and self.method != "fit":
                raise ValueError(f"{key} is {getattr(self, key)}, but method is {self.method}; allowed with it: fit")
        if self.sources == "best" and self.method != "fit":
            raise ValueError(
                f"sources is best, but method is {self.method}, which fits no sources; allowed with it: fit"
            )
        return self


class Losses(Section):
    """The objective: a weighted sum of four losses, each a mean over scored tokens."""

    kl: float = Field(0.0, ge=0)
    """Weight of temperature² KL(teacher || student), with logits divided by `temperature`."""
    temperature: float = Field(2.0, gt=0)
    """Temperature of the KL loss."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the squared difference of hidden states from the teacher's, relative to their mean square."""
    hidden_layers: Literal["last", "all"] = "last"
    """Hidden states to compare. last: the input of the output head; all: the output of every layer too."""
    attention: float = Field(0.0, ge=0)
    """Weight of the squared difference of the outputs of attention from the teacher's, relative to their mean square,
    over all layers. In this loss each layer's attention reads the teacher's residual stream."""
    next_token: float = Field(1.0, ge=0)
    """Weight of the next-token cross-entropy."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.kl == self.hidden == self.attention == self.next_token == 0:
            raise ValueError("kl, hidden, attention and next_token are all 0; at least one must be more")
        return self


class Lora(Section):
    """Low-rank updates (arXiv 2106.09685) of the blocks' linear layers: W + alpha / rank B A."""

    rank: int = Field(16, ge=1, le=MAX_WIDTH)
    """Rank of the low-rank updates."""
    alpha: float = Field(32.0, gt=0)
    """The update is scaled by alpha / rank."""


class Uptrain(Section):
    """Training of the student, the model that starts from another."""

    loss: Losses = Field(default_factory=Losses)
    """The objective; a weight on kl, hidden or attention keeps the teacher in memory."""
    trainable: Literal["all", "attention", "kv", "slots", "lora"] = "all"
    """Weights to train. all: all weights; kv: query, key and value projections, their norms, and fusion weights;
    attention: those and output projections; slots: those without queries; lora: low-rank updates of the blocks' linear
    layers, and fusion weights."""
    lora: Lora = Field(default_factory=Lora)
    """Low-rank updates, with `trainable: lora`."""
    curriculum_steps: int = Field(0, ge=0, le=MAX_COUNT)
    """Steps in which layers without own K/V change gradually from the teacher's K/V to those that they read; 0: they
    read them from the first step."""
    curriculum_mix: Literal["slots", "outputs"] = "slots"
    """Tensors that change from the teacher's to the student's. slots: keys and values; outputs: outputs of attention,
    in every layer whose plan is not the teacher's. outputs suits all plans and methods."""
    curriculum_order: Literal["together", "top", "bottom"] = "together"
    """Order in which layers change. together: all over all steps; top, bottom: one after the other, from that end."""
    random_sources: float = Field(0.0, ge=0, lt=1)
    """Probability, in each step, that a layer reads the K/V of a lower layer instead of its own. Needs a plan in which
    every layer owns K/V."""
    random_sources_from: Literal["owners", "all"] = "owners"
    """Lower layers that `random_sources` may choose, all with the same probability. owners: those that read their own
    K/V in that step; all: every lower layer, as in R-CLA (arXiv 2604.22782)."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher computes in every step."""
        return self.loss.kl > 0 or self.loss.hidden > 0 or self.loss.attention > 0

    def check(self, init: InitFrom, rates: Rates, *, steps: int, fp8: str | None) -> None:
        """Raises `ValueError` for settings that contradict each other or the rest of the config."""
        if init.path is None and self != Uptrain():
            raise ValueError("uptrain: is set, but init.from is null; it names the model to start from")
        if init.path is None and init != InitFrom():
            key = next(key for key, value in InitFrom() if getattr(init, key) != value)
            raise ValueError(
                f"init.{key} is {getattr(init, key)!r}, but init.from is null, so that weights would be drawn; name "
                f"the model to start from, or leave init.{key} out"
            )
        if self.curriculum_steps > steps:
            raise ValueError(
                f"uptrain.curriculum_steps is {self.curriculum_steps}, but train.steps is {steps}, so that training "
                f"would end before the student reads what the plan says; allowed: up to {steps}"
            )
        for key in ("curriculum_mix", "curriculum_order"):
            if not self.curriculum_steps and (value := getattr(self, key)) != Uptrain.model_fields[key].default:
                raise ValueError(
                    f"uptrain.{key} is {value}, but uptrain.curriculum_steps is 0; allowed with it: 1 or more"
                )
        mixes_slots = self.curriculum_steps and self.curriculum_mix == "slots"
        if mixes_slots and init.heads == "merge":
            raise ValueError(
                f"uptrain.curriculum_steps is {self.curriculum_steps}, but init.heads is merge, which own keys and "
                "values cannot follow; allowed with it: mean, or curriculum_mix outputs"
            )
        if mixes_slots and init.method in ("ridge", "fit") and init.align == "map":
            raise ValueError(
                f"uptrain.curriculum_steps is {self.curriculum_steps}, but init.align is map, which own keys and "
                "values cannot follow; allowed with it: none, heads, turn, or curriculum_mix outputs"
            )
        if self.curriculum_steps and self.curriculum_mix == "outputs" and self.loss.attention:
            raise ValueError(
                "uptrain.curriculum_mix is outputs and uptrain.loss.attention is set; a layer's output cannot be mixed "
                "with the teacher's and compared with it; allowed: one of the two"
            )
        if self.curriculum_steps and self.random_sources:
            raise ValueError("uptrain: curriculum_steps and random_sources are both set; allowed: one of them")
        if self.random_sources_from != "owners" and not self.random_sources:
            raise ValueError(
                f"uptrain.random_sources_from is {self.random_sources_from}, but uptrain.random_sources is 0, so that "
                "no layer reads another; allowed with it: above 0 and below 1"
            )
        trained = TRAINED.get(self.trainable) if self.trainable != "lora" else None
        for part, multiple in rates:
            if multiple != 1 and trained is not None and part not in trained:
                allowed = ", ".join(name for name in Rates.model_fields if name in trained)
                raise ValueError(
                    f"optim.rates.{part} is {multiple:g}, but uptrain.trainable is {self.trainable}, which freezes "
                    f"this part; allowed with it: rates of {allowed}"
                )
        if fp8 and self.trainable == "lora":
            raise ValueError(
                f"train.fp8 is {fp8}, but uptrain.trainable is lora; allowed with fp8: all, attention, kv, slots"
            )

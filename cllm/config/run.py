"""One training run: `Config`, the root of everything a YAML file may say."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from cllm.config.model import ModelConfig
from cllm.config.training import AttentionConfig, DataConfig, OptimConfig, TrainConfig
from cllm.config.uptraining import InitFrom, Uptrain
from cllm.section import Section


class Config(Section):
    """One training run."""

    name: str = Field("run", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Where run folders go."""
    init: InitFrom = Field(default_factory=InitFrom)
    """Another model's weights to start from."""
    uptrain: Uptrain = Field(default_factory=Uptrain)
    """How a model that starts from another learns from it."""
    model: ModelConfig
    """The decoder; with `init.from`, what is left out is that model's."""
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    """The attention kernel."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Training and validation data."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """How to optimise."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How long, how wide, how often."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self.uptrain.check(self.init, steps=self.train.steps, fp8=self.train.fp8)
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.data.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}")
        return self

    def as_yaml_data(self) -> dict[str, Any]:
        """Plain data that loads back to an equal config: what `config.yaml` of a run holds."""
        return self.model_dump(mode="json")

"""`Config`: all settings of one training run, the root of a YAML file."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from cllm.config.model import ModelConfig
from cllm.config.suites import SuiteSchedule, check_suites
from cllm.config.training import AttentionConfig, DataConfig, OptimConfig, TrainConfig
from cllm.config.uptraining import InitFrom, Uptrain
from cllm.section import Section


class Config(Section):
    """One training run."""

    name: str = Field("run", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is runs_dir/name."""
    runs_dir: str = "runs"
    """Folder in which run folders are created."""
    init: InitFrom = Field(default_factory=InitFrom)
    """Another model's weights to start from."""
    uptrain: Uptrain = Field(default_factory=Uptrain)
    """Training of a model that starts from another one."""
    model: ModelConfig
    """The decoder; with `init.from`, keys that are left out are taken from that model."""
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    """The attention kernel."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Training and validation data."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """The optimizer and its learning rate."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """Steps, batches, precision, devices and checkpoints."""
    evaluate_suites: list[SuiteSchedule] = Field(default_factory=list)
    """Suites of samples to measure during training."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        self.uptrain.check(self.init, self.optim.rates, steps=self.train.steps, fp8=self.train.fp8)
        check_suites(self.evaluate_suites, self.train.strategy)
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len {self.data.seq_len} exceeds model.max_seq_len {self.model.max_seq_len}")
        return self

    def as_yaml_data(self) -> dict[str, Any]:
        """The content of a run's `config.yaml`: plain data that loads to an equal config."""
        return self.model_dump(mode="json")

"""The schema of a YAML file: types, defaults, ranges, rules between fields, and the meaning of each.

The tree is `Config` = name, init, uptrain, model, attention, data, optim, train, evaluate_suites. A docstring under a
field is its `--help`. Rules between fields are validators, so that a model can be built from every config that loads.
Only `load.py` and `shipped.py` read files, the YAML files. Rules that need other files (a tokenizer's size, a
checkpoint) are checked where those are read.

run.py         `Config`: one training run
model.py       `ModelConfig`: the decoder
training.py    attention kernel, data, optimizer, steps
suites.py      `evaluate_suites:`: suites of samples that are measured during training
uptraining.py  `init:` and `uptrain:`: starting from another model's weights
unused.py      settings without effect
load.py        reads YAML files and a command line into one checked config
mistakes.py    a mistake in a config as one line
help.py        the settings as text, for `--help`
nested.py      settings with dotted keys as nested mappings
shipped.py     the configs, recipes and notebooks that come with cllm, by name
designs.py     KV plans as words on a command line

Imports the plan and the section base; never torch.
"""

from cllm.config.model import Init, ModelConfig, Rope, RopeScaling
from cllm.config.run import Config
from cllm.config.training import AttentionConfig, BackendName, DataConfig, OptimConfig, TrainConfig
from cllm.config.uptraining import InitFrom, Uptrain

__all__ = [
    "AttentionConfig",
    "BackendName",
    "Config",
    "DataConfig",
    "Init",
    "InitFrom",
    "ModelConfig",
    "OptimConfig",
    "Rope",
    "RopeScaling",
    "TrainConfig",
    "Uptrain",
]

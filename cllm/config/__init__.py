"""Everything a YAML file may say: types, defaults, ranges, rules between fields, and the meaning of each.

The tree is `Config` = name, init, uptrain, model, attention, data, optim, train. A docstring under a field is its
`--help`. Rules that need a second field are validators, so that a config that loads is a config that can be built.
Nothing here reads the disk, except `load.py` and `shipped.py` the YAML files themselves; rules that need it (a
tokenizer's size, a checkpoint) are checked where the disk is read.

run.py         `Config`: one training run
model.py       `ModelConfig`: the decoder
training.py    attention kernel, data, optimizer, steps
uptraining.py  `init:` and `uptrain:`: starting from another model's weights
load.py        YAML files and a command line to one checked config, mistakes as one line
shipped.py     the configs and recipes that come with cllm, by name
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

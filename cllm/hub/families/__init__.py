"""Checkpoints of other families as weights of this decoder, and back.

A family is a `model_type` of Hugging Face's config.json. `read_family` reads the config of a folder, `load_family` also
its weights, and `export_family` writes a decoder as a checkpoint of a family. Features that the decoder cannot compute
exactly are refused by name. Only the config classes of transformers are used.

table.py    the families, and the names of their tensors for a decoder's config
read.py     config.json to a `ModelConfig`
load.py     weight files to the decoder's state dict
refused.py  what stands in the way in families that the decoder cannot compute
memory.py   a transformers model in memory to a decoder with the same tensors
write.py    a decoder to config.json and weight files

Imports the config, the plan and the model.
"""

from cllm.hub.families.load import load_family, load_weights
from cllm.hub.families.memory import decoder_of
from cllm.hub.families.read import FamilyCheckpoint, read_family
from cllm.hub.families.table import FAMILIES
from cllm.hub.families.write import export_family

__all__ = ["FAMILIES", "FamilyCheckpoint", "decoder_of", "export_family", "load_family", "load_weights", "read_family"]

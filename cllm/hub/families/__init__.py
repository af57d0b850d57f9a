"""Checkpoints of other families as weights of this decoder, and back.

A family is what a Hugging Face `config.json` calls `model_type`. `read_family` says what a folder holds, `load_family`
reads its weights, `export_family` writes a decoder as a checkpoint of a family. What the decoder cannot compute
exactly is refused by name. Of transformers only the config classes are used.

    table.py   the families, and the names of their tensors for a decoder's config
    read.py    config.json to a `ModelConfig`
    load.py    weight files to the decoder's state dict
    write.py   a decoder to config.json and weight files
"""

from cllm.hub.families.load import load_family, load_weights
from cllm.hub.families.read import Import, read_family
from cllm.hub.families.table import FAMILIES
from cllm.hub.families.write import export_family

__all__ = ["FAMILIES", "Import", "export_family", "load_family", "load_weights", "read_family"]

"""Every published plan that has a name, as a function of the model's shape.

A preset is one class: its fields are what YAML may say under `model.kv`, its `expand` writes the plan. Adding one means
a class in one of these files, and a file in `configs/kv/`. No other module knows a preset by name.

base.py     `Preset`, the registry, helpers
owning.py   every layer owns: mha, gqa, mqa
latent.py   low-rank latents: mla, mlra, xmla
sharing.py  layers share a slot as it is: cla, yoco, yoco_u, trailing, afm
fusing.py   fusedkv, fusedkv_lite and its ablations
joining.py  layers read several slots at once: ced, hysparse
study.py    pizza, sandwich, lasagna, lckv
writing.py  owners write other slots than two projections of their own input: swiftkv, svformer, kv_tie, yoco_pp,
            resformer

Imports the rest of the plan package.
"""

from cllm.plan.presets import fusing, joining, latent, owning, sharing, study, writing
from cllm.plan.presets.base import PRESETS, Preset, preset_names, register_preset
from cllm.plan.presets.owning import MHA

__all__ = [
    "MHA",
    "PRESETS",
    "Preset",
    "fusing",
    "joining",
    "latent",
    "owning",
    "preset_names",
    "register_preset",
    "sharing",
    "study",
    "writing",
]

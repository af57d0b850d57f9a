"""The KV plan as plain data: which layer owns keys and values, and which slots each layer reads.

kinds.py     kinds of sources and reads: `Own`, `Retention`; `Share`; each answers for itself
latent.py    `Latent`, a source whose slot is one low-rank latent
fuse.py      `Fuse`, a read that sums several slots with learned weights
forms.py     forms of `own` that store something else than two projections: one half, one projection for both, sums
joins.py     reads of several slots at once: one softmax over them, or a gated sum
loops.py     layers that are computed several times with the same weights
numbers.py   layer numbers as text
registry.py  the kinds that YAML knows, and the functions that build their modules
plan.py      `KVPlan`: one entry per layer, the questions it answers, every refusal
prompt.py    the tokens of a prompt that each layer has to compute
presets/     published plans by name: `model.kv.preset`
explicit.py  a plan spelled out layer by layer: `model.kv.layers`
schema.py    everything `model.kv` may say, plug-ins included
slot_shapes.py  refusals of slots of different shapes where a layer needs slots of one shape
shape.py     settings that presets and explicit plans share
describe.py  a plan as a table and a drawing in characters
picture.py   a plan as a figure

Imports the base modules and the section base; never torch.
"""

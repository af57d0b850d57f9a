"""The KV plan as plain data: which layer owns keys and values, and which slots each layer reads.

plan.py      owners, reads, `KVPlan`, and every refusal
explicit.py  `model.kv.layers`: the plan spelled out
presets.py   `model.kv.preset`: published plans by name
shape.py     what presets and explicit plans share
describe.py  a plan as a table, a drawing and a figure

Imports errors and the section base; never torch.
"""

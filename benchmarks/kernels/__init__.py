"""Pieces of a training or decoding step on one GPU, against alternatives and bounds. `python -m benchmarks.kernels`.

__main__.py  the command line
table.py     rows, printed and written as they come; random tensors, forward and backward as one call
training.py  attention, fusion, MLP, loss and norm, forward and backward
joint.py     joint attention forward and backward, and the merge of its parts
decoding.py  attention of one new token over cached slots
checked.py   decoding calls whose results are compared with plain torch before they are timed
tied.py      variants of the kernel over tied slots
latent.py    the kernel over a latent slot, with many tiles

Imports benchmarks.record, benchmarks.timing and cllm.
"""

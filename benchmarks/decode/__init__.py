"""Decoding on one GPU: steps, time to first token, capacity, other libraries. `python -m benchmarks.decode --help`.

__main__.py    the command line
designs.py     designs and points of context x batch, as given on the command line
benchmark.py   the measurements in their order, one row each
results.py     rows of a benchmark under way: failures, the time limit, the file
measure.py     one design at one point: step, time to first token, bytes, a check of its logits
capacity.py    the longest context and the largest batch in a memory budget
peers.py       Hugging Face's Llama of the same shape
generating.py  tokens by `generate` of transformers
merge.py       several result files as one
report.py      tables and plots

Imports benchmarks.record, benchmarks.timing and cllm.
"""

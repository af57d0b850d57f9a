"""Training steps on random tokens, of designs and other trainers in turns. `python -m benchmarks.train --help`.

__main__.py   the command line, and the turns
contender.py  a model with its optimizer and times; moved to the CPU while another one is measured
designs.py    contenders of this project: a config, packed documents, random batches
peers.py      other trainers: Hugging Face's Llama with Liger's kernels, and litgpt
measure.py    warm-up, timed steps and kernel profile of one contender
one_by_one.py  many designs, one at a time beside the first one
report.py     rows and their table

Imports benchmarks.record, benchmarks.timing and cllm.
"""

"""Choose a design for a GPU: cache bytes, decode time and measured loss of plans, KV heads and compression.

gpus.py        memory and bandwidth of GPUs, with sources, and options such as `80GB` and `3.35TB/s`
keys.py        a key by which a measured plan is recognised at another size
table.py       tables of measured changes of the loss and measured decode steps
conditions.py  the training tokens, windows and size of models whose losses a table compares
measured.py    look-ups of measurements by design, with ranges
collect.py     results of studies, sweeps and decode benchmarks as such tables
candidates.py  what a plan costs at a context and a concurrency, and the front
report.py      candidates as text, CSV and JSON, with notes on what is extrapolated
picture.py     candidates as pictures
measured.json  the shipped table; scripts/planner_tables.py writes it from docs/results/

Imports the packages below `cllm.study`, and neither `cllm.study` nor `cllm.commands`.
"""

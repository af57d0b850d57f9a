"""Experiments of several runs each, which continue after an interruption if the same command is given again.

sweep_posthoc.py    compress the caches of runs in many ways: one table, one figure (`cllm sweep`)
tradeoff.py         train designs, then sweep over them (`cllm tradeoff`)
half_cache/         convert a pretrained model to plans with half of its cache, and distil it into them
methods_picture.py  draw what compressions of one model cost, from tables of measurements
random_sources.py   train with and without random sources (R-CLA), and measure at shares of the cache
uptraining/         pretrain a Llama, convert it to plans that share keys and values, uptrain those

Run them in the project's root: `python -m experiments.NAME --help`.

Imports benchmarks.timing, benchmarks.record and cllm; they do not import it.
"""

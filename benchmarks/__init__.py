"""Benchmarks that run for minutes and write their numbers as JSON; docs/benchmarks.md has the results.

train/               training steps of designs and other trainers
small_steps.py       small training steps with and without CUDA graphs, against the time of their kernels
decode/              decoding steps, times to first token, capacity
kernels/             pieces of a step against alternatives and bounds
scaling/             one node's GPUs: strategies and numbers of devices
posthoc_decode.py    decoding on a compressed cache, and the compression
posthoc_options.py   sizes, device and printed rows of the benchmarks over compressed caches
posthoc_variants.py  variants of both, each timed, in less than six minutes; its parts:
    posthoc_compression.py  the compression, of several models and by several methods
    variants.py             timed variants of a setting, of which the fastest is kept
posthoc_methods.py   every method of compression: compressing a cache, and decoding from it
prefix.py            time to the first token, computed and from a stored prefix
serve.py             requests to vLLM's server or transformers' scheduler: throughput, and tokens in a cache that binds
serve_load.py        models, requests and the table of serve.py
serve_batching.py    transformers' continuous batching for serve.py
serve_parity.py      greedy text of a checkpoint in vLLM and in transformers
cuts.py              computed, not measured: bytes across pipeline cuts, memory and traffic on many GPUs
timing.py            times, memory and peak rates of a device
record.py            results, written to disk while a benchmark runs

Run them in the project's root: `python -m benchmarks.NAME --help`.

Imports cllm; cllm does not import it.
"""

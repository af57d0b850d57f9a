"""Benchmarks that run for minutes and write their numbers as JSON; docs/benchmarks.md has the results.

scaling.py   one node's GPUs: strategies and numbers of devices, what communication costs
node.yaml    the cases that scaling.py runs for a node
cases.py     cases: what a line of that file means
kernels.py   kernel times of one process's steps: communication, what of it hides behind other kernels
cuts.py      by arithmetic alone: bytes that pipeline cuts carry, memory and traffic on many GPUs
worker.py    the process that a case starts: train.py with the profile of kernels.py at its end
"""

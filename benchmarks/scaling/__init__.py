"""Strategies and numbers of devices on one node's GPUs, and the cost of communication. `python -m benchmarks.scaling`.

__main__.py  the command line: runs side by side as GPUs allow
node.yaml    the cases for one node of GPUs
cases.py     groups of runs, and the config of each run
launch.py    starting a run's processes and ending them
worker.py    the process of a run: train.py with the profile of its last steps
profile.py   kernel times of a process's last steps: communication, and the part hidden behind other kernels
table.py     rows and their tables

Imports benchmarks.record and cllm.
"""

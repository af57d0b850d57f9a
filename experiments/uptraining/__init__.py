"""Students of a pretrained Llama, in plans that share keys and values. `python -m experiments.uptraining --help`.

__main__.py    the command line
experiment.py  the steps in their order, until time is up
setup.py       sizes, plans, and the agenda of measurements
base.py        tokens, pretraining of the base model, and the check of its import
students.py    configs of students, their losses before training, and their training by train.py
steptime.py    times of a distilled and of a plain step
report.py      rows and tables

Imports benchmarks.record, benchmarks.timing and cllm.
"""

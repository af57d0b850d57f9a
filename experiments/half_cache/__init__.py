"""Students of a pretrained model at half of its cache: starts, and distillation.

Run `python -m experiments.half_cache --help`.

__main__.py  the command line, and a worker for each device
students.py  plans, starts, and configs of students
starts.py    a student's perplexity before training, for every start: a process for each student

Imports experiments.uptraining and cllm.
"""

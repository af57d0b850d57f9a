"""Students of a model at half or a quarter of its cache: starts, and distillation.

Run `python -m experiments.half_cache --help` for a pretrained model, and `python -m experiments.half_cache.scratch
--help` to train the model first.

__main__.py  the command line for a pretrained model
scratch.py   the command line that trains the model too
command.py   arguments and the end of both commands
runner.py    students trained at the same time on several devices, and their table
settings.py  the settings that a student began with, compared with those of the command that continues it
students.py  kinds of students, recipes of training, and starts
configs.py   the configs of students for train.py
starts.py    a student's perplexity before training, for every start: a process for each student

Imports experiments.uptraining and cllm.
"""

"""Evaluation suites: each is one registered way to measure a model.

suite.py       `Suite`, the base: its options, its measurement, and the names of its numbers
registry.py    the suites there are: those below, those of tasks/ and plug-ins
choice.py      the suites of a command line with their settings
jobs.py        the jobs of a command line: one for each set of a subject
perplexity.py  perplexity and bits per byte over windows
posthoc.py     perplexity after a compressed prefix

A package outside adds a suite through an entry point:

    [project.entry-points."cllm.suites"]
    letters = "my_package:Letters"        # a subclass of `Suite` with `name = "letters"`

`evaluate.py --suite letters` then runs it, and `scripts/compare.py` shows its numbers.

Imports evaluate, data, tables and plugins; torch only while a suite measures.
"""

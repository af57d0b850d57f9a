"""Perplexity and bits per byte of trained models, and the comparison of runs.

    windows.py     which tokens are fed and which are scored, over a stream longer than the model's context
    texts.py       what is scored: prepared tokens or a text file, and how many bytes of text tokens stand for
    subjects.py    what is evaluated: a run, one of its checkpoints, or a Hugging Face checkpoint folder
    perplexity.py  the measurement: a subject on a set, and the record of it        (evaluate.py is its command line)
    comparison.py  run folders as rows of one table, and what makes the rows unequal
    report.py      that table as CSV, Markdown, a figure and TensorBoard events     (scripts/compare.py is its)
    events.py      a picture and a text as TensorBoard events, without torch
    posthoc.py     perplexity after a compressed prefix, and what the compression costs   (evaluate.py --posthoc)
    pareto.py      such measurements of several runs in one table and figure       (scripts/sweep_posthoc.py is its)
    units.py       a loss as a perplexity
    labels.py      names beside the points of a figure, none over another

Nothing is imported here.
"""

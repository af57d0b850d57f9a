"""Evaluation of trained models, and the comparison of runs.

suites/        registered ways to measure a model, and those of plug-ins          (command line: evaluate.py)
tasks/         suites of samples: a context, and questions on top of its cache
perplexity.py  perplexity and bits per byte of a model on a set
posthoc.py     perplexity after a compressed prefix, and the cost of compressing it
generation.py  agreement of text generated after a compressed prefix and after the exact one
subjects.py    models to evaluate: a run, one of its checkpoints, or a Hugging Face checkpoint folder
texts.py       sets to score: prepared tokens or a text file, and the bytes of text that tokens stand for
windows.py     windows over a token stream longer than the model's context
comparison.py  run folders as rows of one table, with warnings                    (command line: scripts/compare.py)
seeds.py       a run as a row, and runs that differ in their seed only as one
report.py      that table as CSV, Markdown and a figure
points.py      a point of a sweep: a run compressed by one method, or as trained
pareto.py      such points from records, and their table
pareto_figure.py  their figure
outputs.py     files of a comparison: table, figure, TensorBoard events
events.py      a picture and a text as TensorBoard events, without torch
labels.py      non-overlapping labels for the points of a figure
left_out.py    commands over several runs that skip broken ones
result_folders.py  default folders of results
units.py       a loss as a perplexity; names of sets in file names

Imports every other package except train. This file imports nothing, so commands can start without torch.
"""

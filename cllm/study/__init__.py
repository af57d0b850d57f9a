"""Studies: a grid of designs, learning rates, seeds and token budgets, trained, measured and put into one report.

schema.py      `Study`: the settings of a study's YAML file, and its loading
halving.py     the rounds of a search of learning rates, and the rates beyond its values
points.py      `Point`: one run of the grid, its complete config and its key
matching.py    designs of equal parameters, cache bytes or training FLOPs
layout.py      the files of a study: results, runs, logs, locks
results.py     the result of a point, one JSON file
rates.py       the outcome of a search, as a function of results
queue.py       the next point: its priority, and whether it ends in time
estimate.py    tokens per second so far, and the seconds that a point takes
measuring.py   the evaluations of a point, which end one by one
children.py    places for processes, and the work on a point in one of them
sharing.py     when the next training may start on a GPU on which others run
busy.py        how long each device took steps or evaluated
runner.py      the loop that keeps all GPUs busy
utilisation.py  how busy the GPUs were
status.py      the table of points, and the plan of a dry run
slurm.py       the script of a SLURM array
curves.py      learning curves, fitted, and where two cross
summary.py     the results of one version as rows of designs
overview.py    its table of designs by cache bytes: parameters, loss, scores
beside.py      designs and models of other results in one table
left_out.py    its sections of runs that diverged, and of results that are not used
report.py      the report as Markdown, JSON, figures and TensorBoard events
figures.py     its figures
events.py      its TensorBoard events, equal bytes each time

Imports every other package except commands. torch is imported only for matching.
"""

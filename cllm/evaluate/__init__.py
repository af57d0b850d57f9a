"""Evaluation of trained models, and the comparison of runs.

suites/        registered ways to measure a model, and those of plug-ins          (command line: evaluate.py)
parallel/      an evaluation in several processes, on several GPUs or on a CPU
tasks/         suites of samples: a context, and questions on top of its cache
perplexity.py  perplexity and bits per byte of a model on a set
posthoc.py     perplexity after a compressed prefix, and the cost of compressing it
calibration.py  the text on which post-hoc methods calibrate
generation.py  agreement of text generated after a compressed prefix and after the exact one
during_training.py  suites of a run in training: `evaluate_suites`
subjects.py    models to evaluate: a run, one of its checkpoints, or a Hugging Face checkpoint folder
texts.py       sets to score: prepared tokens or a text file, and the bytes of text that tokens stand for
windows.py     windows over a token stream longer than the model's context
comparison.py  run folders as rows of one table, with warnings                    (command line: scripts/compare.py)
records.py     check the values of a record that is read
run_numbers.py  numbers in the files of a run, for its row
score_choice.py  the number that --score names, and its value in a record
quality.py     the number by which runs are compared: perplexity, or a number of a suite
measured.py    what was measured of models: from runs, studies, result files and tables of sweeps
measured_model.py  `Measured`: a model and its records
students.py    students of uptraining experiments as such models
answers.py     designs and ways to compress their caches in one table: bytes, perplexity, scores
answers_table.py  that table as Markdown and CSV
heatmap.py     scores by needle depth and length, for each run and compression
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

Imports every other package; of train only during_training.py does, and nothing else of evaluate imports that. This file
imports nothing, so commands can start without torch.
"""

"""The commands of `cllm COMMAND`: each parses its arguments, calls the packages below, and prints.

Every module has `make_parser`, and `main`, which returns an exit status. `main` loads torch only when work begins, so
that `--help` and mistakes in arguments answer at once. In the repository train.py, evaluate.py, data/prepare.py,
scripts/*.py and experiments/*.py call the same functions.

cli.py         `cllm`: its list of commands, and the call of one
train.py       train a run
evaluate.py    perplexity of trained models, and the cost of compressing their caches
evaluate_options.py  its options
evaluate_part.py     one part of it, in a process of its own
prepare.py     a corpus as shards of tokens
convert.py     runs and checkpoint folders into each other
serve.py       an exported folder in vLLM's server
compare.py     runs in one table and one figure
analyze.py     similarity of cached keys and values between layers
tradeoff.py    designs, trained and compressed
sweep.py       runs, compressed in many ways
study.py       a grid of designs, learning rates and seeds, and its report
study_point.py the evaluation of one point of a study
plan.py        designs that fit a GPU
configs.py     the shipped configs, recipes and notebooks
completion.py  answers to a shell that completes a command line

Imports every other package. This file imports nothing, so commands can start without torch.
"""

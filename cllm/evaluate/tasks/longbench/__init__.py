"""LongBench v1 (arXiv 2308.14508): English tasks from the benchmark's JSONL files.

metrics.py  F1, ROUGE-L, classification, retrieval and count of a generated answer
table.py    the tasks: prompts, lengths of answers, metrics; rows of files
prompt.py   token ids of long prompts, whose middle is cut out
suite.py    the suite

Imports evaluate/tasks' base, its packages language and code, and section.
"""

"""Suites of language data sets in local files of their public formats.

rows.py      rows of JSON lines, JSON, CSV, TSV and Parquet files
example.py   a question as text, and few shots
scores.py    numbers of a question from its options' losses, or from a generated answer
datasets.py  the table of data sets: fields, prompts, options and answers
suites.py    the suites of that table: samples as token ids, and scores
wikitext.py  bits per byte of a text

Imports evaluate/tasks' base, data and section.
"""

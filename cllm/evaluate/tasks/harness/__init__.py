"""Tasks of lm-evaluation-harness (package lm-eval), asked through its own interface.

suite.py  the suite: tasks, records and table
model.py  a subject as a model of lm-eval
offline.py  the Hugging Face Hub, if it cannot be reached

Imports evaluate/tasks' base and section; lm-eval and torch while the suite runs.
"""

"""The parts of scripts/uptrain_evidence.py.

setup.py     sizes, plans, and the list of students
base.py      tokens, the checkpoint to start from, and the check of its import
students.py  the configs of students, their scores before training, and training them through train.py's own code
steptime.py  a distilled step against a plain one
report.py    rows and tables
"""

"""Code completion: the next line of a file, given other files or the file's beginning.

edit.py      edit similarity of a generated line
snippets.py  tasks from a folder of source code: a line that uses what another file defines
suite.py     the suite

Imports evaluate/tasks' base, its packages language and longbench, and section.
"""

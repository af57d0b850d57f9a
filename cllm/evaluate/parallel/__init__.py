"""An evaluation in several processes, on several GPUs or on a CPU.

parts.py    the parts of a command that can be measured apart, and what identifies each
store.py    the files of parts until the command is complete, and their move to the folders of results
launch.py   a process for each part, the order of parts, progress, failures

The results are those of one process: the same suites write the same files, and files that several parts write have the
content of the part that comes last in the command.

Imports of evaluate suites/ and result_folders.py.
"""

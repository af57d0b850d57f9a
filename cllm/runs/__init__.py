"""Runs on disk.

folder.py      `RunFolder`: config, metrics, checkpoints; `load_run`: the trained model in it
checkpoint.py  checkpoint files: synced to the disk when written, and verified before they are used
names.py       names of checkpoints and of their files
speed.py       the training speed of a run, from its metrics

Imports the config, the model and data. torch is imported only where weights are read.
"""

from cllm.runs.folder import RUN, DataDigests, RunFolder, check_run_folder, load_run

__all__ = ["RUN", "DataDigests", "RunFolder", "check_run_folder", "load_run"]

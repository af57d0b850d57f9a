"""Runs on disk.

folder.py      `RunFolder`: config, metrics, checkpoints; `load_run`: the trained model in it
checkpoint.py  checkpoint files: written through to the disk, and verified before anything in them is used
names.py       names of checkpoints and of what is in them

Imports the config, the model and data. torch is imported only where weights are read.
"""

from cllm.runs.folder import RUN, DataDigests, RunFolder, check_run_folder, load_run

__all__ = ["RUN", "DataDigests", "RunFolder", "check_run_folder", "load_run"]

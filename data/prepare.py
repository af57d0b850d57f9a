"""Prepare a corpus for training: the same as `cllm prepare`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.commands import prepare

main = functools.partial(prepare.main, program="python data/prepare.py")

if __name__ == "__main__":
    sys.exit(main())

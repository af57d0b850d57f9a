"""Measure the similarity of cached keys and values between layers: the same as `cllm analyze`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.commands import analyze

main = functools.partial(analyze.main, program="python scripts/analyze.py")

if __name__ == "__main__":
    sys.exit(main())

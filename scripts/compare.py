"""Compare runs: the same as `cllm compare`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.commands import compare

main = functools.partial(compare.main, program="python scripts/compare.py")

if __name__ == "__main__":
    sys.exit(main())

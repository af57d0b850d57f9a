"""Convert between runs and checkpoint folders: the same as `cllm convert`."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cllm.commands import convert

main = functools.partial(convert.main, program="python scripts/convert.py")

if __name__ == "__main__":
    sys.exit(main())

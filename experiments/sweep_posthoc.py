"""Compress the caches of runs in many ways: the same as `cllm sweep`."""

from __future__ import annotations

import functools
import sys

from cllm.commands import sweep

main = functools.partial(sweep.main, program="python -m experiments.sweep_posthoc")

if __name__ == "__main__":
    sys.exit(main())

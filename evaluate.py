"""Measure perplexity and bits per byte of trained models: the same as `cllm evaluate`."""

from __future__ import annotations

import functools
import sys

from cllm.commands import evaluate

main = functools.partial(evaluate.main, program="python evaluate.py")

if __name__ == "__main__":
    sys.exit(main())

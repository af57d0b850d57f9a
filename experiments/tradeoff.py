"""Train designs, compress their caches, and compare all: the same as `cllm tradeoff`."""

from __future__ import annotations

import functools
import sys

from cllm.commands import tradeoff

main = functools.partial(tradeoff.main, program="python -m experiments.tradeoff")

if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python
"""Train a decoder whose layers declare where their keys and values come from: the same as `cllm train`."""

from __future__ import annotations

import functools
import sys

from cllm.commands import train

main = functools.partial(train.main, program="python train.py")

if __name__ == "__main__":
    sys.exit(main())

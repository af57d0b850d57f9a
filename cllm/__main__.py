"""`python -m cllm COMMAND ...`: the same as `cllm COMMAND ...`."""

import sys

from cllm.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`transformers serve` for folders of this package.

The server looks the class of a folder up in the module `transformers`, as the name in config.json's `architectures`. It
is imported after the server's module (see `cllm/__init__.py`), since transformers replaces its own module object while
it is imported, and the server keeps one of them.
"""

from __future__ import annotations

import sys
from types import ModuleType

from cllm.hub.model import CLLMForCausalLM

_SERVER = "transformers.cli.serving.model_manager"


def register(server: ModuleType) -> None:
    """Add the class to the module in which the server's module `server` looks for it."""
    module = getattr(server, "transformers", sys.modules["transformers"])
    setattr(module, CLLMForCausalLM.__name__, CLLMForCausalLM)


if (_server := sys.modules.get(_SERVER)) is not None:
    register(_server)

"""`transformers serve` for folders of this package.

The server looks the class of a folder up in the module `transformers`, as the name in config.json's `architectures`. It
is imported after the server's module (see `cllm/__init__.py`), since transformers replaces its own module object while
it is imported, and the server keeps one of them.

A request that the model refuses is answered with its error. The server would answer "Internal Server Error".
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any

from cllm.errors import UserError
from cllm.hub.model import CLLMForCausalLM

_SERVER = "transformers.cli.serving.server"
_MANAGER = "transformers.cli.serving.model_manager"
REFUSED = 400
"""The HTTP status of a request that the model refuses."""


def register(server: ModuleType, manager: ModuleType) -> None:
    """Make the server know the class and its errors.

    Args:
        server: transformers' module that builds the server.
        manager: the module that loads models for it.
    """
    module = getattr(manager, "transformers", sys.modules["transformers"])
    setattr(module, CLLMForCausalLM.__name__, CLLMForCausalLM)
    build: Any = server.build_server

    @functools.wraps(build)
    def build_server(*arguments: Any, **options: Any) -> Any:
        app = build(*arguments, **options)
        app.add_exception_handler(UserError, _answer)
        return app

    server.build_server = build_server  # type: ignore[attr-defined]


async def _answer(request: Any, error: Exception) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=REFUSED)


if (_server := sys.modules.get(_SERVER)) is not None:
    register(_server, sys.modules[_MANAGER])

"""Base of the passes that change the compiled graph of a block."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class GraphPass(CustomGraphPass):
    """Changes a graph in place, for tensors on the given kinds of device. Subclasses implement `__call__`."""

    def __init__(self, devices: Sequence[str] = ("cuda",)):
        self.devices = tuple(devices)

    def uuid(self) -> object:
        """Key of the pass in the compiler's cache: the file of its class, and its devices."""
        return get_hash_for_files((inspect.getfile(type(self)),), str(self.devices))

"""What passes over the graphs that torch's compiler makes of a block have in common."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class GraphPass(CustomGraphPass):
    """Changes graphs, in place, where their tensors are on some kinds of device; a subclass says how in `__call__`."""

    def __init__(self, devices: Sequence[str] = ("cuda",)):
        self.devices = tuple(devices)

    def uuid(self) -> object:
        """The compiler's cache knows code that the pass has changed by this: by the file of its class, and devices."""
        return get_hash_for_files((inspect.getfile(type(self)),), str(self.devices))

"""Base of the passes that change the compiled graph of a block."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
"""Operators whose result has the numbers of their first argument, in order."""
HALF = (torch.bfloat16, torch.float16)


class GraphPass(CustomGraphPass):
    """Changes a graph in place, for tensors on the given kinds of device. Subclasses implement `__call__`."""

    def __init__(self, devices: Sequence[str] = ("cuda",)):
        self.devices = tuple(devices)

    def uuid(self) -> object:
        """Key of the pass in the compiler's cache: the file of its class and this one, and its devices."""
        return get_hash_for_files((inspect.getfile(type(self)), __file__), str(self.devices))

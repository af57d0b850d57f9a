"""Compiling with a pass over graphs, and counting the operators that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from cllm.kernels.graph_pass import GraphPass


class Counted(Exception):
    """Ends a compilation once its graph has been counted."""


class Counting(CustomGraphPass):
    """A pass that also keeps what `count` says of each graph after it, in `found`. With `only` it raises `Counted`
    then, so that no code is written."""

    def __init__(self, inner: GraphPass, count: Callable[[Graph], Any], *, only: bool = False):
        self.inner, self.count, self.only = inner, count, only
        self.found: list[Any] = []

    def __call__(self, graph: Graph) -> None:
        self.inner(graph)
        self.found.append(self.count(graph))
        if self.only:
            raise Counted

    def uuid(self) -> None:
        """None, so that no graph comes from the compiler's cache, where the pass is not called."""
        return None


def calls(graph: Graph, *operators: object) -> list[Node]:
    """The nodes that call one of `operators`, in order."""
    return [node for node in graph.nodes if node.target in operators]


def compiled(function: Callable[..., Any], graph_pass: CustomGraphPass, *, first: bool = False) -> Any:
    """`function`, compiled for static shapes with a pass over each graph: after the compiler's own, or as the first."""
    torch._dynamo.reset()
    stage = "post_grad_custom_pre_pass" if first else "post_grad_custom_post_pass"
    return torch.compile(function, fullgraph=True, dynamic=False, options={stage: graph_pass})

"""How much of a prompt the layers of a plan have to compute so that its last token and the cache are exact."""

from __future__ import annotations

import math

from cllm.plan.plan import KVPlan


def prompt_tail(plan: KVPlan) -> tuple[int, int]:
    """The highest layer that all tokens of a prompt have to reach, and the number of last tokens that go on above it.

    A layer above it owns nothing, or projects the output of a lower layer, or caches a window of its own input. Only
    the third kind needs other tokens than the last. Its window of w tokens needs windows of the layer below in turn.
    With u such layers of one window, u (w - 1) + 1 tokens make the last token and every cached window exact.
    """
    top = max([0, *plan.inputs, *(last for _, last in plan.cyclic_spans())])
    slots: dict[int, float] = {}
    """Last tokens of a slot that have to be exact."""
    tail = 1.0
    for i in range(len(plan) - 1, top, -1):
        for read, window in plan.attended(i):
            seen = math.inf if window is None else tail + window - 1
            slots |= {j: max(slots.get(j, 0), seen) for j in read}
        needed = tail
        for j in (slot for slot in (i, len(plan) + i) if slot in plan.slots):
            own, kept = plan.owned(j), plan.kept(j)
            exact = max(slots.get(j, 0), math.inf if kept is None else kept)
            slots |= {k: max(slots.get(k, 0), exact) for k in own.mixes}
            if own.reads_a_prompt:
                needed = max(needed, exact, 2)  # a pass of one token would be a step of decoding
        if needed == math.inf:
            return i, int(tail)
        tail = needed
    return top, int(tail)


def tail_slots(plan: KVPlan) -> frozenset[int]:
    """The owners whose slots a prompt fills for its last tokens only, because only these reach the layer.

    They are above the layer that all tokens reach, and project their own input or mix such a slot into their own.
    """
    top, _ = prompt_tail(plan)
    found: set[int] = set()
    for i in plan.owners:
        if i > top and (plan.owned(i).reads_a_prompt or not found.isdisjoint(plan.mixes(i))):
            found.add(i)
    return frozenset(found)

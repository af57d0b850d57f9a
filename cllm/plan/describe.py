"""A plan as text: a table, and a drawing in characters."""

from __future__ import annotations

from operator import itemgetter

from cllm.plan.numbers import ranges
from cllm.plan.plan import KVPlan
from cllm.tables import Column, aligned


def owns_text(plan: KVPlan, i: int) -> str:
    """The slots that layer `i` owns; empty for none."""
    layer = plan.layers[i]
    return " + ".join(own.text for own in (layer.own, layer.local) if own is not None)


def origin_text(plan: KVPlan, i: int) -> str:
    """Where the keys and values of layer `i` come from, in messages: a clause whose subject is the layer."""
    layer = plan.layers[i]
    slots = [own for own in (layer.own, layer.local) if own is not None]
    owned = [f"a {own.noun}" if own.text == own.noun else f"a {own.noun} ({own.text})" for own in slots]
    return f"owns {' and '.join(owned) or 'nothing'}{_reads_text(plan, i)}"


def _reads_text(plan: KVPlan, i: int) -> str:
    """The end of that clause: what layer `i` reads. It is empty if that is its own slot, unchanged."""
    keys, values = plan.keys(i), plan.values(i)
    if plan.reads_at_once(i):
        return f" and reads several slots at once, {keys.text(i)}"
    reads = {"keys and values": keys} if keys == values else {"keys": keys, "values": values}
    parts = []
    for half, read in reads.items():
        if not read.is_stored:
            parts.append(f"{half} by {read.text(i)}")
        elif read.layers != (i,):
            parts.append(f"{half} of layer {read.layers[0]}")
        elif len(reads) > 1:
            parts.append(f"{half} of its own")
    return f" and reads {' and '.join(parts)}" if parts else ""


def sees_text(plan: KVPlan, i: int) -> str:
    """The tokens that a query of layer `i` sees, of each slot that it reads by a mask of its own."""
    windows = (window for _, window in plan.attended(i))
    return " + ".join("all" if window is None else f"last {window}" for window in windows)


def plan_rows(plan: KVPlan) -> list[tuple[str, str, str, str, str]]:
    """(layers, owns, keys from, values from, sees); neighbours that differ in nothing else share a row."""
    rows: list[tuple[list[int], tuple[str, str, str, str]]] = []
    for i in range(len(plan)):
        sees = sees_text(plan, i)
        if plan.reads_above(i):
            sees += " but itself"
        values = "same" if plan.reads_at_once(i) else plan.values(i).text(i)
        row = (owns_text(plan, i) or "-", plan.keys(i).text(i), values, sees)
        if rows and rows[-1][1] == row:
            rows[-1][0].append(i)
        else:
            rows.append(([i], row))
    return [(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}", *row) for run, row in rows]


def plan_table(plan: KVPlan) -> str:
    """The plan as aligned text."""
    heads = ("layer", "owns", "keys", "values", "sees")
    columns = [Column(head, itemgetter(i), left=True) for i, head in enumerate(heads)]
    lines = [aligned(columns, plan_rows(plan))]
    if plan.iterations and plan.cyclic_spans():
        spans = ", ".join(f"{first}-{last}" for first, last in plan.cyclic_spans())
        lines.append(
            f"layers {spans} read from above: {plan.iterations.forward} passes without and "
            f"{plan.iterations.backward} with gradient"
        )
    if plan.loop is not None:
        lines.append(plan.loop.text)
    return "\n".join(lines)


def plan_drawing(plan: KVPlan) -> str:
    """A row for each layer, a column for each owner, and in it what the layer reads of the owner's slot.

    Rows of a loop end with the turn. Below are the slots that are mixed into others, the layers whose output others
    project, and the second slots of layers, which have no column.
    """
    owners, width = plan.owners, len(str(len(plan) - 1))
    digits = len(str(owners[-1]))
    lines = [" " * (width + 7) + " ".join(str(j).rjust(digits)[row] for j in owners) for row in range(digits)]
    for i in range(len(plan)):
        cells = []
        for j in owners:
            k, v = j in plan.keys(i).layers, j in plan.values(i).layers
            if i == j:
                cells.append("O" if k and v else "k" if k else "v" if v else "o")
            else:
                cells.append("B" if k and v else "K" if k else "V" if v else ".")
        turn = "" if plan.loop is None else plan.loop.turn(i)
        lines.append(f"layer {str(i).rjust(width)} " + " ".join(cells) + (f"  {turn}" if turn else ""))
    lines.append(
        "O owns and reads, k or v reads only that half of its own, o owns only, B reads keys and values, K keys, "
        "V values; columns are the cached slots"
    )
    if plan.loop is not None:
        lines.append(f"all turns have the weights of {plan.loop.weights}")
    mixing: dict[tuple[int, ...], list[int]] = {}
    for i in owners:
        if mixed := tuple(sorted(plan.mixes(i))):
            mixing.setdefault(mixed, []).append(i)
    for mixed, layers in mixing.items():
        who, mix, own = ("layers", "mix", "their own") if len(layers) > 1 else ("layer", "mixes", "its own")
        slot = "slot" if len(mixed) == 1 else "slots"
        lines.append(f"{who} {ranges(layers)} {mix} {slot} {ranges(mixed)} into {own}")
    for n in sorted(plan.inputs):
        layers = [i for i in owners if plan.owned(i).input == n]
        who, project, slots = ("layers", "project", "slots") if len(layers) > 1 else ("layer", "projects", "slot")
        lines.append(f"{who} {ranges(layers)} {project} the output of layer {n} into the cached {slots}")
    if second := [i for i, layer in enumerate(plan.layers) if layer.local is not None]:
        who, own, they, read = (
            ("layers", "own", "they", "read") if len(second) > 1 else ("layer", "owns", "it", "reads")
        )
        lines.append(f"{who} {ranges(second)} {own} a second slot, which {they} alone {read} and which has no column")
    return "\n".join(lines)

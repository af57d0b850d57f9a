"""One short line that describes how the tensors of a checkpoint differ from those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from cllm.files import shorten

_NAMED = 2
"""Names in a message for each kind of difference; the others are counted."""


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Names that are missing or unknown, other shapes, and integer tensors; None if all tensors match."""
    both = [name for name in expected if name in found]
    return describe(
        missing=(name for name in expected if name not in found),
        unknown=(name for name in found if name not in expected),
        reshaped=(
            f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
            for name in both
            if found[name].shape != expected[name].shape
        ),
        integers=(
            f"{name} is {str(found[name].dtype).removeprefix('torch.')}"
            for name in both
            if expected[name].is_floating_point() and not found[name].is_floating_point()
        ),
    )


def describe(
    *,
    missing: Iterable[str] = (),
    unknown: Iterable[str] = (),
    reshaped: Iterable[str] = (),
    integers: Iterable[str] = (),
) -> str | None:
    """A line of at most about 400 characters: the first names of each kind, and the number of others."""
    kinds = (
        ("missing", missing),
        ("not in the model", unknown),
        ("of another shape", reshaped),
        ("not floating point", integers),
    )
    parts = [f"{kind}: {_listed(sorted(names))}" for kind, given in kinds if (names := list(given))]
    return "; ".join(parts) or None


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    shown = ", ".join(shorten(name, 56 if more > 0 else 100) for name in names[:_NAMED])
    return shown + (f" and {more} more" if more > 0 else "")

"""Extensions that installed packages offer through entry points, as in their pyproject.toml:

[project.entry-points."cllm.posthoc"]
truncate = "my_package.truncate:Truncate"
"""

from __future__ import annotations

import functools
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from cllm.errors import UserError


@functools.cache
def plugins(group: str) -> dict[str, Any]:
    """The objects that installed packages offer in an entry point group, by name; imported on the first call.

    Raises:
        UserError: naming the entry point and its distribution, if it cannot be imported, whatever the import raises, or
            if another has the same name.
    """
    loaded: dict[str, Any] = {}
    for name, point in _entry_points(group).items():
        try:
            loaded[name] = point.load()
        except (Exception, SystemExit) as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())
            raise UserError(f"{_describe(point)}: cannot be loaded: {reason}") from error
    return loaded


def origin(group: str, name: str) -> str:
    """The beginning of an error message about a plug-in: its group, name, object and distribution."""
    return _describe(_entry_points(group)[name])


def _entry_points(group: str) -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        if point.name in points:
            raise UserError(f"{_describe(points[point.name])} and {_describe(point)} have the same name; uninstall one")
        points[point.name] = point
    return points


def _describe(point: EntryPoint) -> str:
    distribution = "unknown" if point.dist is None else f"{point.dist.name} {point.dist.version}"
    return f'plug-in {point.group} "{point.name}" ({point.value}, distribution {distribution})'

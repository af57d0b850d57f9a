"""Sections of a report about what its tables leave out: runs that diverged, and results that are not used."""

from __future__ import annotations

from cllm.counts import count_text
from cllm.study.summary import Summary

_DIVERGED_NOTE = "Gradients or the last loss were not finite. Means and intervals are over the other seeds."


def diverged(summary: Summary) -> list[str]:
    """The section of runs without a finite loss, which no row contains."""
    if not summary.diverged:
        return []
    lines = [
        f"- {result.variant.label}, {count_text(result.content['tokens'])}, seed {result.content['seed']}, "
        f"learning rate {result.rate:g}"
        for result in summary.diverged
    ]
    return ["## Diverged", "\n".join(lines), _DIVERGED_NOTE]


def not_used(summary: Summary) -> list[str]:
    """The section of results of other versions, settings or data, and of files that could not be read."""
    lines = [
        f"- {result.name}: {reason} (code {result.code}, commit {(result.content['commit'] or 'unknown')[:10]})"
        for reason, result in summary.others
    ]
    lines += [f"- {reason}" for reason in summary.unread]
    return ["## Not used", "\n".join(lines)] if lines else []

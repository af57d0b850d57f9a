"""TensorBoard's HPARAMS tab: one row a run, under the run's name, with design, sizes and perplexity before the rest.

TensorBoard sorts the columns of hyperparameters by name, and puts those first that are said to differ between runs.
Metrics come after the hyperparameters; it shows the first few columns of both and hides the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

FIRST = ("design", "kv_read_vs_mha", "kv_resident_vs_mha", "parameters")
"""Hyperparameters by which designs differ."""


def hparams_summaries(
    run: str, hyperparameters: Mapping[str, bool | int | float | str], metrics: Mapping[str, str]
) -> list[Summary]:
    """The summaries that make a run a row of the tab: experiment, start and end.

    Args:
        run: name of the row. Runs of one name become one row.
        hyperparameters: name and value.
        metrics: tags of scalars, and their names in the table.
    """
    summaries = hparams(dict(hyperparameters), dict.fromkeys(metrics, float("nan")))
    for summary in summaries:
        content = summary.value[0].metadata.plugin_data
        data: Any = HParamsPluginData.FromString(content.content)
        if data.HasField("experiment"):
            for info in data.experiment.hparam_infos:
                info.differs = info.name in FIRST
            for metric in data.experiment.metric_infos:
                metric.display_name = metrics[metric.name.tag]
        elif data.HasField("session_start_info"):
            data.session_start_info.group_name = run
        content.content = data.SerializeToString()
    return list(summaries)

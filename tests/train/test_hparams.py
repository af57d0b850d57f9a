"""The HPARAMS tab, as TensorBoard's own backend reads it from two runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard import context
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from cllm.config import ModelConfig
from cllm.plan.picture import plan_png
from cllm.runs import RunFolder
from cllm.train.hparams import FIRST
from cllm.train.metrics import MetricsLog


@pytest.fixture
def backend(tmp_path: Path, tiny_config: Callable[..., ModelConfig]) -> tuple[Any, Any]:
    """TensorBoard's experiment, and the rows of its table, for the runs `mha` and `cla`."""
    picture = plan_png(tiny_config().plan(), "x")
    for run, perplexity in (("mha", 12.0), ("cla", 12.5)):
        folder = RunFolder(tmp_path / run)
        folder.path.mkdir()
        log = MetricsLog(folder, start_step=0, tokens_per_step=10)
        sizes = {"parameters": 10, "kv_resident_vs_mha": 0.5, "kv_read_vs_mha": 1.0}
        log.start({"attention.backend": "sdpa", "design": run, **sizes, "a": 1, "train.seed": 3}, "", picture)
        log.write(1, {"val/ppl": 99.0})
        log.write(2, {"val/ppl": perplexity})
        log.close()
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    backend = backend_context.Context(TBContext(data_provider=provider))
    request, no_limit = context.RequestContext(), api_pb2.GetExperimentRequest(hparams_limit=0)
    experiment = get_experiment.Handler(request, backend, "", no_limit).run()
    statuses = ["STATUS_SUCCESS", "STATUS_UNKNOWN", "STATUS_RUNNING", "STATUS_FAILURE"]
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.Status.Value(name) for name in statuses], slice_size=10
    )
    return experiment, list_session_groups.Handler(request, backend, "", asked).run().session_groups


def test_design_and_sizes_come_before_other_hyperparameters(backend) -> None:
    experiment, _ = backend
    names = [info.name for info in experiment.hparam_infos]
    assert names[0] == "design"
    assert tuple(names[: len(FIRST)]) == FIRST
    assert set(names[len(FIRST) :]) == {"a", "attention.backend", "train.seed"}


def test_the_metric_is_the_last_validation_perplexity_in_words(backend) -> None:
    experiment, rows = backend
    (metric,) = experiment.metric_infos
    assert (metric.name.tag, metric.display_name) == ("hp/val_ppl", "validation perplexity")
    assert {row.name: row.metric_values[0].value for row in rows} == {"mha": 12.0, "cla": 12.5}


def test_rows_are_named_after_runs(backend) -> None:
    _, rows = backend
    assert {row.name: row.hparams["design"].string_value for row in rows} == {"mha": "mha", "cla": "cla"}

"""The shipped study for a CPU in a short form, with real training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.study.layout import Layout
from cllm.study.points import Grid
from cllm.study.queue import Queue, is_trained
from cllm.study.report import report_text
from cllm.study.results import read_results, result_of, write_result
from cllm.study.schema import load_study
from cllm.study.summary import summarise
from cllm.train.run import train
from cllm.version import code_version

ROOT = Path(__file__).resolve().parents[2]
SHORT = {
    "model.d_model": 16, "model.n_layers": 2, "model.max_seq_len": 32, "data.seq_len": 32, "optim.warmup_steps": 1,
    "data.validation_sequences": 2, "train.log_every": 2, "train.accelerator": "cpu", "model.match_params": "false",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(prepare_texts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = ["the", "plan", "says", "where", "keys", "and", "values", "come", "from"]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(60)]
    return prepare_texts(tmp_path_factory.mktemp("corpus"), texts, 0.2)


def test_the_study_of_the_cpu_gives_a_table_and_equal_runs_for_equal_points(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SHORT, "data.path": str(data)}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    study = load_study(ROOT / "configs/studies/cpu.yaml", words)
    assert study.match.rule == "equal parameters, equal tokens"
    short = {"rates": study.rates.model_copy(update={"tokens": 256}), "tokens": [512], "seeds": [1], "validations": 2}
    short |= {"match": study.match.model_copy(update={"parameters": False})}  # the tiny models have few widths
    study = study.model_copy(update=short)
    queue = Queue(Grid(study, code_version(), ["fusedkv"]), Layout.at(tmp_path))
    trained = []
    while work := [point for point, what in queue.left() if what == "train"]:
        point = work[0]
        config = queue.grid.config(point, queue.layout.runs)
        run = train(config, resume="auto")
        assert is_trained(run, config)
        result = result_of(point, run, None, 1.0)
        digests = run.data_digests()
        assert digests is not None
        assert (result["data"], result["text"]) == (
            digests.train,
            f"validation {digests.validation['validation'][:12]}",
        )
        write_result(queue.layout.result(point), result)
        trained.append(point)
    assert [point.tokens for point in trained] == [256, 256, 512]
    text = report_text(summarise(study, read_results(queue.layout.results), ["fusedkv"]), [])
    assert "| fusedkv " in text
    assert "no baseline yet" in text
    last = trained[-1]
    again = train(queue.grid.config(last, tmp_path / "again"))
    files = [queue.layout.run(last).newest_checkpoint(), again.newest_checkpoint()]
    states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

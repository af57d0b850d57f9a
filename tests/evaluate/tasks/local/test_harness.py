"""lm-evaluation-harness: its tasks through cllm's runner, in agreement with its own model and with cllm's suites."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.errors import UserError
from cllm.evaluate.suites.choice import parse_choice
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.harness import suite
from cllm.evaluate.tasks.language.suites import language_suites

lm_eval = pytest.importorskip("lm_eval")

WORDS = ["alpha", "beta", "naïve", "日本", "return x", "one two three", "the lid"]
TASKS = {
    "local_hellaswag": """
output_type: multiple_choice
doc_to_text: "{{activity_label}}: {{ctx_a}} {{ctx_b.capitalize()}}"
doc_to_target: "{{label}}"
doc_to_choice: endings
metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]
""",
    "local_write": """
output_type: generate_until
doc_to_text: "{{ctx_a}}"
doc_to_target: "{{endings[0]}}"
generation_kwargs: {until: ["a"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{ctx_a * 20}}"
metric_list: [{metric: bits_per_byte}]
""",
}


def rows(count: int) -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)

    def some(most: int) -> str:
        return " ".join(draw.choice(WORDS, size=draw.integers(1, most)))

    return [
        {
            "activity_label": some(2),
            "ctx_a": f"{some(12)}.",
            "ctx_b": f"he {some(3)}",
            "endings": [some(8) for _ in range(4)],
            "label": str(draw.integers(4)),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "hellaswag.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(24)))
    for name, text in TASKS.items():
        source = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        )
        (folder / f"{name}.yaml").write_text(source + text)
    return folder


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory) -> Any:
    """The cache of the package datasets, in a temporary folder."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


def numbers(out: Path, task: str, where: str = "lm_eval") -> dict[str, float]:
    (file,) = (out / where).glob(f"{task}*.json")
    metrics: dict[str, float] = json.loads(file.read_text())["metrics"]
    return metrics


def test_its_tasks_agree_with_its_own_model_and_with_the_suite_hellaswag(
    evaluate: Callable[..., int], run_path, subject, folder, tmp_path, capsys
) -> None:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from cllm.hub.export import as_pretrained

    names = "|".join(TASKS)
    spec = f"lm_eval:{names},include_path={folder},start=false"
    options = ("--run", run_path, "--device", "cpu", "--out", tmp_path)
    assert evaluate(*options, "--suite", spec) == 0
    assert "local_hellaswag" in capsys.readouterr().out
    model = HFLM(
        pretrained=as_pretrained(subject.model).eval(), tokenizer=subject.tokenizer, backend="causal", device="cpu"
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    theirs = lm_eval.simple_evaluate(model, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)["results"]
    for task, metrics in (("local_hellaswag", ("acc", "acc_norm")), ("local_text", ("bits_per_byte",))):
        for metric in metrics:
            assert numbers(tmp_path, task)[metric] == pytest.approx(theirs[task][f"{metric},none"], abs=1e-4)
    hellaswag = next(suite for suite in language_suites() if suite.name == "hellaswag")
    assert evaluate(*options, "--suite", f"hellaswag:path={folder / 'hellaswag.jsonl'},start=false") == 0
    ours = json.loads((tmp_path / hellaswag.name / f"{hellaswag.name}.json").read_text())
    found = theirs["local_hellaswag"]
    assert ours["accuracy"] / 100 == pytest.approx(found["acc,none"], abs=1e-3)
    assert ours["accuracy_norm"] / 100 == pytest.approx(found["acc_norm,none"], abs=1e-3)
    assert 0 < found["acc,none"] < 1


def test_requests_are_answered_as_by_its_own_model(subject) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from cllm.evaluate.tasks.harness.model import subject_lm
    from cllm.hub.export import as_pretrained

    own = HFLM(
        pretrained=as_pretrained(subject.model).eval(), tokenizer=subject.tokenizer, backend="causal", device="cpu"
    )
    ours = subject_lm(subject, torch.device("cpu"), start=False)

    def ask(model: Any, kind: str, arguments: list[tuple]) -> Any:
        requests = [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
        return getattr(model, kind)(requests)

    long = " ".join(WORDS * 40)
    pairs = [("one two", " three"), ("", "return x"), ("one two", " alpha"), ("the ", "lid")]
    for (a, first), (b, second) in zip(
        ask(ours, "loglikelihood", pairs), ask(own, "loglikelihood", pairs), strict=True
    ):
        assert (a, first) == (pytest.approx(b, rel=1e-4), second)
    options = {"until": ["a", "\n"], "max_gen_toks": 5, "do_sample": False}
    texts = [(text, options) for text in ("one two", "日本", long)]
    assert ask(ours, "generate_until", texts) == ask(own, "generate_until", texts)
    with pytest.raises(UserError, match="samples text; allowed: greedy"):
        ask(ours, "generate_until", [("a", {"do_sample": True, "temperature": 0.7})])
    started = subject_lm(subject, torch.device("cpu"))
    alone, without = (ask(model, "loglikelihood", [("", "return x"), ("one", " two")]) for model in (started, ours))
    assert alone[0] == without[0], "a text without context follows the start token in any case"
    assert alone[1] != without[1]


def test_contexts_are_compressed(evaluate, run_path, folder, tmp_path) -> None:
    spec = f"lm_eval:local_hellaswag,include_path={folder},limit=6"
    words = ("--run", run_path, "--device", "cpu", "--suite", spec)
    assert evaluate(*words, "--out", tmp_path / "a") == 0
    methods = ("--posthoc", "none", "--posthoc", "svd:rank_k=1,rank_v=1,sinks=0")
    assert evaluate(*words, "--out", tmp_path / "b", *methods) == 0
    plain, none = numbers(tmp_path / "a", "local_hellaswag"), numbers(tmp_path / "b", "local_hellaswag", "lm_eval/none")
    assert none == plain
    (other,) = (tmp_path / "b" / "lm_eval").glob("svd*/*.json")
    assert json.loads(other.read_text())["questions"] == 6


def test_a_spec_that_is_refused_is_an_error_only_if_no_other_is_left(
    evaluate, run_path, folder, tmp_path, capfd, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)  # no repository of git, which lm-eval asks for a commit
    spec = f"lm_eval:local_hellaswag,include_path={folder},limit=4"
    words = ("--run", run_path, "--device", "cpu", "--suite", spec)
    refused = ("--posthoc", "svd:ratio=300,sinks=0")
    assert evaluate(*words, "--posthoc", "none", *refused, "--out", tmp_path / "a") == 0
    error = capfd.readouterr().err
    assert f"on lm_eval: {refused[1]} is refused: svd: ratio=300: " in error
    assert "fatal" not in error
    assert numbers(tmp_path / "a", "local_hellaswag", "lm_eval/none")
    assert evaluate(*words, *refused, "--out", tmp_path / "b") == 2
    assert f'error: --posthoc "{refused[1]}": svd: ratio=300: ' in capfd.readouterr().err
    assert evaluate(*words, *refused, "--out", tmp_path / "b", "--skip-refused") == 0
    assert list(json.loads((tmp_path / "b" / "lm_eval" / "refused.json").read_text())["refused"]) == [refused[1]]


def test_models_of_one_name_have_lines_of_their_own() -> None:
    record = {"run": "a", "step": None, "task": "t", "shots": 0, "questions": 4, "spec": "none", "checkpoint": "a"}
    records = [record | {"path": path, "metrics": {"acc": acc}} for path, acc in (("/x/a", 0.25), ("/y/a", 0.5))]
    assert [line.split()[-1] for line in suite.LmEval().table(records).splitlines()[1:]] == ["0.2500", "0.5000"]


def test_mistakes_are_one_line(evaluate, run_path, folder, monkeypatch, capsys) -> None:
    index = suite._index  # without lm-eval's own tasks, whose thousands of files take seconds to read
    monkeypatch.setattr(suite, "_index", lambda include_path, include_defaults: index(str(folder), False))
    for spec, message in (
        ("lm_eval", "--suite lm_eval: needs names of tasks"),
        ("lm_eval:no_such_task", "lm_eval: no_such_task: no such task; allowed: .*, those of include_path="),
        ("lm_eval:local_tex", 'local_tex: no such task; allowed: tasks of lm-eval .nearest: "local_text".'),
        (f"lm_eval:local_text,include_path={folder}/x", "include_path=.*/x: no such folder"),
    ):
        assert evaluate("--run", run_path, "--device", "cpu", "--suite", spec) == 2
        err = capsys.readouterr().err.strip()
        assert re.search(message, err), err
    assert parse_choice("lm_eval:a|b,limit=2", suites()).given.tasks == ["a", "b"]
    assert parse_choice("lm_eval:tasks=a", suites()).given.tasks == ["a"]
    with pytest.raises(UserError, match='"b" is not of the form KEY=VALUE'):
        parse_choice("lm_eval:a,b", suites())

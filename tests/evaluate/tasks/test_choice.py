"""`--suite NAME:KEY=VALUE,...`: paths that look like YAML, lists, and result files that do not collide."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cllm.errors import UserError
from cllm.evaluate.suites.choice import parse_choice
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.harness.suite import HarnessSettings, LmEval
from cllm.evaluate.tasks.suite import AS_IS, slug


@pytest.mark.parametrize(
    "path",
    [
        "a #b",
        "a: b",
        "yes",
        "12",
        "2024-01-31",
        "*a",
        "a|b",
        "a=b",
        "'q'.jsonl",
        "~a",
        "null",
        "[a].jsonl",
        "{a}",
        "a]",
    ],
)
def test_a_path_is_taken_as_it_is(path: str) -> None:
    given = parse_choice(f"piqa:path={path},samples=3", suites()).given
    assert (given.path, given.samples) == (path, 3)


def test_a_path_with_a_comma_is_quoted() -> None:
    assert parse_choice("piqa:path='a, b',samples=3", suites()).given.path == "a, b"
    assert parse_choice('lm_eval:"a,b"|c', suites()).given.tasks == ["a,b", "c"]
    with pytest.raises(UserError, match=r'"b" is not of the form KEY=VALUE; .*a value with a comma needs quotes'):
        parse_choice("piqa:path=a,b", suites())


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("ruler:tasks=vt|cwe|vt", "tasks", ["vt", "cwe"]),
        ("ruler:tasks=[vt, vt]", "tasks", ["vt"]),
        ("ruler:length=4|8|4", "length", [4, 8]),
        ("ruler:squad=null", "squad", None),
        ("copying:distances=2|2", "distances", [2]),
        ("copying:distances=null", "distances", None),
        ("copying:distances=", "distances", None),
        ("mqar:pairs=[2, 4],samples=1", "pairs", [2, 4]),
        ("gsm8k:start=no", "start", False),
    ],
)
def test_lists_have_no_value_twice_and_other_values_are_yaml(text: str, key: str, value: object) -> None:
    assert getattr(parse_choice(text, suites()).given, key) == value


def test_texts_with_other_characters_have_files_of_their_own() -> None:
    texts = ["path=a/b", "path=a-b", "path=a b", "path=é", "path=è", "xkv:ratio=2", "vt@8"]
    names = [slug(text) for text in texts]
    assert len({*names}) == len(texts)
    assert names[-2:] == ["xkv-ratio=2", "vt-8"]
    assert not set("/ é@:") & set("".join(names))


def test_data_sets_whose_paths_look_alike_keep_their_results(evaluate, make_run, tmp_path, monkeypatch, capsys) -> None:
    run, _ = make_run("a", data={"seq_len": 32})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for path in ("a/b.txt", "a-b.txt"):
        Path(path).write_text("one two three " * (9 if "/" in path else 12))
    words = ("--suite", "wikitext:path=a/b.txt", "--suite", "wikitext:path=a-b.txt", "--device", "cpu")
    assert evaluate("--run", run.path, *words) == 0
    files = (run.path / "evaluation" / "wikitext").glob("*/wikitext.json")
    assert {json.loads(file.read_text())["settings"]["path"] for file in files} == {"a/b.txt", "a-b.txt"}


@pytest.mark.parametrize(("terms", "message"), [(["all"], "a task is called 'all'"), (["a b", "a:b", "a@b"], "'a:b'")])
def test_tasks_of_a_file_that_would_have_one_result_are_refused(
    evaluate, make_run, tmp_path, capsys, terms, message
) -> None:
    run, _ = make_run("a", data={"seq_len": 32})
    row = {"sentence_good": "a b", "sentence_bad": "b a", "UID": "x"}
    file = tmp_path / "blimp.jsonl"
    file.write_text("".join(json.dumps({**row, "linguistics_term": term, "UID": term}) + "\n" for term in terms))
    assert evaluate("--run", run.path, "--suite", f"blimp:path={file}", "--device", "cpu") == 2
    assert message in capsys.readouterr().err


def test_lm_eval_results_with_other_options_have_other_files(tmp_path) -> None:
    suite, paths = LmEval(), set()
    subject = SimpleNamespace(results=lambda out: out, latest=True)
    variants: list[dict[str, Any]] = [
        {},
        {"start": False},
        {"seed": 2},
        {"include_path": "a/b"},
        {"include_path": "a-b"},
        {"limit": 3},
    ]
    for options in variants:
        settings = HarnessSettings(tasks=["t"], **options).model_dump(mode="json")
        record = {"task": "t", "spec": AS_IS, "settings": settings}
        paths.add(suite.save(subject, record, tmp_path))
    assert len(paths) == 6
    assert tmp_path / "lm_eval" / "t.json" in paths
    assert tmp_path / "lm_eval" / "t-limit=3.json" in paths


def test_the_longest_options_make_names_that_file_systems_take(tmp_path) -> None:
    names = {slug("path=" + "a" * 300 + end) for end in "bc"}
    assert len(names) == 2
    for name in names:
        (tmp_path / f"{name}.json").write_text("{}")

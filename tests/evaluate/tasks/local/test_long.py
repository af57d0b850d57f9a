"""LongBench and code completion: metrics, prompts, the cut in the middle, tasks from source code, compressed MLA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import UserError
from cllm.evaluate.tasks.code.edit import completed_line, edit_similarity, ratio
from cllm.evaluate.tasks.code.snippets import next_lines, read_sources, snippets
from cllm.evaluate.tasks.code.suite import CodeCompletion, CodeSettings
from cllm.evaluate.tasks.longbench import metrics
from cllm.evaluate.tasks.longbench.prompt import middle_cut
from cllm.evaluate.tasks.longbench.suite import LongBench, LongBenchSettings
from cllm.evaluate.tasks.longbench.table import TASKS
from cllm.evaluate.tasks.text import decode

CODE = "Please complete the code given below. \n"


def row(name: str, **fields: Any) -> dict[str, Any]:
    common = {"length": 9, "dataset": name, "language": "en", "all_classes": None, "_id": "0"}
    return {"input": "", "context": "def f():\n", "answers": ["    return 1"], **common, **fields}


# ---- metrics


def test_the_edit_similarity_is_that_of_matching_blocks() -> None:
    # Matching blocks "ab" and "d" of 4 and 5 characters: 100 x 2 x 3 / 9. The longest common subsequence of the last
    # pair, "abx", has one character more than its blocks "a" and "x": rapidfuzz's ratio is 60.
    assert ratio("abcd", "abxyd") == 67
    assert (ratio("abab", "baba"), ratio("axbxc", "xabcx")) == (75, 40)
    assert (ratio("x", "x"), ratio("x", "y"), ratio("", "y")) == (100, 0, 0)
    assert completed_line("\n\n# a comment\nx = 1 // why\nreturn `a`\n  y = 2\nz") == "  y = 2"
    assert completed_line("# only\n// comments") == ""
    assert completed_line("   \nx = 1") == "   ", "a line of spaces is a line"
    assert edit_similarity("# no\n  y = 2\n", ["x", "  y = 2"]) == 1
    assert edit_similarity("# no", ["# no"]) == 0


@pytest.mark.parametrize(
    ("metric", "text", "reference", "classes", "score"),
    [
        (metrics.f1, "The red, red cat!", "a red cat", (), 2 * 2 / (3 + 2)),
        (metrics.f1, "dog", "cat", (), 0),
        (metrics.rouge_l, "the cat sat on it", "the cat on the mat", (), 2 * 3 / (5 + 5)),
        (metrics.count, "There are 3, no 4 or 3 of 10", "3", (), 2 / 4),
        (metrics.count, "three", "3", (), 0),
        (metrics.retrieval, "Paragraph 12, or 3", "Paragraph 12", (), 1 / 2),
        (metrics.retrieval, "Paragraph 1", "Paragraph 12", (), 0),
        (metrics.classification, "City or Country", "City", ("City", "Country", "State"), 1 / 2),
        (metrics.classification, "Other city", "Other city", ("city", "Other city"), 1),
        (metrics.classification, "Country", "City", ("City", "Country"), 0),
        (metrics.code, "\nx = 1\ny", "x = 1", (), 1),
    ],
)
def test_metrics(metric, text, reference, classes, score) -> None:
    if metric is metrics.rouge_l:
        pytest.importorskip("rouge_score")
    assert metric(text, reference, classes) == pytest.approx(score)


def test_tasks_take_the_best_reference_and_some_only_the_first_line() -> None:
    assert TASKS["hotpotqa"].score("red\ncat", ["dog", "red cat"], ()) == 1
    assert TASKS["triviaqa"].score("\nred\ncat", ["red"], ()) == 1
    assert TASKS["qasper"].score("red\ncat", ["red"], ()) == pytest.approx(2 / 3)


# ---- prompts


def test_long_prompts_lose_their_middle() -> None:
    context, prompt = tuple(range(10)), tuple(range(10, 14))
    assert middle_cut(context, prompt, 14) == (context, prompt)
    assert middle_cut(context, prompt, 10) == ((0, 1, 2, 3, 4, 9), prompt)
    assert middle_cut(context, prompt, 6) == ((0, 1, 2), (11, 12, 13)), "the prompt is longer than the last half"
    assert middle_cut(context, (), 4) == ((0, 1, 8), (9,)), "a token is read after the context"


def test_longbench_files_become_samples(subject, write_lines, tmp_path, make_answer) -> None:
    write_lines("bench/lcc.jsonl", [row("lcc", context=f"x = {n}\n", answers=["y = x", "z"]) for n in range(4)])
    write_lines("bench/repobench-p_e.jsonl", [row("repobench-p_e", input="import a\n" * 60)])
    write_lines("bench/trec.jsonl", [row("trec", input="Q: b\nType:", all_classes=["A", "B"], answers=["A"])])
    write_lines("bench/dureader.jsonl", [row("dureader")])
    suite = LongBench()
    given = LongBenchSettings(path=str(tmp_path / "bench"), samples=3)
    samples = suite.samples(subject, given)
    assert [sample.task for sample in samples] == ["trec", "lcc", "lcc", "lcc", "repobench-p"], "no Chinese ones"
    lcc, repo = samples[1], samples[-1]
    (question,) = lcc.questions
    assert decode(subject, lcc.context).startswith(f"{CODE}x = ")
    assert (decode(subject, question.prompt), decode(subject, question.options[0])) == ("Next line of code:\n", "y = x")
    assert (question.generate, question.references) == (64, ("y = x", "z"))
    assert decode(subject, repo.context).startswith(CODE[:20])
    assert decode(subject, repo.questions[0].prompt).endswith("import a\nNext line of code:\n")
    assert subject.context - 3 <= repo.longest <= subject.context, "its middle is cut out"
    score = suite.score(samples[0], samples[0].questions[0], make_answer(1.0, text=" A\nB"))
    assert score == {"score": 1, "bits_per_byte": pytest.approx(1 / math.log(2))}

    prompts = {"trec": "{input} <- {context} ->", "lsht": "x"}
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    (tmp_path / "lengths.json").write_text('{"trec": 7}')
    files = {"prompts": str(tmp_path / "prompts.json"), "lengths": str(tmp_path / "lengths.json")}
    (own,) = suite.samples(subject, given.model_copy(update={**files, "tasks": ["trec"]}))
    assert decode(subject, own.context) == "Q: b\nType: <- def f():\n"
    assert (decode(subject, own.questions[0].prompt), own.questions[0].generate) == (" ->", 7)


def test_mistakes_in_longbench_files_are_named(subject, write_lines, tmp_path) -> None:
    file = write_lines("lcc.jsonl", [row("lcc"), {k: v for k, v in row("lcc").items() if k != "answers"}])
    chinese = write_lines("vcsum.jsonl", [row("vcsum")])
    (tmp_path / "bad.json").write_text('{"lcc": "no place"}')
    (tmp_path / "empty").mkdir()
    for options, message in (
        ({}, "--suite longbench: needs path=FOLDER"),
        ({"path": str(file)}, "lcc.jsonl line 2: has no field `answers`"),
        ({"path": str(file), "tasks": ["lccc"]}, "tasks=lccc: not an English task"),
        ({"path": str(file), "tasks": ["trec"]}, "lcc.jsonl: has no rows of tasks=trec"),
        ({"path": str(tmp_path), "tasks": ["trec"]}, "has no file such as trec.jsonl"),
        ({"path": str(chinese)}, "has no rows of an English task"),
        ({"path": str(tmp_path / "empty")}, "has no file such as narrativeqa.jsonl"),
        ({"path": str(file), "prompts": str(tmp_path / "bad.json")}, "bad.json: lcc: has {context} 0 times"),
        ({"path": str(file), "length": 10000}, "length=10000; allowed: up to the context of long, 384"),
        ({"path": str(file), "length": 64}, "lcc: an answer has up to 64 tokens, and length=64 leaves 0"),
    ):
        with pytest.raises(UserError, match=message):
            LongBench().samples(subject, LongBenchSettings(**options))


# ---- code


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of four files, in which `main.py` uses what `tools.py` and `deep/shapes.py` define."""
    files = {
        "tools.py": "LIMIT_OF_ROWS = 3\n\ndef read_table(path):\n    return open(path)\n\ndef shared():\n    pass\n",
        "other.py": "def shared():\n    pass\n\n\nclass Unused:\n    pass\n",
        "deep/shapes.py": "\ufeffclass Circle:\n    def area_of(self):\n        return 3\n",
        "main.py": (
            "from tools import read_table, LIMIT_OF_ROWS\n\n\ndef local_one():\n    # read_table in a comment\n"
            "    shared()\n    rows = read_table('x.csv')\n"
            "    more = read_table('y.csv')\n    size = Circle().area_of()\n"
            "    return local_one, LIMIT_OF_ROWS\n"
        ),
        ".hidden/tools.py": "def read_table():\n    pass\n",
    }
    for name, text in files.items():
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "src"


def test_lines_that_first_use_what_one_other_file_defines(source) -> None:
    sources = read_sources(source)
    assert [file.path for file in sources] == ["main.py", "other.py", "tools.py", "deep/shapes.py"]
    lines = next_lines(sources, 0, seed=0)
    assert [(line.line, line.name, line.definition.path) for line in lines] == [
        (7, "read_table", "tools.py"),
        (9, "Circle", "deep/shapes.py"),
    ]
    assert lines[0].answer == "    rows = read_table('x.csv')"
    assert lines[0].before.endswith("shared()\n")
    assert lines[0].before + lines[0].answer in lines[0].file.text
    shown = snippets(lines[0], sources, 1000, seed=0)
    assert shown[-1].path == "tools.py"
    assert {file.path for file in shown} == {"tools.py", "other.py", "deep/shapes.py"}
    cut = snippets(lines[0], sources, 40, seed=0)[-1]
    assert cut.text == "def read_table(path):\n    return open(path"[:40], "a long file begins at the definition"
    for folder, message in ((source / "no", "no such folder"), (source / "deep", "has 1 source files")):
        with pytest.raises(UserError, match=message):
            read_sources(folder)


def test_a_line_follows_its_file_and_the_definition_stays_in_the_context(source, subject) -> None:
    suite = CodeCompletion()
    samples = suite.samples(subject, CodeSettings(folder=str(source), length=200, generate=8))
    first = samples[0]
    (question,) = first.questions
    assert first.longest <= 200
    assert decode(subject, question.prompt).endswith("# read_table in a comment\n    shared()\n")
    assert "def read_table(path):" in decode(subject, first.context)
    assert decode(subject, question.options[0]) == "    rows = read_table('x.csv')"
    assert suite.samples(subject, CodeSettings(folder=str(source), length=200, generate=8)) == samples
    (source / "tools.py").write_text((source / "tools.py").read_text() + "# the rest of a long file\n" * 50)
    (long, _) = suite.samples(subject, CodeSettings(folder=str(source), length=200, generate=8))
    assert "def read_table(path):" in decode(subject, long.context), "not only the end of the file"
    for options in ({}, {"path": "a", "folder": "b"}):
        with pytest.raises(UserError, match=r"needs path=FILE .* or folder=DIR"):
            suite.samples(subject, CodeSettings(**options))


def test_code_is_completed_from_compressed_latents(evaluate, long_run, source, write_lines, tmp_path) -> None:
    latents = {"preset": "mla", "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    run = long_run(kv=latents)
    lcc = write_lines("lcc.jsonl", [row("lcc", context="x = call(y)\n" * n, answers=["z = x"]) for n in (20, 25)])
    words = ("--run", run, "--device", "cpu", "--out", tmp_path / "out")
    specs = ("--posthoc", "none", "--posthoc", "xkv:group=2,ratio=2")
    suites = (f"code:path={lcc},generate=4", f"code:folder={source},generate=4,length=256")
    assert evaluate(*words, "--suite", suites[0], "--suite", suites[1], *specs) == 0
    assert evaluate(*words, "--suite", suites[0]) == 0
    found = {str(file.relative_to(tmp_path / "out" / "code")): json.loads(file.read_text())
             for file in (tmp_path / "out").rglob("*.json")}  # fmt: skip
    plain = next(r for name, r in found.items() if name.endswith("lcc.json") and r["spec"] == "as it is")
    none, xkv = (next(r for n, r in found.items() if n.endswith("lcc.json") and r["spec"] == s) for s in specs[1::2])
    for key in ("edit_similarity", "exact_match", "bits_per_byte"):
        assert none[key] == plain[key]
    assert xkv["bits_per_byte"] != none["bits_per_byte"]
    assert xkv["ratio_to_own"] == pytest.approx(2, abs=0.3)
    assert any(record["task"] == "folder" and record["questions"] == 2 for record in found.values())

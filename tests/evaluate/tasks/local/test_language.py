"""Language data sets: public formats, prompts, few shots, scores, and errors that name file, line and field."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm.errors import UserError
from cllm.evaluate.tasks.language import scores
from cllm.evaluate.tasks.language.example import draw
from cllm.evaluate.tasks.language.rows import read_rows
from cllm.evaluate.tasks.language.suites import language_suites
from cllm.evaluate.tasks.text import decode

SUITES = {suite.name: suite for suite in language_suites()}
PIQA: list[dict[str, Any]] = [
    {"goal": f"To open jar {n}", "sol1": f"twist the lid {n}", "sol2": "eat the lid now", "label": n % 2}
    for n in range(9)
]
ARC_HUB = {"question": "What is hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"}
ARC_AI2 = {
    "question": {"stem": "What is hot?", "choices": [{"text": "ice", "label": "A"}, {"text": "fire", "label": "B"}]},
    "answerKey": "B",
}
ARC_PARTS = ("Question: What is hot?", "\nAnswer:", (" ice", " fire"), 1)
MMLU_ROW = ["What is 1 + 1?", "1", "2", "3", "4", "B"]
MMLU_HUB = {"question": MMLU_ROW[0], "subject": "hard_sums", "choices": MMLU_ROW[1:5], "answer": 1}
MMLU_PARTS = (
    "The following are multiple choice questions (with answers) about hard sums.\n\n"
    "What is 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4",
    "\nAnswer:",
    (" A", " B", " C", " D"),
    1,
)
HELLASWAG = {
    "activity_label": "Baking",
    "ctx_a": "A man [step] stirs.",
    "ctx_b": "he",
    "endings": ["adds  flour.", "flies [title] Away."],
    "label": "1",
}
GSM8K = {"question": "How many?", "answer": "2 * 3 = <<2*3=6>>1,006 eggs.\n#### 1,006"}
FORMATS: list[tuple[str, dict[str, Any], tuple[str, str, tuple[str, ...], int]]] = [
    ("piqa", PIQA[1], ("Question: To open jar 1", "\nAnswer:", (" twist the lid 1", " eat the lid now"), 1)),
    ("hellaswag", HELLASWAG, ("Baking: A man stirs.", " He", (" adds flour.", " flies. Away."), 1)),
    (
        "hellaswag",  # without the beginning of a sentence, a token of the first one is read after compression
        {**HELLASWAG, "ctx_b": ""},
        ("Baking: A man stirs", ".", (" adds flour.", " flies. Away."), 1),
    ),
    ("arc_easy", ARC_HUB, ARC_PARTS),
    ("arc_challenge", ARC_AI2, ARC_PARTS),
    ("mmlu", MMLU_HUB, MMLU_PARTS),
    ("gsm8k", GSM8K, ("Question: How many?", "\nAnswer:", (" 2 * 3 = 1,006 eggs.\n#### 1,006",), 0)),
    (
        "lambada",
        {"text": "Ann met Bob. \u201cHello!\u201d he said to Ann"},
        ("Ann met Bob. \u201cHello!\u201d", " he said to", (" Ann",), 0),
    ),
]


def settings(name: str, path: Path, **options: Any) -> Any:
    return SUITES[name].settings(path=str(path), **options)


@pytest.mark.parametrize(("name", "row", "parts"), FORMATS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_becomes_a_context_a_cue_and_options(name, row, parts, subject, write_lines) -> None:
    (sample,) = SUITES[name].samples(subject, settings(name, write_lines("rows.jsonl", [row])))
    (question,) = sample.questions
    assert sample.context[0] == subject.start_id
    found = (decode(subject, sample.context), decode(subject, question.prompt))
    assert (*found, tuple(decode(subject, option) for option in question.options), question.gold) == parts
    assert question.option_bytes == tuple(len(option.encode()) for option in parts[2])
    assert question.prompt, "the first token of an option is predicted after the context was compressed"


def test_mmlus_original_csv_has_no_header_and_its_subject_in_the_files_name(subject, tmp_path) -> None:
    for split, answer in (("test", "B"), ("dev", "C")):
        (tmp_path / split).mkdir()
        with (tmp_path / split / f"hard_sums_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerow([*MMLU_ROW[:-1], answer])
    (sample,) = SUITES["mmlu"].samples(subject, settings("mmlu", tmp_path / "test"))
    assert decode(subject, sample.context) == MMLU_PARTS[0]
    assert sample.questions[0].facts["subject"] == "hard_sums"
    (shown,) = SUITES["mmlu"].samples(
        subject, settings("mmlu", tmp_path / "test", shots=1, shots_path=str(tmp_path / "dev"))
    )
    header, question = MMLU_PARTS[0].split("\n\n")
    assert decode(subject, shown.context) == f"{header}\n\n{question}\nAnswer: C\n\n{question}"
    (text,) = SUITES["mmlu"].samples(subject, settings("mmlu", tmp_path / "test", letters=False))
    assert [decode(subject, option) for option in text.questions[0].options] == [" 1", " 2", " 3", " 4"]


def test_every_file_format_has_the_same_rows(write_lines, tmp_path) -> None:
    rows = [{"a": 'naïve, "x"\n', "n": "1"}, {"a": "日本", "n": "2"}]
    plain = write_lines("x.jsonl", rows)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    (tmp_path / "x.json").write_text(json.dumps(rows))
    for name, delimiter in (("x.csv", ","), ("x.tsv", "\t")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["a", "n"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 7
    for file in files:
        assert [row.values for row in read_rows(file)] == rows, file
    assert [row.number for row in read_rows(tmp_path / "x.csv")] == [2, 4], "the lines where rows begin"
    assert len(read_rows(tmp_path)) == 14, "all files of a folder"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c"}', "rows.jsonl line 3: has no field `label`; it has goal"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', "line 3: field `label` is 2; it must be 0 to"),
        ("piqa", '{"goal": 7, "sol1": "b", "sol2": "c", "label": 1}', "line 3: field `goal` is 7; it must be text"),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": " ", "label": 0}', "line 3: option 2 of 2 is empty; it must have"),
        ("hellaswag", json.dumps({**HELLASWAG, "endings": ["", "a"]}), "line 3: option 1 of 2 is empty"),
        ("blimp", '{"good": "a b", "bad": "", "uid": "x", "term": "y"}', "line 3: option 2 of 2 is empty"),
        ("piqa", "[1]", r"line 3: is \[1\]; it must be an object"),
        ("piqa", '{"goal": ', "line 3: not JSON"),
        ("hellaswag", json.dumps({**HELLASWAG, "label": ""}), "line 3: field `label` is \"\"; it must be 0 to 1"),
        ("hellaswag", json.dumps({**HELLASWAG, "endings": []}), "line 3: field `endings` is"),
        ("arc_easy", json.dumps({**ARC_HUB, "answerKey": "C"}), "field `answerKey` is \"C\"; it must be one of 1, 2"),
        ("blimp", '{"good": "a"}', "line 3: has no field `sentence_bad` or `bad`"),
        ("gsm8k", '{"question": "a", "answer": "6"}', "line 3: field `answer` has no number after ####"),
        ("hellaswag", '{"activity_label": "a", "ctx_a": "b", "ctx_b": "", "endings": ["c"], "label": 0}',
         "line 3: has 1 option; a choice needs 2 or more"),
        ("piqa", r'{"goal": "\ud83d", "sol1": "a", "sol2": "b", "label": 0}', "line 3: has half of a character"),
        ("lambada", '{"text": "word"}', "line 3: field `text` is a single word"),
    ],
)  # fmt: skip
def test_errors_name_the_file_the_line_and_the_field(name, text, message, subject, tmp_path) -> None:
    good = {"blimp": {"good": "a b", "bad": "b a", "uid": "x", "term": "y"}}
    first = good.get(name) or next(row for other, row, _ in FORMATS if other == name)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(first)}\n\n{text}\n")
    with pytest.raises(UserError, match=message):
        SUITES[name].samples(subject, settings(name, tmp_path / "rows.jsonl"))


def test_mistakes_in_settings_are_refused(subject, write_lines, tmp_path) -> None:
    file = write_lines("piqa.jsonl", PIQA[:2])
    for options, message in (
        ({"path": ""}, "--suite piqa: needs path=FILE"),
        ({"path": str(tmp_path / "no.jsonl")}, "no.jsonl: no such file"),
        ({"path": str(tmp_path / "piqa.txt")}, r"piqa.txt: unknown file type; allowed: .jsonl"),
        ({"path": str(file), "shots": 2}, "shots=2: .*piqa.jsonl has 2 examples"),
        ({"path": str(file), "shots_path": str(file)}, "shots_path needs shots=N"),
    ):
        (tmp_path / "piqa.txt").touch()
        with pytest.raises(UserError, match=message):
            SUITES["piqa"].samples(subject, SUITES["piqa"].settings(**options))


def test_shots_are_solved_questions_that_are_not_scored(subject, write_lines) -> None:
    file = write_lines("piqa.jsonl", PIQA)
    samples = SUITES["piqa"].samples(subject, settings("piqa", file, shots=2))
    contexts = [decode(subject, sample.context) for sample in samples]
    solved = {f"Question: {r['goal']}\nAnswer: {(r['sol1'], r['sol2'])[r['label']]}": r["goal"] for r in PIQA}
    shown = contexts[0].split("\n\n")[:-1]
    assert len(samples) == 7
    assert len(set(shown)) == 2
    assert all(context.split("\n\n")[:-1] == shown for context in contexts), "the same for every question"
    scored = {context.split("Question: ")[-1] for context in contexts}
    assert scored == {row["goal"] for row in PIQA} - {solved[shot] for shot in shown}
    assert SUITES["piqa"].samples(subject, settings("piqa", file, shots=2)) == samples
    assert SUITES["piqa"].samples(subject, settings("piqa", file, shots=2, seed=1)) != samples
    assert len(SUITES["piqa"].samples(subject, settings("piqa", file, shots=2, shots_path=str(file)))) == 9


def test_samples_are_drawn_evenly_from_the_groups() -> None:
    items = ["a"] * 50 + ["b"] * 50 + ["c"] * 2
    drawn = [items[i] for i in draw(items, 20, lambda item: item, seed=3)]
    assert (drawn.count("a"), drawn.count("b"), drawn.count("c")) == (9, 9, 2)
    assert draw(items, 20, lambda item: item, seed=3) == sorted(draw(items, 20, lambda item: item, seed=3))
    assert draw(items, 20, lambda item: item, seed=4) != draw(items, 20, lambda item: item, seed=3)
    assert draw(items, 0, lambda item: item, seed=3) == list(range(102))


def test_questions_beyond_the_context_are_left_out_only_if_asked(subject, write_lines, caplog) -> None:
    file = write_lines("piqa.jsonl", [*PIQA, {**PIQA[0], "goal": "very " * 400}])
    with pytest.raises(UserError, match=r"a sample of piqa has .* tokens; allowed: up to the context of long, 384"):
        SUITES["piqa"].prepared(subject, settings("piqa", file))
    assert len(SUITES["piqa"].samples(subject, settings("piqa", file, skip_long=True))) == 9
    assert "piqa: left out 1 of 10 questions" in caplog.text


def test_the_three_rules_of_a_choice_may_disagree() -> None:
    # nats 2, 3 and 4; characters 2, 4 and 6; bytes 2, 12 and 6
    found = [scores.choice((2, 3, 4), (2, 12, 6), (2, 4, 6), gold) for gold in range(3)]
    assert [n["accuracy"] for n in found] == [1, 0, 0]
    assert [n["accuracy_norm"] for n in found] == [0, 0, 1]
    assert [n["accuracy_bpb"] for n in found] == [0, 1, 0]
    assert found[1]["bits_per_byte"] == pytest.approx(3 / math.log(2) / 12)


def test_answers_of_gsm8k() -> None:
    assert scores.gsm8k_answer("#### 5\nso\n#### $1,234.") == "1234"
    assert scores.gsm8k_answer("the answer is 5") is None
    text = "3 + 4 = 7. The answer is 1,007.0"
    assert scores.exact_match(text, "1007") == {"exact_match": 0, "last_number": 1}
    assert scores.exact_match(f"{text}\n#### -7", "-7") == {"exact_match": 1, "last_number": 1}


def test_blimp_averages_sentences_alike_and_a_tie_is_wrong(subject, write_lines, make_answer) -> None:
    rows = [
        {"sentence_good": f"cats run {n}", "sentence_bad": f"cats runs {n}", "UID": uid, "linguistics_term": term}
        for uid, term in (("a", "x"), ("b", "x"), ("c", "y"))
        for n in range(4)
    ]
    suite = SUITES["blimp"]
    samples = suite.samples(subject, settings("blimp", write_lines("blimp.jsonl", rows), samples=6))
    assert [sample.questions[0].facts["paradigm"] for sample in samples] == ["a", "a", "b", "b", "c", "c"]
    assert all(sample.context == (subject.start_id,) for sample in samples)
    given = [[make_answer(1, right)] for right in (2, 2, 2, 1, 0.5, 0.5)]
    x, y, overall = suite.means(samples, given)
    assert (x["task"], y["task"], overall["task"]) == ("x", "y", "all")
    assert (x["accuracy"], y["accuracy"], overall["accuracy"]) == (75, 0, 50), "not the mean of 75 and 0"
    assert x["groups"]["paradigm"]["b"]["accuracy"] == 50
    shown = suite.samples(subject, settings("blimp", write_lines("blimp.jsonl", rows), shots=2, samples=1))
    assert decode(subject, shown[0].context).count("cats run ") == 2


def test_a_choice_is_scored_by_the_models_probabilities(
    evaluate, run_path, subject, log_probability, write_lines, tmp_path, capsys
) -> None:
    generator = random.Random(0)
    rows = [{**row, "sol1": "the " * generator.randint(1, 5) + row["sol1"]} for row in PIQA]
    suite, file = SUITES["piqa"], write_lines("piqa.jsonl", rows)
    spec = f"piqa:path={file},shots=1"
    assert evaluate("--run", run_path, "--suite", spec, "--device", "cpu", "--out", tmp_path / "as") == 0
    compressed = [word for m in ("none", "svd:ratio=4,sinks=0") for word in ("--posthoc", m)]
    assert evaluate("--run", run_path, "--suite", spec, "--device", "cpu", "--out", tmp_path / "p", *compressed) == 0
    found, none, svd = (
        json.loads(next(file for file in (tmp_path / folder).rglob("piqa.json") if where in str(file)).read_text())
        for folder, where in (("as", ""), ("p", "none"), ("p", "svd"))
    )
    expected = []
    for sample in suite.samples(subject, settings("piqa", file, shots=1)):
        (question,) = sample.questions
        nats = [-value for value in log_probability(sample, question)]
        lengths = [len(decode(subject, option)) - 1 for option in question.options]
        expected.append(scores.choice(nats, question.option_bytes, lengths, question.gold))
    for key, scale in (("accuracy", 100), ("accuracy_norm", 100), ("accuracy_bpb", 100), ("bits_per_byte", 1)):
        mean = scale * sum(numbers[key] for numbers in expected) / len(expected)
        assert found[key] == pytest.approx(mean, rel=1e-4), key
        assert none[key] == found[key], "none compresses nothing"
    assert svd["bits_per_byte"] != pytest.approx(found["bits_per_byte"], abs=1e-6), "the compressed context is read"
    capsys.readouterr()


def test_solutions_are_measured_and_generated(subject, write_lines, make_answer) -> None:
    suite, file = SUITES["gsm8k"], write_lines("gsm8k.jsonl", [GSM8K])
    (sample,) = suite.samples(subject, settings("gsm8k", file))
    assert sample.questions[0].generate == 0
    assert set(suite.score(sample, sample.questions[0], make_answer(1.0))) == {"bits_per_byte"}
    (sample,) = suite.samples(subject, settings("gsm8k", file, generate=64))
    numbers = suite.score(sample, sample.questions[0], make_answer(1.0, text=" It is 1006.\n#### 1006"))
    assert numbers["exact_match"] == 1
    assert numbers["bits_per_byte"] == pytest.approx(1 / math.log(2) / len(" 2 * 3 = 1,006 eggs.\n#### 1,006"))


def test_a_text_is_scored_once_and_in_bytes(subject, log_probability, make_answer, tmp_path) -> None:
    suite, file = SUITES["wikitext"], tmp_path / "wiki.txt"
    file.write_text(" \n = naïve 日本 = \n alpha <unk> beta one two three return x" * 5, encoding="utf-8")
    samples = suite.samples(subject, settings("wikitext", file, window=33))
    assert sum(sample.questions[0].option_bytes[0] for sample in samples) == len(file.read_bytes())
    scored = [token for sample in samples for token in sample.questions[0].options[0]]
    assert decode(subject, scored) == file.read_text(encoding="utf-8")
    assert max(sample.longest for sample in samples) == 32, "the last token of a window is not read"
    assert [len(sample.context) for sample in samples[:2]] == [1, 16]
    given = [[make_answer(-log_probability(s, q)[0]) for q in s.questions] for s in samples]
    (record, _) = suite.means(samples, given)
    nats = sum(answer.losses[0][0] for (answer,) in given)
    assert record["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(file.read_bytes()))

"""The suite `ruler`: its numbers for models that find everything, nothing, or guess; its settings and records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.evaluate.suites.choice import parse_choice
from cllm.evaluate.tasks.ruler.suite import Ruler, Settings, found
from cllm.evaluate.tasks.sample import Answer, Question, Sample

EASY = {"essays": "noise", "samples": 1, "length": [1200]}
ANSWERS = {
    r"magic \w+ for ([^?]*) mentioned in the provided text (?:is|are)": r"for {} is: (\S+)\.",
    r"variables have the value (\d+):": r"VAR (\w{{5}}) = ",
}
"""What stands before an answer in the prompt, and in the text."""


def retriever(subject: Any) -> Callable[[Sequence[int]], int]:
    """A model that reads the question, finds what it asks for in the text, and writes it."""
    tokenizer = subject.tokenizer.backend_tokenizer  # a decoder without checks, for speed

    def answer(text: str) -> tuple[str, int]:
        """The answer to the last question of the text, and where it begins; "" where no answer is due."""
        prompt, fact, match = max(
            ((m.end(), fact, m) for asked, fact in ANSWERS.items() for m in re.finditer(asked, text)),
            default=(0, "", None),
            key=lambda found: found[0],
        )
        if match is None:
            return "", 0
        if fact.startswith("VAR"):
            return " " + " ".join(re.findall(fact.format(), text)), prompt
        values = [v for key in re.split(", and |, ", match[1]) for v in re.findall(fact.format(re.escape(key)), text)]
        return " " + ", ".join(values[:-1]) + (", and " if values[1:] else "") + "".join(values[-1:]), prompt

    def next_token(ids: Sequence[int]) -> int:
        if not re.search("|".join(ANSWERS), tokenizer.decode(ids[-200:])):
            return 0  # no answer is due yet
        text = tokenizer.decode(ids)
        expected, begin = answer(text)
        tokens = tokenizer.encode(expected, add_special_tokens=False).ids
        done = next((n for n in range(len(tokens)) if tokenizer.decode(tokens[:n]) == text[begin:]), None)
        return subject.tokenizer.eos_token_id if done is None else tokens[done]

    return next_token


@pytest.fixture(scope="module")
def measured(subject: Any, planted: ModuleType, measure: Any) -> dict[str, Any]:
    """Records of the retriever: as it is; with an exact cache; with one that forgot the context."""
    tasks = ["niah_single_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery", "vt"]
    tokens = subject(planted.noise).tokenizer
    model = subject(retriever(type("Holder", (), {"tokenizer": tokens})), context=4096)
    given = EASY | {"tasks": tasks}
    return {"plain": measure(Ruler(), model, given), "specs": measure(Ruler(), model, given, ["none", "minicache"])}


def test_a_perfect_retriever_has_100_percent(measured: dict[str, Any]) -> None:
    for (task, _), record in measured["plain"].items():
        numbers = {key: record[key] for key in ("accuracy", "recall", "score")}
        assert numbers == dict.fromkeys(numbers, 100.0), task
        assert record["nats"] < 1e-3
        assert record["margin"] > 5
    assert len(measured["plain"]) == 6


def test_an_exact_cache_changes_nothing_and_a_forgotten_context_costs_everything(measured: dict[str, Any]) -> None:
    for (task, spec), record in measured["specs"].items():
        plain = measured["plain"][task, "as it is"]
        numbers = {key: record[key] for key in ("accuracy", "recall", "score", "nats", "margin")}
        if spec == "none":
            assert numbers == {key: plain[key] for key in numbers}
            assert record.get("groups") == plain.get("groups")
        else:
            assert (record["accuracy"], record["recall"], record["score"]) == (0.0, 0.0, 0.0)
            assert record["nats"] > 5
            assert record["margin"] < 1e-3


def test_a_model_that_guesses_ranks_at_chance(subject: Any, measure: Any, random_model: Any) -> None:
    shape = {"d_model": 16, "n_layers": 1, "n_heads": 1, "head_dim": 8, "d_ff": 16, "max_seq_len": 2048}
    guessing = subject(random_model(ModelConfig(vocab_size=300, **shape)).eval(), context=2048)
    given = EASY | {"length": [600], "samples": 60, "generate": False, "tasks": ["niah_single_1", "niah_multikey_2"]}
    records = measure(Ruler(), guessing, given)
    for record in records.values():
        assert 8 < record["accuracy"] < 42, "25 percent, with 60 questions"
        assert record["recall"] == 0.0
        assert abs(record["margin"]) < 4 * record["margin_stderr"]
        assert "score" not in record


def test_a_decoder_with_an_induction_head_ranks_at_chance_once_its_cache_is_of_rank_one(subject, planted, measure):
    """The digits of the needle follow each other nowhere else in the text, so the head prefers it to other numbers."""
    model = subject(planted.induction_decoder(300, max_seq_len=1024), context=1024)
    given = EASY | {"length": [500], "samples": 24, "generate": False, "tasks": ["niah_single_1"]}
    specs = ["none", "svd:rank_k=1,rank_v=1", "xkv:group=2,rank_k=1,rank_v=1"]
    records = measure(Ruler(), model, given, specs)
    exact, *compressed = (records["niah_single_1", spec] for spec in specs)
    assert exact["accuracy"] == 100.0
    for record in compressed:
        assert record["accuracy"] < 25 + 3 * 100 * (0.25 * 0.75 / 24) ** 0.5
        assert record["margin"] < exact["margin"] / 10


# ---- numbers of one question -----------------------------------------------------------------------------------------


def scored(
    task: str, losses: Sequence[Sequence[float]], text: str = "", *references: str, hit: bool = True
) -> dict[str, float]:
    question = Question(references=references or ("a",), generate=1, options=((0,),) * len(losses))
    answer = Answer(losses=tuple(map(tuple, losses)), top1=tuple((hit,) * len(option) for option in losses), text=text)
    return Ruler().score(Sample(task=task, context=(), questions=(question,)), question, answer)


def test_the_answer_has_to_be_more_likely_than_every_wrong_one() -> None:
    numbers = scored("niah_single_1", [[1.0, 2.0], [3.5], [4.0]], "It is A.")
    assert numbers == {"nats": 1.5, "accuracy": 1.0, "margin": 0.75, "recall": 1.0, "score": 1.0}
    assert scored("niah_single_1", [[1.0, 2.0], [3.0], [4.0]])["accuracy"] == 0.0, "a tie"
    assert scored("niah_single_1", [[1.0, 2.0], [9.0], [2.0]])["accuracy"] == 0.0
    assert scored("niah_single_1", [[1.0], [2.0]], hit=False)["recall"] == 0.0
    # Of several items the first one is ranked, and the list is read.
    numbers = scored("vt@512", [[1.0, 1.0, 4.0], [1.0], [1.5]], "b", "a", "b", "c")
    assert numbers == {"nats": 2.0, "accuracy": 1.0, "margin": 0.5, "recall": 1.0, "score": pytest.approx(1 / 3)}
    # Several references of a question are other spellings, and one is enough.
    numbers = scored("qa_1", [[1.0, 1.0], [1.5]], "b", "a", "b", "c")
    assert numbers == {"nats": 1.0, "accuracy": 0.0, "margin": -0.5, "recall": 1.0, "score": 1.0}
    assert "recall" not in scored("cwe", [[1.0], [1.0], [2.0]], "", "a", "b"), "its answers have no order"


def test_references_are_found_as_the_paper_finds_them() -> None:
    assert found("The Magic numbers are 12, 3.", ["12", "4"]) == 0.5
    assert found("they are: ABCDE fghij", ["abcde", "FGHIJ"]) == 1.0
    assert found("", ["1"]) == found("", ["1"], one_is_enough=True) == 0.0
    assert found("no", ["yes", "No"], one_is_enough=True) == 1.0
    assert found("one\0two", ["one\ntwo"]) == 1.0


# ---- settings and records --------------------------------------------------------------------------------------------


def test_records_have_depths_lengths_and_the_source_of_the_essays(subject: Any, planted: Any, measure: Any) -> None:
    given = EASY | {"tasks": ["niah_single_2", "fwe"], "length": [900, 1100], "samples": 3, "generate": False}
    records = measure(Ruler(), subject(planted.noise, context=2048), given)
    assert [task for task, _ in records] == ["niah_single_2@900", "niah_single_2@1100", "fwe@900", "fwe@1100", "all"]
    assert [record.get("essays") for record in records.values()] == ["noise", "noise", None, None, "noise"]
    first = records["niah_single_2@900", "as it is"]
    assert first["groups"]["length"]["900"]["questions"] == 3
    depths = first["groups"]["depth"]
    assert sum(group["questions"] for group in depths.values()) == 3
    assert {int(depth) for depth in depths} <= {*range(0, 101, 10)}


def test_contexts_have_few_lengths_and_lose_no_token(subject: Any, planted: Any, monkeypatch: Any) -> None:
    model = subject(planted.noise, context=2048)
    tasks = ["niah_multikey_1", "vt"]
    settings = Ruler.settings(**EASY | {"length": [1600], "samples": 12, "tasks": tasks})
    cut = Ruler().samples(model, settings)
    monkeypatch.setattr("cllm.evaluate.tasks.ruler.suite._STEPS_OF_CONTEXT", 1600)
    whole = Ruler().samples(model, settings)
    for task in tasks:
        lengths = {len(sample.context) for sample in cut if sample.task == task}
        assert len(lengths) <= len({len(sample.context) for sample in whole if sample.task == task})
        assert all(length % 50 == 0 for length in lengths)
    assert len({len(sample.context) for sample in whole}) > len({len(sample.context) for sample in cut})
    for one, other in zip(cut, whole, strict=True):
        assert one.context + one.questions[0].prompt == other.context + other.questions[0].prompt
        assert 0 <= len(other.context) - len(one.context) < 50


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("tasks=niah", "tasks: unknown task 'niah'"),
        ("tasks=vt|qa_1", "qa_1 needs squad=FILE, a local copy of its data set"),
        ("length=4096", r"length=4096; allowed: 1 to 512, the context of planted"),
        ("length=0", "length=0; allowed: 1 to 512"),
        ("essays=nowhere", "essays=nowhere: no such folder"),
        ("chat=true", "chat=true: the tokenizer of planted has no chat template"),
        ("tasks=cwe", r"cwe needs at least length=\d+ with this tokenizer, and the context of planted is 512; name"),
        ("tasks=niah_single_1,length=60,essays=noise", r"niah_single_1 needs .* length=60 is asked for; take a larger"),
        (
            "length=50,essays=noise",
            r"no task fits: \w+ needs the least, length=\d+ with .*; the context of planted is 512; generate=false",
        ),
        ("length=50,essays=noise,generate=false", r"no task fits: [a-z0-9_]+ needs .*; the context of planted is 512$"),
        ("squad=nowhere.json", "squad=nowhere.json: cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(
    subject: Any, planted: Any, options: str, problem: str
) -> None:
    settings = parse_choice(f"ruler:{options}", {"ruler": Ruler()}).given
    assert isinstance(settings, Settings)
    with pytest.raises(UserError, match=f"^--suite ruler: {problem}"):
        Ruler().samples(subject(planted.noise, context=512), settings)


def test_all_leaves_out_tasks_that_do_not_fit(subject: Any, planted: Any, caplog: pytest.LogCaptureFixture) -> None:
    samples = Ruler().samples(subject(planted.noise, context=750), Settings(essays="noise", samples=2))
    assert {sample.task for sample in samples} >= {"niah_single_1", "fwe"}
    assert "cwe" not in {sample.task for sample in samples}
    assert re.search(r"as they need more than the context of planted, 750: .*cwe \(length=\d+\)", caplog.text)
    Ruler().samples(subject(planted.noise, context=4096), Settings(essays="noise", samples=1, length=[750]))
    assert re.search(r"as they need a larger length with this tokenizer: .*cwe \(length=\d+\)", caplog.text)
    assert max(sample.longest for sample in samples) <= 750
    assert samples == Ruler().samples(subject(planted.noise, context=750), Settings(essays="noise", samples=2))
    other = Ruler().samples(subject(planted.noise, context=750), Settings(essays="noise", samples=2, seed=1))
    assert not {sample.context for sample in samples} & {sample.context for sample in other}


def test_without_generation_a_short_context_needs_no_room_for_it(subject: Any, planted: Any) -> None:
    model = subject(planted.noise, context=700)
    given = Settings(essays="noise", samples=1, tasks=["niah_single_1"], length=[700], generate=False)
    assert Ruler().samples(model, given) == [
        replace(sample, questions=tuple(replace(q, generate=0) for q in sample.questions))
        for sample in Ruler().samples(model, given.model_copy(update={"generate": True}))
    ], "the samples are the same where they fit"
    with pytest.raises(UserError, match="needs at least length=") as needed:
        Ruler().samples(model, given.model_copy(update={"length": [60], "generate": True}))
    (least,) = map(int, re.findall(r"at least length=(\d+)", str(needed.value)))
    short = [least - 100]  # of 128 tokens to generate
    (sample,) = Ruler().samples(model, given.model_copy(update={"length": short}))
    assert sample.longest <= short[0]


def test_questions_of_a_local_file_are_asked(subject: Any, planted: Any, tmp_path: Path) -> None:
    asked = [{"question": f"Who {i}?", "answers": [{"text": f"he {i}"}]} for i in range(3)]
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "A text.", "qas": asked}]}]}))
    settings = Settings(squad=str(file), tasks=["qa_1"], length=[700], samples=20)
    samples = Ruler().samples(subject(planted.noise, context=700), settings)
    assert [sample.questions[0].references for sample in samples] == [("he 0",), ("he 1",), ("he 2",)]

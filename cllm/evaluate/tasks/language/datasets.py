"""The table of data sets: their fields, prompts, options and answers.

An entry turns a row of the public file into an `Example`. Field names are those of the original release and of the
copy on the Hugging Face Hub. Prompts are those of lm-evaluation-harness, so that numbers compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from cllm.evaluate.tasks.language.example import LETTERS, Example
from cllm.evaluate.tasks.language.rows import Row
from cllm.evaluate.tasks.language.scores import gsm8k_answer, without_calculator

_SENTENCE_END = re.compile(r"[.!?…]['\"’”`]*\s+")
_SPLIT_NAMES = ("_test", "_val", "_dev")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """A data set of questions in a local file."""

    name: str
    """As in `--suite NAME:path=FILE`."""
    help: str
    """One line for `--help`."""
    example: Callable[[Row], Example]
    main: str
    """The number that comparisons show."""
    score: str = "choice"
    """How an answer is scored: `choice`, `pair`, `word` or `solution`."""
    samples: int = 0
    """Questions that are scored by default; 0: all."""
    separator: str = "\n\n"
    """Between few-shot examples."""
    header: Callable[[str], str] = lambda group: ""
    """The text before a group's questions."""
    columns: Sequence[str] | None = None
    """Names of the columns of a CSV file without a header."""
    letters: bool | None = None
    """Whether options are listed in the question and answered by their letter; None: the data set has no such form."""
    groups: tuple[str, ...] = ()
    """Facts of questions by whose values records have means."""
    shot: Callable[[Example], Example] = lambda example: example
    """The example as it is shown solved."""


def _blimp(row: Row) -> Example:
    good, bad = row.text("sentence_good", "good"), row.text("sentence_bad", "bad")
    paradigm = row.text("UID", "uid")
    term = row.text("linguistics_term", "term")
    return Example(options=(good, bad), group=paradigm, task=term, facts={"paradigm": paradigm})


def _piqa(row: Row) -> Example:
    options = (f" {row.text('sol1')}", f" {row.text('sol2')}")
    return Example(
        context=f"Question: {row.text('goal')}", cue="\nAnswer:", options=options, gold=row.index("label", 2)
    )


def _without_brackets(text: str) -> str:
    """A text of HellaSwag without the marks of WikiHow, such as `[header]`; `[title]` ends a sentence."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _hellaswag(row: Row) -> Example:
    start = f"{row.text('activity_label')}: {row.text('ctx_a')}"
    text = _without_brackets(f"{start} {row.text('ctx_b').capitalize()}")
    # The beginning of the sentence that the options end is the cue.
    head = _without_brackets(start)
    head = head if text.startswith(head) else text
    options = tuple(f" {_without_brackets(ending)}" for ending in row.texts("endings"))
    return Example(context=head, cue=text[len(head) :], options=options, gold=row.index("label", len(options)))


def _arc(row: Row) -> Example:
    labels = row.texts("choices.label", "question.choices.label")
    options = tuple(f" {text}" for text in row.texts("choices.text", "question.choices.text"))
    if len(labels) != len(options):
        raise row.error(f"has {len(options)} options and {len(labels)} labels; it must have a label for each option")
    return Example(
        context=f"Question: {row.text('question.stem', 'question')}",
        cue="\nAnswer:",
        options=options,
        gold=row.label("answerKey", labels),
    )


def _mmlu(row: Row) -> Example:
    texts = row.texts("choices") if row.has("choices") else tuple(row.text(letter) for letter in "ABCD")
    letter = row.value("answer") in tuple(LETTERS[: len(texts)])
    gold = row.label("answer", LETTERS[: len(texts)]) if letter else row.index("answer", len(texts))
    subject = row.text("subject") if row.has("subject") else _subject(row)
    return Example(
        context=row.text("question").strip(),
        cue="\nAnswer:",
        options=tuple(f" {text}" for text in texts),
        gold=gold,
        group=subject,
        facts={"subject": subject},
    )


def _subject(row: Row) -> str:
    """The subject from the name of a file such as `abstract_algebra_test.csv`."""
    name = row.file.name.partition(".")[0]
    return next((name.removesuffix(split) for split in _SPLIT_NAMES if name.endswith(split)), name)


def _mmlu_header(subject: str) -> str:
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def _gsm8k(row: Row) -> Example:
    solution = without_calculator(row.text("answer"))
    answer = gsm8k_answer(solution)
    if answer is None:
        raise row.error("field `answer` has no number after ####")
    return Example(
        context=f"Question: {row.text('question')}", cue="\nAnswer:", options=(f" {solution}",), references=(answer,)
    )


def _lambada(row: Row) -> Example:
    text = row.text("text").strip()
    passage, space, word = text.rpartition(" ")
    if not space:
        raise row.error("field `text` is a single word; it must be a passage that ends in the word to predict")
    # The last sentence alone does not determine its last word: it is the cue, and the passage before it the context.
    ends = [match.end() for match in _SENTENCE_END.finditer(passage)]
    start = len(passage[: ends[-1]].rstrip()) if ends else 0
    return Example(context=passage[:start], cue=passage[start:], options=(f" {word}",))


def _spaced(example: Example) -> Example:
    """The first option alone: few shots of pairs are good sentences."""
    return replace(example, options=example.options[:1], gold=0)


DATASETS: tuple[DataSet, ...] = (
    DataSet(
        name="blimp",
        help="minimal pairs of English grammar, 67 paradigms; sums of log-probability (BLiMP)",
        example=_blimp,
        main="accuracy",
        score="pair",
        samples=6700,
        separator=" ",
        groups=("paradigm",),
        shot=_spaced,
    ),
    DataSet(
        name="piqa",
        help="physical common sense, 2 options (PIQA)",
        example=_piqa,
        main="accuracy_norm",
    ),
    DataSet(
        name="hellaswag",
        help="the sentence that follows, 4 options (HellaSwag)",
        example=_hellaswag,
        main="accuracy_norm",
    ),
    DataSet(
        name="arc_easy",
        help="science questions of schools, easy set, mostly 4 options (ARC)",
        example=_arc,
        main="accuracy_norm",
        letters=False,
    ),
    DataSet(
        name="arc_challenge",
        help="science questions of schools, challenge set, mostly 4 options (ARC)",
        example=_arc,
        main="accuracy_norm",
        letters=False,
    ),
    DataSet(
        name="mmlu",
        help="exam questions on 57 subjects, 4 options (MMLU)",
        example=_mmlu,
        main="accuracy",
        header=_mmlu_header,
        columns=("question", "A", "B", "C", "D", "answer"),
        letters=True,
        groups=("subject",),
    ),
    DataSet(
        name="gsm8k",
        help="bits per byte of solutions to word problems; with generate=N also greedy exact match (GSM8K)",
        example=_gsm8k,
        main="bits_per_byte",
        score="solution",
    ),
    DataSet(
        name="lambada",
        help="the last word of a passage (LAMBADA)",
        example=_lambada,
        main="accuracy",
        score="word",
    ),
)
"""Every data set whose questions are rows of a file."""

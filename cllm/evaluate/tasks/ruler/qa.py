"""Questions about documents, from local copies of SQuAD and HotpotQA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cllm.errors import UserError
from cllm.evaluate.tasks.ruler.draft import SHORT, Draft, Task
from cllm.evaluate.tasks.ruler.prompts import DOCUMENT, DOCUMENTS
from cllm.files import shorten


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A question of a data set. Documents are indices."""

    query: str
    answers: tuple[str, ...]
    """Every accepted text."""
    documents: tuple[int, ...]
    """Always in the context."""
    related: tuple[int, ...] = ()
    """The first distractors: other paragraphs of the same article."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The documents of a data set, sorted and without duplicates, and its questions."""

    documents: tuple[str, ...]
    questions: tuple[Asked, ...]


class _Form(BaseModel):
    """A part of a data set's file; other keys are allowed."""

    model_config = ConfigDict(strict=True, extra="ignore")


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("must have text")
    return text


_Filled = Annotated[str, AfterValidator(_filled)]


class _Answer(_Form):
    text: _Filled


class _SquadQuestion(_Form):
    question: str
    answers: list[_Answer] = []
    is_impossible: bool = False


class _Paragraph(_Form):
    context: str
    qas: list[_SquadQuestion]


class _Article(_Form):
    paragraphs: list[_Paragraph]


class _Squad(_Form):
    data: list[_Article]


class _HotpotQuestion(_Form):
    question: str
    answer: _Filled
    context: list[tuple[str, list[str]]] = Field(min_length=1)


_SQUAD, _HOTPOTQA = TypeAdapter(_Squad), TypeAdapter(list[_HotpotQuestion])
T = TypeVar("T")


def _read(path: Path, key: str, form: TypeAdapter[T], name: str) -> T:
    """The content of a file. Raises `UserError`, naming the place in the file, if it has not the form."""
    path = path.expanduser()
    try:
        return form.validate_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--suite ruler: {key}={path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise UserError(f"--suite ruler: {key}={path}: cannot be read: {first['msg']}") from None
        place, value = ".".join(map(str, first["loc"])), shorten(repr(first["input"]), 60)
        wrong = f"{place}: " * bool(place) + first["msg"].removeprefix("Value error, ")
        raise UserError(f"--suite ruler: {key}={path}: has not the form of {name}: {wrong}, got {value}") from None


def _corpus(questions: list[tuple[str, list[str], list[str], list[str]]]) -> Corpus:
    """A corpus from (question, answers, its documents, related documents)."""
    documents = sorted({text for _, _, own, related in questions for text in (*own, *related)})
    index = {text: i for i, text in enumerate(documents)}
    asked = tuple(
        Asked(
            query=query.strip(),
            answers=tuple(dict.fromkeys(answers)),
            documents=tuple(dict.fromkeys(index[text] for text in own)),
            related=tuple(dict.fromkeys(index[text] for text in related if text not in own)),
        )
        for query, answers, own, related in questions
        if any(answers)
    )
    return Corpus(documents=tuple(documents), questions=asked)


def read_squad(path: Path) -> Corpus:
    """Read SQuAD v2 (`dev-v2.0.json`): the answerable questions, in the file's order.

    Raises:
        UserError: if the file is missing or has another form.
    """
    questions = []
    for article in _read(path, "squad", _SQUAD, "SQuAD v2").data:
        paragraphs = [paragraph.context for paragraph in article.paragraphs]
        for paragraph in article.paragraphs:
            for asked in paragraph.qas:
                if not asked.is_impossible:
                    answers = [answer.text for answer in asked.answers]
                    questions.append((asked.question, answers, [paragraph.context], paragraphs))
    return _checked(_corpus(questions), path, "squad")


def read_hotpotqa(path: Path) -> Corpus:
    """Read HotpotQA's distractor setting (`hotpot_dev_distractor_v1.json`), in the file's order.

    A document is its title, a newline and its sentences. A question has its 2 gold and 8 distracting documents.

    Raises:
        UserError: if the file is missing or has another form.
    """
    questions = []
    for asked in _read(path, "hotpotqa", _HOTPOTQA, "HotpotQA"):
        documents = [f"{title}\n{''.join(parts)}" for title, parts in asked.context]
        questions.append((asked.question, [asked.answer], documents, list[str]()))
    return _checked(_corpus(questions), path, "hotpotqa")


def _checked(corpus: Corpus, path: Path, key: str) -> Corpus:
    if not corpus.questions:
        raise UserError(f"--suite ruler: {key}={path}: has no question with an answer")
    return corpus


@dataclass(frozen=True, kw_only=True)
class Answering(Task):
    """Questions in the order of the file. Sizes are documents; a question's own documents are never left out."""

    generate = 32
    corpus: Corpus

    @property
    def samples(self) -> int:
        return len(self.corpus.questions)

    @property
    def step(self) -> int:
        return 1 if self.length < SHORT else 10

    @property
    def smallest(self) -> int:
        return self.step

    @property
    def largest(self) -> int:
        return len(self.corpus.documents)

    def draft(self, index: int, size: int) -> Draft:
        rng, asked = self.rng(index), self.corpus.questions[index]
        chosen = [*asked.documents]
        chosen += rng.sample(asked.related, max(0, min(size - len(chosen), len(asked.related))))
        if size > len(chosen):
            known = {*asked.documents, *asked.related}
            others = [i for i in range(len(self.corpus.documents)) if i not in known]
            chosen += rng.sample(others, min(size - len(chosen), len(others)))
        rng.shuffle(chosen)
        texts = (DOCUMENT.format(number=i, text=self.corpus.documents[j]) for i, j in enumerate(chosen, start=1))
        place = chosen.index(asked.documents[0])
        return Draft(
            context=DOCUMENTS.opening + "\n\n".join(texts),
            question=DOCUMENTS.question.format(query=asked.query),
            prefix=DOCUMENTS.prefix,
            references=asked.answers,
            items=(f" {asked.answers[0]}",),
            wrong=tuple(f" {text}" for text in self._wrong(index)),
            facts={"depth": round(100 * place / len(chosen))},
        )

    def _wrong(self, index: int) -> list[str]:
        """Answers of other questions, drawn at random."""
        asked, rng = self.corpus.questions[index], self.rng(f"{index}/wrong")
        accepted = {answer.lower() for answer in asked.answers}
        others = {other.answers[0] for other in self.corpus.questions if other.answers[0].lower() not in accepted}
        return rng.sample(sorted(others), min(self.distractors, len(others)))

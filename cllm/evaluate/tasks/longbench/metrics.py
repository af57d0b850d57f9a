"""LongBench's metrics (arXiv 2308.14508): the similarity (0 to 1) of a generated text and a reference."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from cllm.errors import UserError

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_NUMBER = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD compares answers."""
    return _ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The harmonic mean of precision and recall of the words."""
    found, expected = words(text), words(reference)
    common = sum((Counter(found) & Counter(expected)).values())
    return 2 * common / (len(found) + len(expected)) if common else 0.0


def rouge_l(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """ROUGE-L: the F1 of the longest common subsequence of words, by the package rouge-score.

    The benchmark uses the package `rouge`, which joins the subsequences of each sentence: its numbers differ a little.

    Raises:
        UserError: without rouge-score.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise UserError("summaries are scored by the package rouge-score: pip install rouge-score") from None
    return float(RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure)


def classification(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 / n if the text names the right class among n classes; classes inside of the right one's name do not count."""
    named = [name for name in classes if name in text and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def retrieval(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the text's numbers that are the reference's paragraph (`Paragraph 7`)."""
    paragraph = _PARAGRAPH.search(reference)
    return count(text, paragraph[1] if paragraph else reference)


def count(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the text's numbers that are the reference."""
    numbers = _NUMBER.findall(text)
    return numbers.count(reference.strip()) / len(numbers) if numbers else 0.0


def code(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line of code."""
    from cllm.evaluate.tasks.code.edit import edit_similarity

    return edit_similarity(text, [reference])

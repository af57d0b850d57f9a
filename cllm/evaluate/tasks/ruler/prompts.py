"""The benchmark's prompts.

They are part of the benchmark's definition: scores with other prompts cannot be compared with published ones.
Source: RULER, arXiv 2404.06654, appendix. One spelling error is corrected ("assgined"), and the space at the end of
the answer prefix of variable tracking belongs to the answer here.
"""

from __future__ import annotations

from dataclasses import dataclass

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""One line of the haystack without content: five sentences."""
NEEDLE = "One of the special magic {kind} for {key} is: {value}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The texts around a haystack. `{name}` is filled in by the task."""

    opening: str
    """Before the haystack."""
    question: str
    """After it."""
    prefix: str
    """The beginning of the answer, which the model continues."""


NEEDLES = Prompt(
    opening="Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    question="\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    prefix=" The special magic {kind} for {query} mentioned in the provided text are",
)
NEEDLE_ALONE = Prompt(
    opening="A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    question="\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    prefix=" The special magic {kind} for {query} mentioned in the provided text is",
)
"""With one key asked for that has one value; `kind` is then in the singular."""
TRACKING = Prompt(
    opening="Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
    question="\nQuestion: Find all variables that are assigned the value {value} in the text above.",
    prefix=" Answer: According to the chain(s) of variable assignment in the text above, {count} variables are "
    "assigned the value {value}, they are:",
)
COMMON_WORDS = Prompt(
    opening="Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    question="\nQuestion: What are the 10 most common words in the above list?",
    prefix=" Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT_WORDS = Prompt(
    opening="Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. ",
    question="\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
)
_ONLY_THE_ANSWER = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
DOCUMENTS = Prompt(
    opening=f"{_ONLY_THE_ANSWER}\n\nThe following are given documents.\n\n",
    question=f"\n\n{_ONLY_THE_ANSWER}\n\nQuestion: {{query}}",
    prefix=" Answer:",
)
DOCUMENT = "Document {number}:\n{text}"

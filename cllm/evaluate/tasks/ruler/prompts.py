"""The prompts.

Needles and the questions about them are RULER's (arXiv 2404.06654, appendix). Instructions, and the questions of the
other tasks, ask for the same in other words, so scores can be compared with each other and not with published ones.
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
    opening="The following text hides special magic {kind}. Remember them: a question about them comes at the end.\n",
    question="\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    prefix=" The special magic {kind} for {query} mentioned in the provided text are",
)
NEEDLE_ALONE = Prompt(
    opening="The following text hides a special magic {kind}. Remember it: a question about it comes at the end.\n",
    question="\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    prefix=" The special magic {kind} for {query} mentioned in the provided text is",
)
"""With one key asked for that has one value; `kind` is then in the singular."""
TRACKING = Prompt(
    opening="The following text hides assignments of variables. Keep track of the value of each variable.\n\n",
    question="\nQuestion: Which variables have the value {value}, directly or through another variable?",
    prefix=" Answer: In the text above, {count} variables have the value {value}:",
)
COMMON_WORDS = Prompt(
    opening="The following numbered list has some words more often than others. Remember the most common ones.\n",
    question="\nQuestion: Which 10 words are the most common in the list above?",
    prefix=" Answer: The 10 most common words in the list are:",
)
FREQUENT_WORDS = Prompt(
    opening="The following text consists of coded words. Count how often each of them occurs. ",
    question="\nQuestion: Which three coded words occur most often in the text above, not counting the dots?",
    prefix=" Answer: The three coded words that occur most often in the text are:",
)
_ONLY_THE_ANSWER = "Answer the question from the documents. Give the answer alone, without any other words."
DOCUMENTS = Prompt(
    opening=f"{_ONLY_THE_ANSWER}\n\nThese are the documents.\n\n",
    question=f"\n\n{_ONLY_THE_ANSWER}\n\nQuestion: {{query}}",
    prefix=" Answer:",
)
DOCUMENT = "Document {number}:\n{text}"

"""RULER (arXiv 2404.06654): 13 tasks whose contexts have a chosen length in the model's own tokens.

suite.py     the suite `ruler`: its options, samples and scores
tasks.py     the tasks by name, and what each one reads
draft.py     a sample as text, and the base of the tasks
needles.py   needles in noise, essays or other needles
tracking.py  chains of assignments
counting.py  common words of a list, frequent words of a text
qa.py        questions about documents, from local files
lengths.py   the size of a haystack that fills a context
encoding.py  drafts as token ids, with a start token or a chat template
essays.py    essays as a haystack, and the splitter of sentences
words.py     random words, numbers and identifiers
prompts.py   the benchmark's prompts

Imports tasks/ and what it may import; no torch.
"""

"""Suites of samples: a context that is read once, and questions on top of its cache, which may be compressed.

sample.py   `Sample`, `Question` and `Answer`: token ids in, losses and generated text out
suite.py    `TaskSuite`, the base: samples, scores of a question, means, records and tables
text.py     token ids of texts, cut into a context and what follows
batches.py  samples that are computed together
run.py      answers of a subject to samples, for each way to compress the contexts' caches
reading.py  questions of a batch read after their contexts: losses of options, greedy generation
caches.py   caches of contexts that many questions read
copying.py  copies of random tokens
mqar.py     multi-query associative recall
ruler/      needles, tracking, counting and questions in contexts of a chosen length
language/   language data sets from local files
longbench/  LongBench's English tasks
code/       the next line of code
harness/    tasks of lm-evaluation-harness

Imports evaluate/suites' base, data and section at the top of modules; torch, evaluate and posthoc while a suite runs.
"""

"""From a corpus to a prepared folder.

recipe.py     the settings: source, tokenizer, split, limits
mqar.py       documents of multi-query associative recall
formats.py    documents of one local file
sources.py    local files, the standard library and Hugging Face data sets as streams of documents
corpus.py     filtering documents and assigning them to splits
tokenizer.py  training, loading and saving the tokenizer
encode.py     documents to tokens on several processes
shards.py     writing tokens and indices, resumable
build.py      all steps in order; an interrupted preparation is resumed
report.py     the summary that the command prints

Imports the data package and the modules of the package's root. This file imports nothing, so tokenising processes start
quickly.
"""

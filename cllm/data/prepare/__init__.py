"""Turning a corpus into a prepared folder.

    recipe.py     what a recipe may say
    formats.py    documents out of one local file
    sources.py    local files, the standard library and the Hugging Face hub as streams of documents
    corpus.py     which documents are kept, and the split each belongs to
    tokenizer.py  training, loading and saving the tokenizer
    encode.py     documents to tokens on several processes
    shards.py     writing tokens and indices
    build.py      the whole of it, crash-safe
    report.py     the summary

Nothing is imported here, so that tokenising processes start quickly.
"""

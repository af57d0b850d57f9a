"""Prepared tokens on disk, and the batches of a training run.

prepare/       from a corpus to a prepared folder               (command line: data/prepare.py)
manifest.py    the record of a prepared folder, and its checks
integrity.py   detection of damaged shards and indices
vocabulary.py  comparison of tokenizers, and of token ids with a vocabulary
store.py       random access to the tokens of one split
order.py       a shuffle computed from (seed, epoch, index), without a table
packing.py     sequences of a fixed length, with or without document masks
mixture.py     sequences of several folders in fixed shares
recall.py      tokens that repeat a bigram of their context, and their loss
sampler.py     the sequences of each optimizer step, for each rank
module.py      a Lightning data module of the above

Imports the config, cross-entropy's `IGNORE` and the mask's limits from kernels, and the modules of the package's root.
This file imports nothing, so processes that prepare data start without torch.
"""

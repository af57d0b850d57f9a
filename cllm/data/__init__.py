"""Prepared tokens on disk, and the batches a training run makes of them.

    prepare/     a corpus -> a prepared folder                (data/prepare.py is its command line)
    manifest.py  what a prepared folder holds, and its checks
    store.py     the shards of one split as one memory-mapped sequence
    order.py     a shuffle that is a function of (seed, epoch, index) and needs no memory
    packing.py   sequences of a fixed length, with or without document masks
    sampler.py   which sequences each optimizer step takes, on each rank
    module.py    all of it as a Lightning data module

Nothing is imported here: the processes that prepare data start without PyTorch.
"""

"""Post-hoc compression: a filled cache of a trained model is made smaller, without a change of weights.

    tensor_tree.py   dataclasses of tensors that are counted and rearranged together
    sinks.py         the first tokens, which every method stores exactly
    landmarks.py     summaries of keys, by which a decode step selects tokens
    code.py          stored forms of a cached tensor (`Code`) and of a slot (`Prefix`)
    host_rows.py     uncompressed tensors in host memory
    slots.py         the slots that can be compressed, and their tensors as a method gets them
    key_norm.py      the norm of a slot's keys before RoPE
    method.py        the base class of all methods (`Compressor`), and of a model with its cache (`Engine`)
    registry.py      the methods by name, and spec strings such as `xkv:group=4,ratio=4`
    methods/         the methods, one file each
    turns.py         hooks of modules that several layers of a loop share
    readers.py       the layers that read a slot, and their queries while a cache is filled
    later_queries.py the queries of tokens after a compressed prefix
    weighting.py     errors of keys and values, weighted by what they change in attention's output
    weighted.py      the base of methods that use these weights
    head_bits.py     quantisers whose heads have their own widths
    lowrank.py       low-rank factors: SVD, and faster iterations
    power.py         a basis of the leading singular subspace by Chebyshev polynomials of XᵀX
    factorising.py   the base of methods with a decomposition, whose records name the solver
    products.py      batched products in a chosen precision
    group.py         a group of slots that share a basis
    fixed_bases.py   bases of keys and values that are fixed before a prompt is seen
    projecting.py    the base of methods that use them
    rank_search.py   ranks by the loss that each projection costs alone
    token_codes.py   tokens quantised one by one, and Hadamard matrices
    sensitivity.py   keys and values of a calibration text with the gradients of its loss
    absorb.py        later tokens that join the compressed ones
    grown.py         codes that later tokens have joined
    later_rows.py    rows of low-rank factors for later tokens
    eviction.py      slots without the tokens that a method evicts
    votes.py         the attention that cached tokens get from the prompt's queries
    evicting.py      the base of methods that evict tokens
    inputs.py        the inputs of the projections, recorded while a cache is filled
    budget.py        the numbers that may be stored for a ratio of bytes
    factor_budget.py ranks of low-rank factors, and widths of their columns, for a ratio of bytes
    mixed.py         low-rank factors in codes of mixed width
    quantize.py      packed codes with scales and zeros
    bit_planes.py    packed codes of any width
    entropy.py       entropy-coded integers
    parallel.py      independent work in parallel on a GPU
    compress.py      from a filled cache to compressed prefixes, and their errors
    deferred.py      compressed keys and values that a decode step reads in their stored form
    pages.py         exact keys in pages, of which a decode step reads some
    stores.py        compressed slots, and slots that share their tokens
    cache.py         a `KVCache` of them
    hf.py            compressed layers in a transformers cache
    engine.py        cllm's and transformers' models behind one interface
    analysis.py      similarity of layers: cosine, CKA, spectra
    ranks.py         normalised effective ranks, and their correlation with errors

Imports hub (in engine.py), model, cache, kernels, config, plan, plugins, the section base and errors.
"""

UNCOMPRESSED = "none"
"""The name of the method that compresses nothing."""

"""Post-hoc compression: a filled cache of a trained model made smaller, with real storage and no change of weights.

    compress.py   from a filled cache to a compressed one: which slots, which tokens, RoPE undone; what it cost
    code.py       what stands in a tensor's place (`Code`), and the base of all methods (`Compressor`)
    sinks.py      the first tokens, which every method stores exactly
    held.py       dataclasses of tensors, counted and rearranged together
    cache.py      compressed slots inside a `KVCache`
    hf.py         compressed layers inside a transformers cache
    engine.py     cllm's and transformers' models behind one face
    methods.py    the methods by name, and spec strings such as `xkv:group=4,ratio=4`
    xkv.py lowrank.py        cross-layer and single-layer SVD          minicache.py    merging of adjacent layers
    quantize.py packing.py   KIVI, XQuant                              hf_quantized.py transformers' quantised cache
    commonkv.py              shared latents of several layers          kvsharer.py     layers that read another's slot
    analysis.py   how alike layers are: cosine, CKA, spectra

Nothing is imported here.
"""

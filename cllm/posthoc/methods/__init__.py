"""Methods, one file each, which registers its classes with `cllm.posthoc.registry.register`.

    none.py          no compression
    xkv.py           xKV: low-rank factors of groups of layers; `svd`, of single layers
    minicache.py     MiniCache: directions shared by pairs of layers; `minicache_xkv`, a variant
    commonkv.py      CommonKV: latents shared by groups of layers
    kvsharer.py      KVSharer: layers that read another layer's slot
    kivi.py          KIVI: quantised keys and values
    xquant.py        XQuant: quantised, with codes shared by pairs of layers
    scaled.py        `int8` and `fp8`: numbers of 8 bits with scales
    turboquant.py    TurboQuant: codes of randomly rotated directions
    kvquant.py       KVQuant: fitted levels, outliers kept apart
    kvtc.py          KVTC: entropy-coded principal components across layers, for storage
    hf_quantized.py  transformers' `QuantizedCache`

A new file here is found by its `@register`; nothing else has to name it.

Imports errors, each other, and posthoc without its caches and engines.
"""

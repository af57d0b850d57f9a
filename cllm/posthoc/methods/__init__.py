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
    palu.py          Palu: factorised projections of groups of heads
    asvd.py          ASVD: projections factorised with scaled input channels
    lorc.py          LoRC: projections factorised without data, progressive ranks
    eigenattention.py  EigenAttention: bases of a calibration text's keys and values
    shadowkv.py      ShadowKV: low-rank keys, exact values, selected tokens
    recompute.py     keys and values computed from the residual stream when read
    streaming.py     StreamingLLM: the first and the last tokens
    h2o.py           H2O: tokens of the most attention from all queries
    snapkv.py        SnapKV: tokens of the most attention from the prompt's last queries
    entropy_budgets.py  tokens evicted by budgets from the entropy of attention
    quest.py         Quest: an exact cache of which steps read selected pages
    vfold.py         VFOLD: values of neighbouring layers averaged in common coordinates
    hf_quantized.py  transformers' `QuantizedCache`

A new file here is found by its `@register`; nothing else has to name it.

Imports errors, each other, and posthoc without its caches and engines.
"""

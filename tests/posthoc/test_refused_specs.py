"""Specs of post-hoc methods that are refused when they are parsed, before there is a cache."""

from __future__ import annotations

import pytest

from cllm.errors import UserError
from cllm.posthoc.registry import parse

REFUSED = {
    "later tokens that join": [
        ("svd:ratio=2,every=0", "every: Input should be greater than or equal to 1 got 0"),
        ("svd:ratio=2,every=a", "every: Input should be a valid integer"),
        ("svd:ratio=2,every=8,recompress=12", "recompress=12: .*every=8; allowed: a multiple of it"),
        ("xkv:ratio=2,select=16,every=8", "every=8: select=16 reads the prompt's outliers .*; allowed: one of the two"),
        ("shadowkv:every=8", "every=8: select=2048 reads .*; allowed: select=null"),
        ("svd:ratio=2+kivi:every=8", "every is no option of kivi after .; allowed: bits, group, residual"),
    ],
    "eviction": [
        ("snapkv", "give one of tokens and ratio"),
        ("h2o:tokens=9,ratio=2", "give one of tokens and ratio"),
        ("snapkv:ratio=2,kernel=4", "kernel=4: has no middle; allowed: odd numbers"),
        ("h2o:ratio=2,recompress=8", "recompress=8: the queries of later tokens are not recorded"),
        ("streaming:ratio=2+minicache", "allowed with [+]: .*snapkv.* then kivi or xquant; .*then svd or xkv"),
        ("quest:select=20", "select=20 is no multiple of page=16"),
        ("entropy:tokens=0", "tokens: Input should be greater than or equal to 1"),
    ],
    "low rank after eviction": [
        ("streaming:ratio=2+xkv:ratio=2,weight=queries", "weight=queries needs the attention of all tokens"),
        ("h2o:ratio=2+xkv:ratio=2,select=64", "select=64 selects chunks of tokens that follow one another"),
        ("h2o:ratio=2+svd:ratio=1", "ratio=1 keeps every tensor as it is"),
        ("h2o:ratio=2+svd:ratio=2,sinks=0", "sinks is no option of svd after [+]; allowed: .*, energy, "),
        ("h2o:ratio=2+svd:ratio=2,every=8", "every is no option of svd after [+]"),
        (
            "h2o:ratio=2+recompute:ratio=2",
            "allowed with [+]: .*; entropy or h2o or snapkv or streaming, then svd or xkv",
        ),
        ("xkv:ratio=2+streaming:ratio=2", "allowed with [+]: "),
        ("streaming:ratio=2+streaming:ratio=2", "allowed with [+]: "),
        ("streaming:ratio=2+kivi+kivi", "allowed with [+]: "),
        ("streaming:ratio=2+xkv", "give exactly one of ranks"),
    ],
    "quantisers": [
        ("xkv:ratio=2+kivi:bits=4,recompress=8", "recompress is no option of kivi after .; allowed: bits, group"),
        ("xkv:ratio=2+xquant:share_k=3", "share_k is no option of xquant after .; allowed: bits, eta, group, residual"),
        ("minicache+xquant:share_v=3", "share_v is no option of xquant"),
        ("xkv:ratio=1+kivi:bits=8", "ratio=1 keeps every tensor as it is and has no factors to code; allowed: above 1"),
        ("kivi+kivi", "allowed with .: asvd or .* or svd or vfold or xkv, then kivi or xquant"),
        ("xkv:ratio=2+svd:ratio=2", "allowed with"),
        ("xkv:ratio=2+kivi+kivi", "allowed with"),
    ],
    "widths of heads": [
        ("turboquant:mean_bits=3,bits=3", "mean_bits=3 chooses the bits of every head, and bits is given too"),
        ("turboquant:mean_bits=3,bits_v=3", "bits_v is given too"),
        ("kivi:mean_bits=2.5,bits=2", "bits is given too"),
        ("kivi:mean_bits=0.5", "mean_bits.*greater than or equal to 1"),
        ("turboquant:mean_bits=9", "mean_bits.*less than or equal to 8"),
        ("turboquant:mean_bits=3,recompress=8", "recompress=8: mean_bits=3 needs the queries of all tokens"),
        ("xquant:mean_bits=2", "mean_bits=2: slots that share codes have one width"),
        ("xkv:ratio=2+kivi:mean_bits=3", "mean_bits is no option of kivi after"),
        ("xkv:ratio=2+xquant:mean_bits=3", "mean_bits=3: slots that share codes have one width"),
        ("int8:mean_bits=3", 'unknown option "mean_bits"'),
    ],
    "weighted errors": [
        ("xkv:ratio=2,spread=true", "spread compares errors"),
        ("xkv:rank_k=2,rank_v=2,weight=queries,spread=true", "spread compares errors"),
        ("xkv:ratio=2,weight=queries,spread=true,svd=power", "spread needs all singular values"),
        ("xkv:ratio=2,weight=queries,recompress=4", "recompress=4"),
        ("xkv:ratio=2,weight=queries,codes=mixed", "codes=mixed"),
        ("xkv:ratio=2,weight=queries,spread=true,codes=mixed+kivi:bits=4", "codes=mixed"),
    ],
    "solvers": [
        ("xkv:energy=0.9,svd=power", "which svd=power has not; allowed: auto, exact, gram"),
        (
            "xkv:ratio=2,svd=gram,products=bf16",
            "products=bf16 goes with svd=random and svd=power; svd=gram is made in fp64",
        ),
        (
            "xkv:ratio=2,products=bf16",
            "products=bf16 goes with svd=random and svd=power; svd=auto chooses products itself",
        ),
        (
            "xkv:ratio=2,products=tf32",
            "products=tf32 goes with svd=random and svd=power; svd=auto chooses products itself",
        ),
        ("xkv:ratio=2,svd=power,products=fp8", "products: .*'fp32', 'tf32' or 'bf16'"),
    ],
    "selected tokens": [
        ("xkv:ratio=2,chunk=4", "chunk goes with select"),
        ("xkv:ratio=2,outliers=4", "outliers goes with select"),
        ("xkv:ratio=2,local=4", "local goes with select"),
        ("xkv:ratio=2,select=16,recompress=8", "recompress=8: select=16 keeps exact keys, .*; allowed: one of the two"),
        ("xkv:ratio=2,select=20", "select=20 is no multiple of chunk=8"),
        ("xkv:ratio=1,select=16", "ratio=1 has not"),
        ("xkv:ratio=2,select=0", "select: .* greater than or equal to 1"),
        ("xkv:ratio=2,select=1.5", "select: "),
        ("xkv:ratio=2,selects=16", 'unknown option "selects"'),
        ("svd:ratio=2,chunk=4", "chunk goes with select"),
        ("svd:ratio=2,outliers=4", "outliers goes with select"),
        ("svd:ratio=2,local=4", "local goes with select"),
        ("svd:ratio=2,select=16,recompress=8", "recompress=8: select=16 keeps exact keys, .*; allowed: one of the two"),
        ("svd:ratio=2,select=20", "select=20 is no multiple of chunk=8"),
        ("svd:ratio=1,select=16", "ratio=1 has not"),
        ("svd:ratio=2,select=0", "select: .* greater than or equal to 1"),
        ("svd:ratio=2,select=1.5", "select: "),
        ("svd:ratio=2,selects=16", 'unknown option "selects"'),
    ],
    "values in host memory": [
        ("shadowkv:values=host,select=null", "values=host: select=null reads all values in every step"),
        ("shadowkv:values=host,every=8", "every=8: select=2048 reads .*; allowed: select=null"),
        ("shadowkv:values=host,recompress=8", "recompress=8: exact keys of outliers are gone"),
        (
            "shadowkv:rank=8,select=8,chunk=4,outliers=1,local=1,values=host+kivi:bits=4,group=8,residual=0",
            "values=host stores exact values; allowed: values=device",
        ),
        ("shadowkv:values=disk", "values: .* should be 'device' or 'host'"),
    ],
    "fixed bases": [
        ("palu", "give exactly one of keep and ratio"),
        ("lorc:keep=0.5,ratio=2", "give exactly one of keep and ratio"),
        ("asvd:keep=0.5,least=0.2", "least goes with allocation=progressive"),
        ("palu:keep=0.5,bits=4+kivi:bits=4", "bits=4 codes the latents already; allowed: one of bits and a quantiser"),
        ("palu:keep=0.5,bits=9", "bits: Input should be less than or equal to 8"),
        ("asvd:keep=1.5", "keep: Input should be less than or equal to 1"),
        ("eigenattention:keep=0.5,heads=2,basis=prompt", "basis=prompt has one basis for all heads"),
        ("recompute:rank=3,ratio=2", "give at most one of rank and ratio"),
        ("recompute:group=2", "group goes with rank or ratio"),
        ("recompute:recompress=4", "inputs of later tokens are not recorded"),
        ("shadowkv:select=9", "select=9 is no multiple of chunk=8"),
        ("shadowkv:select=null,chunk=4", "chunk goes with select"),
    ],
}
"""Specs, and what their errors say."""


@pytest.mark.parametrize(("spec", "message"), [case for cases in REFUSED.values() for case in cases])
def test_a_spec_that_does_not_fit_is_refused(spec, message):
    with pytest.raises(UserError, match=message):
        parse(spec)

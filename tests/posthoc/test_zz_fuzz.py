import copy, sys, traceback, collections
import torch, pytest
sys.path.insert(0, "/work/wt/audit22")
from cllm.errors import UserError
from cllm.cache.cache import KVCache
from cllm.posthoc.cache import CompressedSlot, SharingSlot, compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse
from tests.posthoc.test_all_methods import SPECS, tokens_read, filled_with, difference

COMBOS = ["streaming:tokens=12+xkv:group=3,rank_k=4,rank_v=5", "h2o:tokens=12+svd:rank_k=4,rank_v=5", "snapkv:tokens=12,window=3+xkv:group=99,ratio=1.3", "streaming:tokens=14+xkv:group=2,rank_k=4,rank_v=4+kivi:bits=4,group=2,residual=2",
 "xkv:group=99,rank_k=4,rank_v=5+kivi:bits=2,group=4,residual=0","entropy:tokens=12,window=3+svd:energy=0.9", "xkv:rank_k=4,rank_v=4,group=2,every=3", "streaming:tokens=12,every=3+svd:rank_k=4,rank_v=4", "kivi:bits=2,group=4,residual=0,every=4", "int8:every=3", "minicache:every=3"]
ALL = {**SPECS, **{c: c for c in COMBOS}}
def test_fuzz(preset_config, random_model, reference, tokens):
    bad = collections.Counter()
    ref = collections.Counter()
    for name in ["mqa","mla","mlra","xmla","yoco_u","fusedkv_lite_reversed","kv_tie","yoco_pp","tied slots of other layers","mixes of mixes","halves of other layers","ced, groups of two","joins of every slot","trailing","swiftkv, groups of two"]:
        config = preset_config(name)
        if config.plan().iterations is not None:
            it = config.kv.iterations.model_copy(update={"forward": 27, "backward": 1})
            config = config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": it})})
        model = random_model(config).eval().requires_grad_(False)
        engine = engine_of(model); print("MODEL", name, flush=True)
        for key, spec in ALL.items():
            if key == "hf_quantized": continue
            for starts in (None, torch.tensor([0, 4])):
                try:
                    ids = tokens(2, 28)
                    method = parse(spec)
                    method.prepare(engine, tokens(2, 40, seed=1))
                    cache = engine.new_cache()
                    with method.watch(engine):
                        model.hidden(ids[:, :20], cache=cache, starts=starts)
                    comp = compress_cache(cache, method)
                    again = copy.deepcopy(comp)
                    read = tokens_read(comp)
                    one = model(ids[:, 20:], cache=comp)
                    assert one.isfinite().all(), "nan"
                    if method.every is None:
                        steps = torch.cat([model(ids[:, i:i+1], cache=again) for i in range(20, 28)], 1)
                        if not method.selects_tokens:
                            d = difference(steps, one)
                            assert d < 1e-4, f"steps {d}"
                    if method.every is None and not method.evicts and not method.shares():
                        exp = model(ids[:, 20:], cache=filled_with(cache, read))
                        d = difference(one, exp)
                        assert d < 1e-4, f"filled {d}"
                except UserError as e:
                    ref[(key, str(e)[:140])] += 1
                except Exception as e:
                    tb = traceback.extract_tb(e.__traceback__)[-1]
                    print("BAD", (name, key, starts is not None, type(e).__name__, str(e)[:100], f"{tb.filename[-40:]}:{tb.lineno}"), flush=True)
                    bad[(name, key, starts is not None, type(e).__name__, str(e)[:100], f"{tb.filename[-40:]}:{tb.lineno}")] += 1
    seen=set()
    for (k, r), n in ref.items():
        print("REF", n, k, "|", r)

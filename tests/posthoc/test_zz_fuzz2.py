import traceback, collections
import torch
from cllm.errors import UserError
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.hf import compress_dynamic
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse, methods
NAMES = [n for n in methods()]
def specs():
    for n in NAMES:
        f = methods()[n].model_fields
        if "ratio" in f:
            for r in (1, 1.5, 1000): yield f"{n}:ratio={r}"
        else: yield n
    for r in (1.2, 1000):
        yield f"streaming:ratio={r}+xkv:group=99,ratio={r}"
        yield f"h2o:ratio={r}+svd:ratio={r}"
        yield f"h2o:tokens=6+svd:energy=0.9+kivi:bits=4,residual=0,group=2"
    yield "streaming:tokens=1"; yield "streaming:tokens=6,sinks=0"; yield "h2o:tokens=5,sinks=0+svd:rank_k=1,rank_v=1"; yield "snapkv:tokens=7,window=2,every=1+svd:rank_k=1,rank_v=1"
    yield "xkv:group=99,rank_k=1,rank_v=1,every=1"; yield "xkv:group=99,ratio=1.5,weight=queries,spread=true,codes=mixed,every=2"
    yield "entropy:tokens=7,window=2,every=3"; yield "kivi:bits=1,group=2,residual=0,every=1"; yield "quest:select=16,every=2"; yield "minicache:every=1"; yield "vfold:recent=0,every=1"; yield "recompute:every=2"; yield "palu:keep=0.1,bits=1,every=1"
def test_fuzz(design, llama, tokens):
    refs = {}
    for name in ("mqa", "fusedkv", "mha-bf16", "llama"):
        model = llama() if name == "llama" else design(name.removesuffix("-bf16"))
        if name.endswith("bf16"): model = model.bfloat16()
        engine = engine_of(model); print("MODEL", name, flush=True)
        for spec in specs():
            if "hf_quant" in spec: continue
            try:
                base = parse(spec); base.prepare(engine, tokens(2, 40, seed=1))
            except UserError as e:
                refs.setdefault((name, spec, str(e)), []).append("parse"); continue
            except Exception as e:
                tb = traceback.extract_tb(e.__traceback__)[-1]
                print("BADPREP", name, spec, type(e).__name__, str(e)[:100], tb.filename[-40:], tb.lineno, flush=True); continue
            for n, starts in ((1, None), (3, None), (4, None), (5, None), (9, None), (9, [0, 8]), (9, [0, 4]), (9, [3, 6])):
                try:
                    b = 1 if starts is None else 2
                    ids = tokens(b, n + 6)
                    cache = engine.new_cache()
                    s = None if starts is None else torch.tensor(starts)
                    with base.watch(engine):
                        if name == "llama":
                            if s is not None: continue
                            engine.hidden(ids[:, :n], cache)
                            comp = compress_dynamic(cache, base, model)
                        else:
                            model.hidden(ids[:, :n], cache=cache, starts=s)
                            comp = compress_cache(cache, base)
                    errs = [e for slot in comp.outcome.errors.values() for e in slot.values()]
                    assert all(0 <= e < 1e3 for e in errs), errs
                    for part in ids[:, n:].split([1, 2, 3], 1):
                        out = engine.logits(part, comp)
                        assert out.isfinite().all(), "nan"
                    comp.nbytes()
                except UserError as e:
                    refs.setdefault((name, spec, str(e)[:150]), []).append((n, starts))
                except Exception as e:
                    tb = traceback.extract_tb(e.__traceback__)[-1]
                    print("BAD", name, spec, n, starts, type(e).__name__, str(e)[:100], tb.filename[-40:], tb.lineno, flush=True)
    for k, v in refs.items(): print("REF", k, v)

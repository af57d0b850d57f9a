"""Owners that write other slots than two projections of their own input: their cost, starts from other models, and
refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.cache.accounting import kv_bytes
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, OptimConfig
from cllm.config.load import read_yaml, validate
from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.hub.model import CLLMForCausalLM
from cllm.model import attention, sources
from cllm.model.rope import apply_rope
from cllm.model.sizes import build_decoder
from cllm.plan.describe import plan_table
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.registry import parse
from cllm.train.optim import parameter_groups
from cllm.uptrain.decoder import TracedDecoder, build_traced, owner_of
from cllm.uptrain.init import init_student
from cllm.uptrain.teacher import student_model

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
Config = Callable[..., ModelConfig]


def layers(*entries: dict[str, Any]) -> dict[str, Any]:
    """`model.kv` with one entry for each layer."""
    return {"layers": [{"layers": i, **entry} for i, entry in enumerate(entries)]}


def message(**model: Any) -> str:
    with pytest.raises(UserError) as error:
        validate(ModelConfig, {"d_model": 32, "n_heads": 4, **model})
    return str(error.value)


# ---- the output of another layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "full"),
    [
        ({"preset": "swiftkv"}, 4),
        ({"preset": "swiftkv", "n_lower": 2, "group": 3}, 2),
        # Layer 2 projects its own input: all tokens reach it, and only the last one computes attention.
        (layers({"own": {}}, {"own": {}}, {"own": {}}, {"own": {"input": 0}}), 2),
        # All of the tokens leave layer 2, because layer 3 projects its output.
        (layers({"own": {}}, {"own": {}}, {"own": {}}, {"own": {"input": 2}}), 3),
        # Layer 2 owns a slot that needs no prompt, and layer 3 reads it.
        (layers({"own": {}}, {"own": {}}, {"own": {"input": 0}}, {"keys": {"share": 2}, "values": {"share": 1}}), 1),
    ],
)
def test_a_prompt_passes_only_the_layers_below_those_that_project_another_output(
    kv: dict[str, Any], full: int, tiny_config: Config, random_model
) -> None:
    """The layers above write their slots for all tokens and compute one."""
    config = tiny_config(kv=kv, n_layers=4 if "layers" in kv else 8)
    model = random_model(config).eval().requires_grad_(False)
    queries, mlps = [], []
    for block in model.blocks:
        block.attention.q_proj.register_forward_pre_hook(lambda _, inputs: queries.append(inputs[0].shape[1]))
        block.mlp.register_forward_pre_hook(lambda _, inputs: mlps.append(inputs[0].shape[1]))
    cache = KVCache(config)
    last = model.head(model.prefill(IDS[:, :8], cache))
    assert queries == mlps == [8] * full + [1] * (config.n_layers - full)
    assert {store.tensors()["k"].shape[1] for store in cache.stores.values()} == {8}
    logits = model(IDS)
    torch.testing.assert_close(last, logits[:, 7:8], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(IDS[:, 8:], cache=cache), logits[:, 8:], atol=1e-5, rtol=1e-5)


def test_the_norm_of_an_output_is_computed_once_for_all_layers_that_project_it(tiny_config: Config, random_model):
    model = random_model(tiny_config(kv={"preset": "swiftkv"}))
    assert [name for name, _ in model.named_parameters() if "stream_norms" in name] == ["stream_norms.3.weight"]
    calls: list[int] = []
    model.stream_norms["3"].register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert len(calls) == 1


def test_bytes_of_across_kv_equal_a_hand_count(tiny_config: Config) -> None:
    """Eight layers; layers 4 to 7 in groups of two: six slots of 2 x 4 heads of 8 numbers of 2 bytes; 8 are read."""
    found = kv_bytes(tiny_config(kv={"preset": "swiftkv", "group": 2}))
    assert (found.resident, found.written, found.read) == (6 * 128, 6 * 128, 8 * 128)
    assert "4-7    4 KV heads, input 3  own" in plan_table(tiny_config(kv={"preset": "swiftkv"}).plan())


def student_of(teacher: TracedDecoder, kv: dict[str, Any]) -> TracedDecoder:
    torch.manual_seed(7)
    return build_traced(ModelConfig.model_validate(student_model(teacher.config, kv, rope_pairs="all"))).eval()


@pytest.fixture
def teacher(tiny_config: Config, random_model) -> TracedDecoder:
    """A model in which every layer owns and reads itself."""
    model = build_traced(tiny_config(qk_norm=True, kv_bias=True))
    model.load_state_dict(random_model(model.config).state_dict())
    return model.eval().requires_grad_(False)


def test_swiftkv_starts_from_a_model_whose_layers_own(teacher: TracedDecoder) -> None:
    """norm_swift is the norm of the next layer, so that this layer computes what it did; `mean` averages each group."""
    student = student_of(teacher, {"preset": "swiftkv", "group": 2})
    init_student(student, teacher, InitFrom(method="copy"))
    outputs = []
    for model in (teacher, student):
        with model.record_layers() as found:
            model(IDS)
        outputs.append(found)
    for i in range(5):
        torch.testing.assert_close(outputs[1][i], outputs[0][i], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[1][5], outputs[0][5], atol=1e-2)
    init_student(student, teacher, InitFrom(method="mean"))
    for name in ("k_proj", "v_proj"):
        mean = (getattr(owner_of(teacher, 6), name).weight + getattr(owner_of(teacher, 7), name).weight) / 2
        torch.testing.assert_close(getattr(owner_of(student, 6), name).weight, mean)
    errors = init_student(student, teacher, InitFrom(method="fit"), [{"input_ids": IDS}]).errors
    assert {f"layer {i} projected {part}" for i in (4, 6) for part in ("keys", "values")} <= errors.keys()
    with pytest.raises(
        UserError, match=r"layer 4 of the model to start from owns a slot of .* \(4 KV heads, input 3\);"
    ):
        init_student(student_of(student, {"preset": "cla"}), student, InitFrom(method="copy"))


def test_slots_of_another_output_are_compressed(tiny_config: Config, random_model) -> None:
    model = random_model(tiny_config(kv={"preset": "swiftkv"})).eval().requires_grad_(False)
    cache = KVCache(model.config)
    model(IDS[:, :8], cache=cache)
    compressed = compress_cache(cache, parse("xkv:group=2,rank_k=8,rank_v=8"))  # the ranks of 8 tokens: exact
    torch.testing.assert_close(model(IDS[:, 8:], cache=compressed), model(IDS)[:, 8:], atol=1e-3, rtol=1e-3)


def test_what_no_layer_can_project_is_refused() -> None:
    above = message(n_layers=2, kv=layers({"own": {}}, {"own": {"input": 1}}))
    assert "layer 1: projects the output of layer 1; allowed: layers 0 to 0" in above
    lowest = message(n_layers=1, kv=layers({"own": {"input": 0}}))
    assert "layer 0: projects the output of layer 0; allowed: null, the layer's own input" in lowest
    norms = message(n_layers=2, kv=layers({"own": {}}, {"own": {"input": 0, "kv_norm": True}}))
    assert "layer 1: has kv_norm and input 0; allowed: one of the two" in norms


# ---- keys alone, values alone ----------------------------------------------------------------------------------------


def test_a_slot_of_one_half_has_the_weights_and_the_bytes_of_one_half(tiny_config: Config, random_model) -> None:
    """24 layers with 8 slots of keys and 8 of values, of 4 heads of 8 numbers of 2 bytes; all 24 read both halves."""
    kv = read_yaml(ROOT / "configs" / "kv" / "halves_example.yaml")["model"]["kv"]
    config = tiny_config(n_layers=24, kv=kv)
    found, half = kv_bytes(config), 4 * 8 * 2
    assert (found.resident, found.written, found.read) == (16 * half, 16 * half, 24 * 2 * half)
    model = random_model(config)
    names = [name for name, _ in model.named_parameters() if name.endswith(("k_proj.weight", "v_proj.weight"))]
    assert len(names) == 16
    for storage, width in (("model", 4 * 8 * 4), ("fp8", 4 * 8 + 4 * 2)):  # fp8: a factor of 2 bytes for each head
        cache = KVCache(config, storage=storage)
        model(IDS, cache=cache)
        assert cache.nbytes() == 2 * 9 * 16 * width


def test_svformer_starts_from_a_model_whose_layers_own(teacher: TracedDecoder) -> None:
    student = student_of(teacher, {"preset": "svformer"})
    init_student(student, teacher, InitFrom(method="copy"))
    for i in range(8):
        assert torch.equal(owner_of(student, i).k_proj.weight, owner_of(teacher, i).k_proj.weight)
    init_student(student, teacher, InitFrom(method="mean"))
    mean = torch.stack([owner_of(teacher, i).v_proj.weight for i in range(8)]).mean(0)
    torch.testing.assert_close(owner_of(student, 0).v_proj.weight, mean)
    errors = init_student(student, teacher, InitFrom(method="ridge", align="none"), [{"input_ids": IDS}]).errors
    read = {f"layer {i} {part}" for i in range(1, 8) for part in ("keys", "values")}
    assert errors.keys() == {"layer 0 values before", "layer 0 values after", *read}
    assert errors["layer 0 values after"] < errors["layer 0 values before"]


def test_halves_that_do_not_exist_are_refused(tiny_config: Config, random_model) -> None:
    own = {"own": {"only": "keys"}}
    alone = message(n_layers=2, kv=layers({"own": {}}, own))
    assert "layer 1: values come from itself, which owns a slot of keys; owners of values: [0]" in alone
    other = message(
        n_layers=3, kv=layers({"own": {}}, {**own, "values": {"share": 0}}, {**own, "values": {"share": 1}})
    )
    assert "layer 2: values come from layer 1, which owns a slot of keys; owners of values: [0]" in other
    unread = message(n_layers=2, kv=layers({"own": {}}, {**own, "keys": {"share": 0}, "values": {"share": 0}}))
    assert "layer 1: owns a slot that no layer reads" in unread
    model = random_model(tiny_config(kv={"preset": "svformer"}))
    cache = KVCache(model.config)
    model(IDS, cache=cache)
    with pytest.raises(UserError, match=r"layer 1 stores 4 KV heads, only keys, which no post-hoc method compresses"):
        compress_cache(cache, parse("none"))
    teacher = build_traced(model.config)
    with pytest.raises(
        UserError, match=r"layer 1 of the model to start from owns a slot of keys \(4 KV heads, only keys"
    ):
        init_student(student_of(teacher, {"preset": "cla"}), teacher, InitFrom(method="copy"))


# ---- one projection for keys and values ------------------------------------------------------------------------------


def test_tied_keys_are_rotated_once_in_a_prompt_and_by_the_kernel_in_a_step(
    tiny_config: Config, random_model, monkeypatch
):
    """Layer 0 is read by four layers. A prompt rotates four queries and one copy of the keys, a step queries alone."""
    share = {"keys": {"share": 0}, "values": {"share": 0}}
    model = random_model(tiny_config(n_layers=4, kv=layers({"own": {"tie": "kv"}}, share, share, share))).eval()
    assert not [name for name, _ in model.named_parameters() if ".k_proj" in name or ".v_proj" in name]
    rotated: list[int] = []

    def counted(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rotated.append(x.shape[1])
        return apply_rope(x, table)

    for module in (sources, attention):
        monkeypatch.setattr(module, "apply_rope", counted)
    with torch.no_grad():
        cache = KVCache(model.config)
        model(IDS[:, :8], cache=cache)
        model(IDS[:, 8:], cache=cache)
    assert rotated == [8] * 5 + [1] * 4


@pytest.mark.parametrize("max_len", [None, 9])
@pytest.mark.parametrize("storage", ["model", "fp8"])
def test_tied_slots_of_padded_sequences_in_rings(storage, max_len, tiny_config: Config, random_model) -> None:
    """Positions of cached tokens are those at which they came, after padding and in a ring that has wrapped."""
    kv = layers({"own": {"tie": "kv"}, "window": 4}, {"keys": {"share": 0}, "values": {"share": 0}, "window": 3})
    model = random_model(tiny_config(n_layers=2, kv=kv)).eval().requires_grad_(False)
    cache, starts = KVCache(model.config, max_len=max_len, storage=storage), torch.tensor([0, 3])
    parts = [model(IDS[:, :5], cache=cache, starts=starts)]
    parts += [model(IDS[:, t : t + 1], cache=cache) for t in range(5, 9)]
    found = torch.cat(parts, dim=1)
    error = torch.stack([(found[0] - model(IDS[:1])[0]).norm(), (found[1, 3:] - model(IDS[1:, 3:])[0]).norm()]).max()
    assert error / found.norm() < (1e-5 if storage == "model" else 0.05)


def test_tied_bytes_count_one_tensor(tiny_config: Config) -> None:
    """A slot of 4 heads of 8 numbers of 2 bytes, read whole by each layer, also by one that reads keys alone."""
    keys = {"keys": {"share": 0}, "values": {"share": 1}}
    found = kv_bytes(tiny_config(n_layers=3, kv=layers({"own": {"tie": "kv"}}, {"own": {}}, keys)))
    assert (found.resident, found.read) == (64 + 128, 64 + 128 + 64 + 64)


def test_tied_slots_refuse_what_needs_two_tensors(teacher: TracedDecoder, tiny_config: Config, random_model) -> None:
    model = random_model(tiny_config(kv={"preset": "kv_tie"}))
    cache = KVCache(model.config)
    model(IDS, cache=cache)
    assert cache.layers[0].values is not None
    with pytest.raises(UserError, match=r"cache\.layers\[0\]\.keys: layer 0 stores its keys before RoPE"):
        cache.layers[0].keys  # noqa: B018
    with pytest.raises(UserError, match="layer 0 stores 4 KV heads, K = V, which no post-hoc method compresses"):
        compress_cache(cache, parse("none"))
    with pytest.raises(UserError, match=r"method is copy, and layer 0 owns 4 KV heads, K = V, .* allowed: fit"):
        init_student(student_of(teacher, {"preset": "kv_tie"}), teacher, InitFrom(method="copy"))
    both = message(n_layers=1, kv=layers({"own": {"tie": "kv", "only": "keys"}}))
    assert "layer 0: own: has only and tie; allowed: at most one of" in both


# ---- mixes ----------------------------------------------------------------------------------------------------------


def test_a_mix_starts_as_the_plan_without_it(tiny_config: Config) -> None:
    model = build_decoder(tiny_config(kv={"preset": "yoco_pp"}))
    plain = build_decoder(tiny_config(kv={"preset": "pizza_bottom", "n_owners": 4}))
    weights = {name: weight for name, weight in model.state_dict().items() if ".mixed_" not in name}
    assert len(weights) == len(model.state_dict()) - 3 * 2
    plain.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), plain(IDS), atol=1e-6, rtol=1e-6)
        model.blocks[2].attention.owner.mixed_values.weight[0] += 0.01
        assert not torch.allclose(model(IDS), plain(IDS), atol=1e-4)


@pytest.mark.parametrize("max_len", [None, 9])
@pytest.mark.parametrize("storage", ["model", "fp8"])
def test_the_sum_is_stored(storage, max_len, tiny_config: Config, random_model) -> None:
    """Layer 2 caches 35 (w_0 K_0 + w_1 K_1 + w_2 K_2), and the same of values, also when layer 0 is a ring."""
    kv = layers({"own": {}, "window": 3}, {"own": {}}, {"own": {"mix": [0, 1]}})
    model = random_model(tiny_config(n_layers=3, kv=kv)).eval().requires_grad_(False)
    cache, made = KVCache(model.config, max_len=max_len, storage=storage), []
    for block in model.blocks:
        block.attention.owner.register_forward_hook(lambda owner, inputs, slot: made.append(slot))
    for part in (IDS[:, :4], IDS[:, 4:7], IDS[:, 7:8], IDS[:, 8:]):
        model(part, cache=cache)
    found = cache.layers[2]
    for half, name in enumerate(("keys", "values")):
        w = getattr(model.blocks[2].attention.owner, f"mixed_{name}").weight
        own = [torch.cat([slot[half] for slot in made[i::3]], dim=1) for i in range(3)]
        expected = (35 * (w[0] * own[0] + w[1] * own[1] + w[2] * own[2])).transpose(1, 2)
        error = (getattr(found, name) - expected).norm() / expected.norm()
        assert error < (1e-6 if storage == "model" else 0.05)


def test_weights_of_a_mix_are_trained_and_saved_as_fusion_weights(tmp_path, tiny_config: Config, random_model) -> None:
    model = random_model(tiny_config(kv={"preset": "yoco_pp"}))
    (fusion,) = [group for group in parameter_groups(model, OptimConfig()) if group["name"] == "fusion"]
    mixes = {id(p) for name, p in model.named_parameters() if ".mixed_" in name}
    assert {id(p) for p in fusion["params"]} == mixes
    as_pretrained(model).save_pretrained(tmp_path)
    half = CLLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in half.named_parameters()}
    assert {kind for name, kind in kinds.items() if ".mixed_" in name} == {torch.float32}
    assert kinds["model.blocks.1.attention.owner.k_proj.weight"] == torch.bfloat16


def test_what_cannot_be_mixed_is_refused(teacher: TracedDecoder, tiny_config: Config, random_model) -> None:
    mixed, share = {"own": {"mix": [0]}}, {"keys": {"share": 0}, "values": {"share": 0}}
    for entries, expected in (
        (({"own": {}}, {"own": {"mix": [1]}}), "layer 1: mixes the keys and values of layer 1; allowed: layers 0"),
        (({"own": {}}, {"own": {"mix": [0, 0]}}), "layer 1: mix is [0, 0]; allowed: one or more different layers"),
        (
            ({"own": {}}, share, {"own": {"mix": [1]}}),
            "mixes the keys and values of layer 1, which owns nothing; allowed: own",
        ),
        (({"own": {"n_kv_heads": 2}}, mixed), "layer 1: mixes the keys and values of layer 0, which owns 2 KV heads;"),
        (
            ({"retention": {}}, mixed),
            "layer 0, which owns a recurrent state; allowed: owners of keys and",
        ),
    ):
        assert expected in message(n_layers=len(entries), kv=layers(*entries))
    model = random_model(tiny_config(kv={"preset": "yoco_pp"}))
    cache = KVCache(model.config)
    model(IDS, cache=cache)
    with pytest.raises(UserError, match="layer 1 stores 4 KV heads, mix 0, which no post-hoc method compresses"):
        compress_cache(cache, parse("none"))
    student = student_of(teacher, {"preset": "yoco_pp"})
    init_student(student, teacher, InitFrom(method="copy"))
    for name in ("k_proj", "v_proj"):
        assert torch.equal(getattr(owner_of(student, 1), name).weight, getattr(owner_of(teacher, 1), name).weight)

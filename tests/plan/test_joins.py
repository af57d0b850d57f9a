"""Reads of several slots at once: their kernels, their cost, padding and documents, and what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.cache.accounting import kv_bytes
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, OptimConfig
from cllm.config.load import validate
from cllm.config.uptraining import InitFrom
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.hub.families.write import export_family
from cllm.hub.model import CLLMForCausalLM
from cllm.kernels.attention import Mask, choose
from cllm.kernels.backends import Case
from cllm.kernels.joint import JointPart, joint_attention
from cllm.model.sizes import build_decoder, layer_flops_per_token, meta_decoder
from cllm.plan.describe import plan_drawing, plan_table
from cllm.plan.explicit import Explicit, plan_entries
from cllm.plan.joins import LOCAL, Gate, Join, Part
from cllm.plan.kinds import Own, Share
from cllm.plan.picture import plan_figure
from cllm.plan.plan import KVPlan, LayerPlan
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.registry import parse
from cllm.train.optim import parameter_groups
from cllm.uptrain.decoder import build_traced
from cllm.uptrain.init import init_student

Config = Callable[..., ModelConfig]
IDS = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
WINDOW = {"own": {"n_kv_heads": 2, "window": 4}}
BOTH = {
    "layers": [
        {"layers": 0, "own": {}},
        {"layers": 1, "read": {"join": [{"own": {"input": 0}}, {"own": {"n_kv_heads": 1, "window": 3}}], "sink": True}},
        {"layers": 2, "read": {"gate": [0, {"own": {"tie": "kv", "window": 4}}]}},
        {"layers": 3, "read": {"join": [1, {"share": 2, "window": 2}]}},
    ]
}
"""A join of two own slots, a gate, and a join of slots of other layers."""


def layers(*entries: dict[str, Any]) -> dict[str, Any]:
    """`model.kv` with one entry for each layer."""
    return {"layers": [{"layers": i, **entry} for i, entry in enumerate(entries)]}


# ---- the kernel ------------------------------------------------------------------------------------------------------


def dense(q, parts, sink):
    """One softmax over the keys of all parts side by side, and over the sink."""
    scores, values = [], []
    for k, v, mask in parts:
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        z = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        scores.append(z.masked_fill(~mask.dense(q.shape[1], k.shape[1], q.device), -torch.inf))
        values.append(v)
    if sink is not None:
        scores.append(sink[None, :, None, None].expand(*scores[0].shape[:3], 1))
        values.append(torch.zeros_like(q[:, :1]))
    return torch.einsum("bhts,bshd->bthd", torch.cat(scores, -1).softmax(-1), torch.cat(values, 1))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_outputs_and_gradients_are_those_of_one_softmax(with_sink: bool, documents: bool) -> None:
    """Parts with other numbers of KV heads, other windows and more keys than queries; blocks of 64 and 256 queries."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    ids = torch.cat((torch.zeros(2, 100), torch.ones(2, 200)), dim=1).long() if documents else None
    q, sink = normal(2, 300, 4, 6), normal(4) if with_sink else None
    masks = [Mask(None, False, ids), Mask(70, False, ids), Mask(1, False, ids)]
    parts = [JointPart(normal(2, 300, g, 6), normal(2, 300, g, 6), m) for g, m in zip((4, 2, 1), masks, strict=True)]
    if not documents:
        parts.append(JointPart(normal(2, 333, 2, 6), normal(2, 333, 2, 6), Mask(50)))
        parts.append(JointPart(normal(2, 300, 2, 6), normal(2, 300, 2, 6), Mask()))
    inputs = [q, *(x for part in parts for x in part[:2]), *([] if sink is None else [sink])]
    out, expected = joint_attention(q, parts, sink), dense(q, parts, sink)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    probe = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(out, inputs, probe), torch.autograd.grad(expected, inputs, probe), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


def test_half_precision_is_merged_in_fp32_and_compiles_as_one_operator() -> None:
    torch.manual_seed(0)
    q, k, v, near = (torch.randn(2, 70, 2, 8, requires_grad=True) for _ in range(4))
    sink = torch.zeros(2, requires_grad=True)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, near = tensors
        return joint_attention(q, [JointPart(k, v, Mask()), JointPart(near, v, Mask(5))], sink)

    expected = attend(q, k, v, near)
    with torch.autocast("cpu", torch.bfloat16):
        half = attend(q, k, v, near)
    assert half.dtype == torch.bfloat16
    assert (half - expected).abs().max() < 0.03
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(expected.sum(), (q, near, sink))
    for found, gradient in zip(
        torch.autograd.grad(compiled(q, k, v, near).sum(), (q, near, sink)), wanted, strict=True
    ):
        torch.testing.assert_close(found, gradient)


def test_kernels_without_a_log_sum_exp_are_refused() -> None:
    case = Case(device=torch.device("cpu"), dtype=torch.float32, head_dim=8, value_dim=8, lse=True)
    assert choose("auto", case) == "sdpa"
    assert str(case) == "causal + log-sum-exp, D 8, torch.float32 on cpu".replace("torch.", "")
    gpu = Case(
        device=torch.device("cuda"), capability=(9, 0), dtype=torch.bfloat16, head_dim=64, value_dim=64, lse=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        with pytest.raises(UserError, match=r'"flex", which cannot compute .*log-sum-exp.*: returns no log-sum-exp'):
            choose("flex", gpu)


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_len", [None, 9])
@pytest.mark.parametrize("storage", ["model", "fp8"])
def test_padded_sequences_and_windows_that_wrap(storage, max_len, tiny_config: Config, random_model) -> None:
    model = random_model(tiny_config(n_layers=4, kv=BOTH, qk_norm=True)).eval().requires_grad_(False)
    cache, starts = KVCache(model.config, max_len=max_len, storage=storage), torch.tensor([0, 3])
    out = [model(IDS[:, :5], cache=cache, starts=starts)]
    out += [model(IDS[:, t : t + 1], cache=cache) for t in range(5, 9)]
    found = torch.cat(out, dim=1)
    error = torch.stack([(found[0] - model(IDS[:1])[0]).norm(), (found[1, 3:] - model(IDS[1:, 3:])[0]).norm()]).max()
    assert error / found.norm() < (1e-5 if storage == "model" else 0.06)


@pytest.mark.parametrize("parts", [[1, 4, 4], [2, 1, 2, 4], [1] * 9])
@pytest.mark.parametrize(
    "kv",
    [{"preset": "ced", "window": 3, "sink": False}, BOTH, {"preset": "hysparse"}],
    ids=["ced", "joins and gates", "hysparse"],
)
def test_a_step_of_padding_alone_leaves_no_nan(kv, parts, tiny_config: Config, random_model) -> None:
    """No slot has a token that such a row sees, and without a sink its softmax has no term."""
    model = random_model(tiny_config(n_layers=4, kv=kv)).eval().requires_grad_(False)
    cache, starts = KVCache(model.config), torch.tensor([0, 3])
    found = torch.cat([model(part, cache=cache, starts=starts) for part in IDS.split(parts, dim=1)], dim=1)
    assert found.isfinite().all()
    torch.testing.assert_close(found[1, 3:], model(IDS[1:, 3:])[0], atol=1e-5, rtol=1e-5)


def test_packed_documents_are_independent(tiny_config: Config, random_model) -> None:
    model = random_model(tiny_config(n_layers=4, kv=BOTH)).eval().requires_grad_(False)
    ids, positions = torch.tensor([[0] * 5 + [1] * 4]), torch.tensor([[*range(5), *range(4)]])
    packed = model(IDS[:1], positions, ids)
    torch.testing.assert_close(packed[:, :5], model(IDS[:1, :5]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 5:], model(IDS[:1, 5:]), atol=1e-5, rtol=1e-5)


def test_layers_that_read_lower_slots_compute_one_token_of_a_prompt(tiny_config: Config, random_model) -> None:
    """Layers 1 and 2 write windows, which need the last tokens; layer 3 reads the slots of others alone."""
    model = random_model(tiny_config(n_layers=4, kv=BOTH)).eval().requires_grad_(False)
    queries: list[int] = []
    for block in model.blocks:
        block.attention.q_proj.register_forward_pre_hook(lambda _, inputs: queries.append(inputs[0].shape[1]))
    last = model.head(model.prefill(IDS, KVCache(model.config)))
    assert queries == [9, 6, 1, 1]
    torch.testing.assert_close(last, model(IDS)[:, -1:], atol=1e-5, rtol=1e-5)


def test_a_join_starts_without_preference_and_gates_at_one_half(tiny_config: Config) -> None:
    model = build_decoder(tiny_config(n_layers=4, kv=BOTH))
    assert torch.equal(model.blocks[1].attention.sink.weight, torch.zeros(4))
    assert model.blocks[3].attention.sink is None
    gates = model.blocks[2].attention.gates
    assert gates.weight.shape == (2 * 4, 24)
    assert torch.equal(gates(torch.randn(3, 24)), torch.full((2, 3, 4, 1), 0.5))


def test_sinks_and_gates_are_trained_and_saved_as_fusion_weights(tmp_path, tiny_config: Config, random_model) -> None:
    model = random_model(tiny_config(n_layers=4, kv=BOTH))
    (fusion,) = [group for group in parameter_groups(model, OptimConfig()) if group["name"] == "fusion"]
    names = {name for name, _ in model.named_parameters() if ".sink." in name or ".gates." in name}
    assert names == {"blocks.1.attention.sink.weight", "blocks.2.attention.gates.weight"}
    assert {id(p) for p in fusion["params"]} == {id(model.get_parameter(name)) for name in names}
    as_pretrained(model).save_pretrained(tmp_path)
    half = CLLMForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {half.model.get_parameter(name).dtype for name in names} == {torch.float32}
    assert half.model.blocks[1].attention.local.k_proj.weight.dtype == torch.bfloat16


# ---- cost and pictures -----------------------------------------------------------------------------------------------


def test_bytes_of_two_own_slots_equal_a_hand_count(tiny_config: Config) -> None:
    """Heads of 8 numbers of 2 bytes, twice; 64 tokens. Layer 0: 4 heads. Layer 1: 4 heads and a window of 3 tokens of
    1 head. Layer 2: a window of 4 tokens of 4 tied heads."""
    head = 8 * 2 * 2
    found = kv_bytes(tiny_config(n_layers=4, kv=BOTH))
    resident = 64 * 4 * head + 64 * 4 * head + 3 * head + 4 * 4 * head // 2
    read = 64 * 4 * head + (64 * 4 + 3) * head + (64 * 4 + 4 * 4 / 2) * head + (64 * 4 + 2 * 4 / 2) * head
    assert found.resident * 64 == resident
    assert found.read * 64 == read
    assert found.written == (4 + 4 + 1 + 2) * head


def test_flops_of_a_gated_layer_equal_a_hand_count(tiny_config: Config) -> None:
    """Layer 2 has 4 query heads of 8 channels, 4 tied KV heads and a gate for each query head and slot, all from 24
    channels, an MLP of width 32, and attention to all of 10 tokens and to the last 4."""
    model = meta_decoder(tiny_config(n_layers=4, kv=BOTH))
    weights = 24 * 32 + 24 * 32 + 24 * 32 + 8 * 24 + 3 * 24 * 32  # queries, K = V, output, gates, MLP
    seen = (1 + 10) / 2 + (1 + 2 + 3 + 7 * 4) / 10
    assert layer_flops_per_token(model, 10)[2] == 2 * weights + 2 * 4 * 2 * 8 * seen


def test_plans_as_text_as_pictures_and_as_yaml(tiny_config: Config) -> None:
    plan = tiny_config(n_layers=4, kv=BOTH).plan()
    assert "join own + own last 3, sink" in plan_table(plan)
    assert "gate 0 + own last 4" in plan_table(plan)
    assert "all + last 3" in plan_table(plan)
    assert "layer 1 owns a second slot, which it alone reads" in plan_drawing(plan)
    gids = {artist.get_gid() for artist in plan_figure(plan, "joins").axes[0].get_children()}
    assert {"keys of 1 into 3", "values of 2 into 3", "keys of 0 into 2", "keys of 2 into 2"} <= gids
    assert Explicit.model_validate({"layers": plan_entries(plan)}).expand(tiny_config(n_layers=4).shape) == plan
    whole = layers({"own": {}}, {"read": {"share": 0}})
    assert tiny_config(n_layers=2, kv=whole).plan().layers[1] == LayerPlan(keys=Share(0), values=Share(0))


# ---- refusals --------------------------------------------------------------------------------------------------------

OWN: dict[str, Any] = {"own": {}}


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ({"join": [1]}, "layer 2: join has 1 slot; allowed: two or more, or one with a sink"),
        (
            {"join": [0, {"own": {"tie": "kv", "only": "keys"}}]},
            "layer 2: join: own: has only and tie; allowed: at most one of only, tie, mix",
        ),
        ({"join": [0, {"own": {"window": 0}}]}, "kv.layers.2.read.join.1.own.window: input should be greater than or"),
        ({"join": [0, {"owns": {}}]}, 'kv.layers.2.read.join.1.owns: unknown key; did you mean "own"?'),
        ({"join": [0, "x"]}, "kv.layers.2.read.join.1: input should be a valid integer or mapping, got 'x'"),
        ({"join": [0, 0]}, "layer 2: join names a slot twice: [0, 0]"),
        ({"join": [0, {"share": -1}]}, "layer 2: join reads layer -1; layers count from 0"),
        ({"join": [0, 7]}, "layer 2: join reads layer 7; the model has layers 0 to 4"),
        ({"join": [0, 3]}, "layer 2: join reads layer 3 above it; allowed: layers below it, and slots of its own"),
        ({"join": [0, 2]}, "layer 2: join: names the layer itself; write its slot as own: {}"),
        ({"join": [0, {}]}, "layer 2: join: each slot is a layer, or one of share and own"),
        ({"join": [0, OWN, OWN, OWN]}, "layer 2: join: has 3 slots of its own; allowed: at most two"),
        ({"join": [0, {"own": {}, "window": 3}]}, "layer 2: join: write the window of an own slot inside of own"),
        (
            {"join": [0, {"own": {"only": "keys"}}]},
            "layer 2: join reads layer 2, which owns a slot of keys;",
        ),
        ({"join": [1, OWN]}, "layer 2: join sees all tokens of layer 1, which keeps 4 tokens"),
        ({"join": [{"share": 1, "window": 5}, OWN]}, "join sees a window of 5 of layer 1, which keeps 4 tokens"),
        ({"join": [OWN, {"own": {"input": 0}}]}, "the second own slot has input; allowed: in the first own slot alone"),
        ({"join": [OWN, {"own": {"mix": [0]}}]}, "the second own slot has mix; allowed: in the first own slot alone"),
        (
            {"join": [{"own": {"input": 0}}, {"own": {"kv_norm": True}}]},
            "the second own slot has kv_norm and the first one input 0; allowed: one of the two",
        ),
        ({"join": [0, {"own": {"n_kv_heads": 3}}]}, "layer 2: n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"join": [OWN, {"own": {"n_kv_heads": 3}}]}, "layer 2: n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"gate": [0, OWN, OWN]}, "layer 2: gate has 3 slots; allowed: two"),
        ({"gate": [0, {"own": {"window": 1}}]}, "layer 2: gate has a window of 1; allowed: 2 or more"),
        ({"gate": [0, OWN], "sink": True}, "layer 2: read: sink goes with join, not with gate"),
        ({"join": [0, OWN], "gates": "separate"}, "layer 2: read: gates goes with gate, not with join"),
        ({"fuse": [0], "join": [0, OWN]}, "layer 2: read: needs exactly one of share, fuse, join, gate"),
    ],
)
def test_reads_that_mean_nothing_are_refused(read: dict[str, Any], expected: str) -> None:
    kv = layers(OWN, {"own": {}, "window": 4}, {"read": read}, OWN, {"retention": {}})
    with pytest.raises(UserError) as error:
        validate(ModelConfig, {"d_model": 32, "n_heads": 4, "n_layers": 5, "kv": kv})
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_stands_beside_a_read_is_refused() -> None:
    join = {"join": [0, OWN]}
    for entry, expected in (
        ({"read": join, "own": {}}, "layer 1: has read.join and own; allowed: join with its slots and windows alone"),
        ({"read": join, "window": 3}, "layer 1: has read.join and window; allowed: join with its slots and windows al"),
        ({"read": {"share": 0}, "keys": {"share": 0}}, "layer 1: has read.share and keys; allowed: read alone"),
        ({"keys": join, "values": {"share": 0}}, "layer 1: keys: join reads keys and values at once; write read: {joi"),
    ):
        with pytest.raises(UserError) as error:
            validate(ModelConfig, {"d_model": 32, "n_heads": 4, "n_layers": 2, "kv": layers(OWN, entry)})
        assert expected in str(error.value)
    own, read = Own(n_kv_heads=2), Join((Part(0), Part(1)))
    for layer, expected in (
        (LayerPlan(own=own, local=own), "only a read of several slots, for keys and values alike, reads a local slot"),
        (LayerPlan(own=own, keys=read, values=Share(1)), "join is the keys and the values of the layer"),
        (LayerPlan(keys=read, values=read), "join does not read the own slot of the layer, or there is none"),
        (LayerPlan(own=own, local=own, keys=read, values=read), "join does not read the local slot of the layer"),
    ):
        with pytest.raises(UserError, match=expected):
            KVPlan.of([LayerPlan(own=own), layer])
    assert Gate((Part(0), Part(LOCAL, 2))).with_layers((3,)) == Gate((Part(3), Part(LOCAL, 2)))


def test_slots_are_compressed_and_their_windows_are_not(tiny_config: Config, random_model) -> None:
    kv = layers(OWN, OWN, {"read": {"join": [{"own": {"input": 1}}, WINDOW]}}, {"read": {"gate": [2, WINDOW]}})
    model = random_model(tiny_config(n_layers=4, kv=kv)).eval().requires_grad_(False)
    cache = KVCache(model.config)
    model(IDS[:, :8], cache=cache)
    compressed = compress_cache(cache, parse("xkv:group=3,rank_k=8,rank_v=8"))  # the ranks of 8 tokens: exact
    assert [type(store).__name__ for store in compressed.stores.values()] == ["CompressedSlot"] * 3 + [
        "GrowingSlot"
    ] * 2
    torch.testing.assert_close(model(IDS[:, 8:], cache=compressed), model(IDS)[:, 8:], atol=1e-3, rtol=1e-3)
    with pytest.raises(UserError, match=r"cache.layers\[2\].keys: the layer reads several slots by join: join own"):
        cache.layers[2].keys  # noqa: B018


def test_what_knows_one_slot_a_layer_refuses_more_by_name(tmp_path, tiny_config: Config, random_model) -> None:
    teacher = build_traced(tiny_config(n_layers=4)).requires_grad_(False)
    student = build_traced(tiny_config(n_layers=4, kv=BOTH))
    expected = "layer 1 reads several slots at once, join own"
    for method in ("copy", "mean", "ridge", "fit"):
        with pytest.raises(UserError, match=expected):
            init_student(student, teacher, InitFrom(method=method))
    with pytest.raises(UserError, match=r"layer 1 of the model to start from owns .* and reads several slots at once"):
        init_student(teacher, student, InitFrom(method="copy"))
    same = build_traced(student.config)
    same.load_state_dict(random_model(student.config).state_dict())
    init_student(student, same, InitFrom(method="copy"))
    assert torch.equal(student(IDS), same(IDS))
    with pytest.raises(UserError, match="layer 1: reads several slots, join own"):
        export_family(same.config, same.state_dict(), tmp_path / "llama")

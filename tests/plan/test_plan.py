"""What a KV plan refuses, naming the layer, and the questions it answers."""

import pytest

from cllm.errors import PlanError
from cllm.plan.plan import Fuse, Iterations, KVPlan, Latent, LayerPlan, Own, Retention, Share
from cllm.plan.presets import MHA
from cllm.plan.shape import Shape

OWN = LayerPlan(own=Own(n_kv_heads=2))
LATENT = Latent(kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)


def read(keys: int, values: int | None = None, window: int | None = None) -> LayerPlan:
    return LayerPlan(keys=Share(keys), values=Share(keys if values is None else values), window=window)


def fuse(keys: tuple[int, ...], values: tuple[int, ...] | None = None) -> LayerPlan:
    return LayerPlan(keys=Fuse(keys), values=Fuse(keys if values is None else values))


def latent() -> LayerPlan:
    return LayerPlan(own=LATENT)


REFUSED = {
    "source owns nothing": (
        [OWN, read(0), read(1)],
        "layer 2: keys come from layer 1, which owns nothing; owners: [0]",
    ),
    "only the value source owns nothing": (
        [OWN, read(0), read(0, 1)],
        "layer 2: values come from layer 1, which owns nothing; owners: [0]",
    ),
    "owns nothing and reads itself": ([OWN, LayerPlan()], "layer 1: keys come from itself, which owns nothing"),
    "nobody owns": ([LayerPlan()], "layer 0: keys come from itself, which owns nothing; owners: none"),
    "source out of range": ([OWN, read(2)], "layer 1: keys come from layer 2; the model has layers 0 to 1"),
    "negative source": ([OWN, read(-1)], "layer 1: keys come from layer -1; the model has layers 0 to 1"),
    "fuse names no layer": ([OWN, fuse(())], "layer 1: keys: fuse names no layer"),
    "fuse names a layer twice": ([OWN, fuse((0,), (0, 0))], "layer 1: values: fuse names a layer twice: [0, 0]"),
    "fused slots of different heads": (
        [OWN, LayerPlan(own=Own(n_kv_heads=1)), fuse((0, 1))],
        "layer 2: keys: cannot fuse slots of different shapes: layer 0 has 2 KV heads, layer 1 has 1 KV heads",
    ),
    "keys and values of different heads": (
        [OWN, LayerPlan(own=Own(n_kv_heads=1)), read(1, 0)],
        "layer 2: its keys have 1 KV heads (slot 1) and its values 2 (slot 0); they must be equal",
    ),
    "windowed slot through full attention": (
        [LayerPlan(own=Own(n_kv_heads=2), window=4), read(0)],
        "layer 1: has full attention, but its keys come from layer 0, which keeps 4 tokens",
    ),
    "windowed slot through a wider window": (
        [LayerPlan(own=Own(n_kv_heads=2), window=4), read(0, window=5)],
        "layer 1: has a window of 5, but its keys come from layer 0, which keeps 4 tokens",
    ),
    "windowed values through full attention": (
        [OWN, LayerPlan(own=Own(n_kv_heads=2), window=4), read(0, 1)],
        "layer 2: has full attention, but its values come from layer 1, which keeps 4 tokens",
    ),
    "empty window": ([LayerPlan(own=Own(n_kv_heads=2), window=0)], "layer 0: window is 0; allowed: 1 or more"),
    "cycle without iterations": (
        [OWN, read(2), OWN],
        "layer 1: reads layer 2 above it, a cycle that only iterative training",
    ),
    "values from above without iterations": ([OWN, read(0, 2), OWN], "layer 1: reads layer 2 above it"),
    "fuse latents": ([latent(), latent(), fuse((0, 1))], "layer 2: fuses the slot of layer 0, which is a latent"),
    "fuse one latent": ([latent(), fuse((0,))], "layer 1: fuses the slot of layer 0, which is a latent"),
    "half a latent": (
        [latent(), latent(), read(1, 0)],
        "layer 2: keys come from layer 1 and values from layer 0; a latent is read whole",
    ),
    "a latent's keys with a slot's values": (
        [latent(), OWN, read(0, 1)],
        "layer 2: keys come from layer 0 and values from layer 1; a latent is read whole",
    ),
    "a shared retention state": (
        [LayerPlan(own=Retention()), read(0)],
        "layer 1: reads layer 0, whose recurrent state no other layer can share",
    ),
    "a fused retention state": ([LayerPlan(own=Retention()), fuse((0,))], "layer 1: fuses the slot of layer 0"),
}


REFUSED |= {
    "keys that no layer reads": (
        [OWN, LayerPlan(own=Own(n_kv_heads=2), keys=Share(0))],
        "layer 1: its keys are read by no layer; leave `keys` out of layer 1, which then reads its own, or let another",
    ),
    "values that no layer reads": (
        [OWN, LayerPlan(own=Own(n_kv_heads=2), values=Share(0))],
        "layer 1: its values are read by no layer; leave `values` out of layer 1",
    ),
    "keys that no layer reads, values that another reads": (
        [OWN, LayerPlan(own=Own(n_kv_heads=2), keys=Share(0), values=Share(0)), read(0, 1)],
        "layer 1: its keys are read by no layer",
    ),
    "values that no layer reads, keys that another fuses": (
        [OWN, LayerPlan(own=Own(n_kv_heads=2), keys=Share(0), values=Share(0)), fuse((0, 1), (0,))],
        "layer 1: its values are read by no layer",
    ),
    "a window of the token itself": (
        [LayerPlan(own=Own(n_kv_heads=2), window=1)],
        "layer 0: window is 1, with which a query sees one token at most, so that its queries and keys have no effect; "
        "allowed: 2 or more, or null",
    ),
}
ONCE = Iterations(forward=1, backward=1)
REFUSED_IN_A_CYCLE = {
    "an owner that layers below alone read": (
        [read(1), LayerPlan(own=Own(n_kv_heads=2), keys=Share(2), values=Share(2)), OWN],
        "layer 1: its keys are read only by layers below it (0), and with kv.iterations.backward 1 these pass no "
        "gradient back; set kv.iterations.backward to 2 or more, or let layer 1 or one above it read them",
    ),
    "an owner that does not read its own values": (
        [OWN, read(0, 3), read(0, 3), LayerPlan(own=Own(n_kv_heads=2), values=Share(0))],
        "layer 3: its values are read only by layers below it (1-2), and with",
    ),
    "a latent that layers below alone read": (
        [read(1), LayerPlan(own=LATENT, keys=Share(2), values=Share(2)), latent()],
        "layer 1: its keys are read only by layers below it (0), and with",
    ),
    "a window of the token itself and the one before": (
        [read(1, window=2), OWN],
        "layer 0: window is 2, with which a query sees one token at most beside itself, so that its queries and keys "
        "have no effect; allowed: 3 or more, or null",
    ),
}


@pytest.mark.parametrize("case", REFUSED_IN_A_CYCLE)
def test_refused_in_a_cycle(case):
    layers, message = REFUSED_IN_A_CYCLE[case]
    with pytest.raises(PlanError) as error:
        KVPlan.of(layers, ONCE)
    assert str(error.value).startswith(message)


def test_a_second_pass_with_gradient_reaches_owners_that_layers_below_alone_read():
    layers = [read(1), LayerPlan(own=Own(n_kv_heads=2), keys=Share(2), values=Share(2)), OWN]
    assert KVPlan.of(layers, Iterations(forward=0, backward=2)).owners == (1, 2)


def test_an_owner_that_a_layer_above_the_cycle_reads_needs_one_pass_with_gradient():
    layers = [OWN, read(0, 2), LayerPlan(own=Own(n_kv_heads=2), values=Share(0)), read(0, 2)]
    assert KVPlan.of(layers, ONCE).owners == (0, 2)


def test_a_single_pass_over_a_cycle_is_refused():
    with pytest.raises(PlanError, match=r"layer 0: reads layer 1 above it, of which a single pass knows nothing"):
        KVPlan.of([read(1), OWN], Iterations(forward=0, backward=1))


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    layers, message = REFUSED[case]
    with pytest.raises(PlanError) as error:
        KVPlan.of(layers)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_retention_inside_a_cycle_is_refused():
    with pytest.raises(PlanError, match=r"layer 1: a recurrent state inside the cyclic layers 0 to 2"):
        KVPlan.of([read(2), LayerPlan(own=Retention()), OWN], Iterations())


@pytest.mark.parametrize("iterations", [Iterations(forward=-1), Iterations(backward=0)])
def test_iterations_without_a_gradient_pass_are_refused(iterations):
    with pytest.raises(PlanError, match=r"kv.iterations is forward -?\d, backward \d; allowed: forward 0 or more"):
        KVPlan.of([read(1), OWN], iterations)


def test_narrower_window_than_the_slot_keeps_is_fine():
    plan = KVPlan.of([LayerPlan(own=Own(n_kv_heads=2), window=8), read(0, window=8), read(0, window=3)])
    assert [layer.window for layer in plan.layers] == [8, 8, 3]


def test_an_owner_reads_itself_unless_told_otherwise():
    plan = KVPlan.of([OWN, LayerPlan(own=Own(n_kv_heads=2), keys=Share(0)), read(1)])
    assert (plan.keys(0), plan.values(0)) == (Share(0), Share(0))
    assert (plan.keys(1), plan.values(1)) == (Share(0), Share(1))


def test_reads_are_the_owners_of_keys_and_values_in_order():
    plan = KVPlan.of([OWN, OWN, OWN, read(2, 0), LayerPlan(keys=Fuse((2, 1)), values=Share(0))])
    assert [plan.reads(i) for i in range(5)] == [(0,), (1,), (2,), (0, 2), (0, 1, 2)]
    assert plan.owners == (0, 1, 2)


def test_last_reader_is_the_highest_layer_that_needs_the_slot():
    plan = KVPlan.of([OWN, OWN, OWN, read(2, 0), read(1)])
    assert [plan.last_reader(j) for j in (0, 1, 2)] == [3, 4, 3]


def test_shared_owners_are_those_that_another_layer_reads():
    assert KVPlan.of([OWN, OWN, OWN, read(2, 0), OWN]).shared == {0, 2}
    assert KVPlan.of([read(1), OWN], Iterations()).shared == {1}


def test_last_reader_of_a_slot_that_only_lower_layers_read():
    layers = [read(1), LayerPlan(own=Own(n_kv_heads=2), keys=Share(2), values=Share(2)), OWN]
    assert KVPlan.of(layers, Iterations()).last_reader(1) == 0


@pytest.mark.parametrize(
    ("targets", "spans"),
    [
        ([0, 0, 2, 2], ()),
        ([0, 4, 4, 4, 4, 5], ((1, 4),)),
        ([0, 2, 2, 2, 2, 5], ((1, 2),)),
        ([2, 2, 2, 5, 5, 5], ((0, 2), (3, 5))),
        ([3, 5, 3, 3, 3, 5, 6], ((0, 5),)),
        ([1, 1, 3, 3], ((0, 1), (2, 3))),
    ],
)
def test_cyclic_spans_run_from_the_first_reader_to_the_highest_target(targets, spans):
    layers = [OWN if t == i else read(t) for i, t in enumerate(targets)]
    plan = KVPlan.of(layers, Iterations())
    assert plan.cyclic_spans() == spans
    assert [plan.reads_above(i) for i in range(len(plan))] == [t > i for i, t in enumerate(targets)]


def test_slot_that_no_layer_reads_is_refused():
    layers = [LayerPlan(own=Own(n_kv_heads=2)), LayerPlan(own=Own(n_kv_heads=2), keys=Share(0), values=Share(0))]
    with pytest.raises(PlanError, match="layer 1: owns a slot that no layer reads"):
        KVPlan.of(layers)


def test_layer_with_a_recurrent_state_that_reads_a_slot_is_refused():
    layers = [LayerPlan(own=Own(n_kv_heads=2)), LayerPlan(own=Retention(), keys=Share(0), values=Share(0))]
    with pytest.raises(PlanError, match="layer 1: keeps a recurrent state and reads layer 0"):
        KVPlan.of(layers)


def test_full_every_without_a_window_is_refused():
    with pytest.raises(PlanError, match=r"model\.kv\.full_every is 6"):
        MHA(full_every=6).expand(Shape(n_layers=12, n_heads=4, head_dim=8))

"""Starts against numpy.linalg.lstsq and numpy.linalg.svd on the tokens themselves.

The package keeps sums of products and solves normal equations. Here every token is a row, and a pull towards a start is
further rows. No text is planted: what is fitted is not exact, so a wrong weighting or a wrong target shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cllm.config.uptraining import InitFrom
from cllm.uptrain.calibrate import observe
from cllm.uptrain.decoder import TracedDecoder, attention_of, block_of, owner_of
from cllm.uptrain.init import init_student

pytestmark = pytest.mark.usefixtures("_no_gradients")
RIDGE = 0.03
SETTINGS: dict[str, Any] = {"method": "fit", "ridge": RIDGE, "align": "none"}


@pytest.fixture
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def text() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 32, (3, 20), generator=draw)} for _ in range(3)]


def tokens(teacher: TracedDecoder, text, i: int, name: str) -> np.ndarray:
    """(N, channels): keys before RoPE (`k`), after it (`rotated`) or values (`v`) of layer `i`, or its input (`x`)."""
    found = []
    for seen in observe(teacher, text):
        x = block_of(teacher, i).attention_norm(seen.inputs[i])
        slot = owner_of(teacher, i)(seen.inputs[i], x, seen.rope(i))
        flat = {"x": x, "rotated": slot.k.flatten(2), "v": slot.v.flatten(2), "k": owner_of(teacher, i).k_proj(x)}[name]
        found.append(flat.flatten(0, 1))
    return torch.cat(found).double().numpy()


def lstsq(x: np.ndarray, y: np.ndarray, start: np.ndarray, ridge: float = RIDGE) -> np.ndarray:
    """The W (channels, inputs) with the least Σ |y - W x|² + ρ |W - start|², ρ = ridge times the mean of Σ x²."""
    pull = math.sqrt(ridge * (np.abs(x) ** 2).sum() / x.shape[1])
    rows = np.concatenate((x, pull * np.eye(x.shape[1], dtype=x.dtype)))
    return np.linalg.lstsq(rows, np.concatenate((y, pull * start.T)), rcond=None)[0].T


def started(new_student, teacher, kv, text, **options: Any) -> TracedDecoder:
    student = new_student(teacher, kv)
    init_student(student, teacher, InitFrom(**SETTINGS | options), text)
    return student


def weight_of(linear: torch.nn.Linear) -> np.ndarray:
    """(channels, inputs); a bias is the last column."""
    bias = [] if linear.bias is None else [linear.bias[:, None]]
    return torch.cat((linear.weight, *bias), dim=1).detach().double().numpy()


def close(found: Any, wanted: Any) -> None:
    found, wanted = (torch.as_tensor(np.asarray(x)) for x in (found, wanted))
    torch.testing.assert_close(found.to(wanted.dtype), wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_projections_of_another_layers_output(tiny_config, make_teacher, new_student, text, bias: bool) -> None:
    """Of the first layer of each group; x = norm_3(h), the norm of the layer above the one whose output it is."""
    teacher = make_teacher(tiny_config(n_layers=6, kv_bias=bias))
    student = started(new_student, teacher, {"preset": "swiftkv", "n_lower": 2, "group": 2}, text)
    x = tokens(teacher, text, 2, "x")
    x = np.concatenate((x, np.ones((len(x), 1))), axis=1) if bias else x
    for i in (2, 4):
        for name, half in (("k_proj", "k"), ("v_proj", "v")):
            start = weight_of(getattr(owner_of(teacher, i), name))
            wanted = lstsq(x, tokens(teacher, text, i, half), start)
            assert i == 2 or np.abs(wanted - start).max() > 0.05
            close(weight_of(getattr(owner_of(student, i), name)), wanted)


def test_projections_that_several_layers_share(tiny_config, make_teacher, new_student, text) -> None:
    """`ridge`: the owner's projection against the keys and values of all readers, all rows alike."""
    teacher = make_teacher(tiny_config(n_layers=3))
    student = started(new_student, teacher, {"preset": "cla", "factor": 3, "kv_norm": False}, text, method="ridge")
    x = tokens(teacher, text, 0, "x")
    for name, half in (("k_proj", "k"), ("v_proj", "v")):
        mean = sum(tokens(teacher, text, i, half) for i in range(3)) / 3
        close(
            weight_of(getattr(owner_of(student, 0), name)),
            lstsq(x, mean, weight_of(getattr(owner_of(teacher, 0), name))),
        )


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_real_fusion_weights(tiny_config, make_teacher, new_student, text, granularity: str, per_head: bool) -> None:
    """One system for each group of channels that has one weight; both channels of a rotated pair have one."""
    teacher = make_teacher(tiny_config(n_layers=4))
    kv = {"preset": "fusedkv", "granularity": granularity, "per_head": per_head}
    student = started(new_student, teacher, kv, text)
    for part, name, channels in (("keys", "rotated", 4), ("values", "v", 8)):
        sources = [tokens(teacher, text, j, name).reshape(-1, 4, 8) for j in (0, 1)]
        own = tokens(teacher, text, 3, name).reshape(-1, 4, 8)
        module = getattr(attention_of(student, 3), part)
        assert module.weight.shape == (2, 4 if per_head else 1, channels if granularity == "channel" else 1)
        start = np.array([[0.0, 1.0]] if part == "keys" else [[1.0, 0.0]])
        for g in range(module.weight.shape[1]):
            for c in range(module.weight.shape[2]):
                heads = [g] if per_head else range(4)
                mine = range(8) if granularity == "scalar" else [n for n in range(8) if n % channels == c]
                x, y = (
                    np.concatenate([t[:, h, n] for h in heads for n in mine])[:, None]
                    for t in (np.stack(sources, -1), own)
                )
                close(module.weight[:, g, c], lstsq(x.squeeze(1), y, start)[0])


def test_complex_and_matrix_fusion_weights(tiny_config, make_teacher, new_student, text) -> None:
    """A complex system of two unknowns for each pair and head, and a real one of 2 D for each head."""
    teacher = make_teacher(tiny_config(n_layers=4, kv={"preset": "gqa", "n_kv_heads": 2}))
    kv = {"preset": "fusedkv", "keys": "complex", "values": "matrix", "n_kv_heads": 2}
    student = started(new_student, teacher, kv, text)
    keys = [tokens(teacher, text, i, "rotated").reshape(-1, 2, 8) for i in (0, 1, 2)]
    values = [tokens(teacher, text, i, "v").reshape(-1, 2, 8) for i in (0, 1, 2)]
    pairs = [k[..., :4] + 1j * k[..., 4:] for k in keys]
    for g in range(2):
        for p in range(4):
            wanted = lstsq(
                np.stack([z[:, g, p] for z in pairs[:2]], 1), pairs[2][:, g, p, None], np.array([[0, 1 + 0j]])
            )
            real, imaginary = attention_of(student, 2).keys.weight[:, g, :, p].unbind(1)
            close(torch.complex(real, imaginary).to(torch.complex128), wanted[0])
        x = np.concatenate([v[:, g] for v in values[:2]], axis=1)
        wanted = lstsq(x, values[2][:, g], np.concatenate((np.eye(8), np.zeros((8, 8))), axis=1))
        close(attention_of(student, 2).values.weight[:, g].flatten(0, 1), wanted.T)


def test_one_projection_for_keys_and_values(tiny_config, make_teacher, new_student, text) -> None:
    """The principal directions of keys and values side by side, both of the same size, by a SVD of the tokens."""
    teacher = make_teacher(tiny_config(n_layers=2))
    student = started(new_student, teacher, {"preset": "kv_tie"}, text, ridge=0.0, align="map")
    x, k, v = (tokens(teacher, text, 1, name) for name in ("x", "k", "v"))
    tied = x @ weight_of(attention_of(student, 1).owner.kv_proj).T
    for g in range(4):
        mine = slice(8 * g, 8 * g + 8)
        beta = np.linalg.norm(k[:, mine]) / np.linalg.norm(v[:, mine])
        both = np.concatenate((k[:, mine], beta * v[:, mine]), axis=1)
        u, s, wt = np.linalg.svd(both, full_matrices=False)
        close(tied[:, mine], ((u * s)[:, :8] @ wt[:8])[:, :8])
        # The values' map is folded into the output projection.
        best = np.linalg.lstsq(tied[:, mine], v[:, mine], rcond=None)[0]
        theirs, ours = (attention_of(m, 1).o_proj.weight[:, mine].double().numpy() for m in (teacher, student))
        close(tied[:, mine] @ ours.T, tied[:, mine] @ best @ theirs.T)


def test_a_latent_for_several_layers(tiny_config, make_teacher, new_student, text) -> None:
    """The channels without position of all readers' keys, and their values, predicted from the owner's input and cut to
    the rank by a SVD of the tokens."""
    teacher = make_teacher(tiny_config(n_layers=3))
    latent = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 8}
    student = new_student(teacher, {"preset": "xmla", "factor": 3, **latent})
    init_student(student, teacher, InitFrom(method="svd", ridge=0.0), text)
    y = tokens(teacher, text, 0, "x")
    predicted: list[list[np.ndarray]] = [[], []]
    for i in range(3):
        linear = np.linalg.lstsq(y, tokens(teacher, text, i, "x"), rcond=None)[0]
        k, v = (y @ linear @ weight_of(m).T for m in (owner_of(teacher, i).k_proj, owner_of(teacher, i).v_proj))
        kept = [1, 2, 3, 5, 6, 7]  # without the pair (0, 4), which has the highest frequency
        predicted[0].append(k.reshape(-1, 4, 8)[:, :, kept].reshape(len(k), -1))
        predicted[1].append(v)
    keys, values = (np.concatenate(of_layers, axis=1) for of_layers in predicted)
    balance = np.linalg.norm(values) / np.linalg.norm(keys)
    u, s, wt = np.linalg.svd(np.concatenate((balance * keys, values), axis=1), full_matrices=False)
    wanted = (u * s)[:, :10] @ wt[:10]
    down = block_of(student, 0).attention.owner.down_proj.weight[:10].double().numpy()
    ups = [block_of(student, i).attention.kv_up_proj.weight.double().numpy().reshape(4, 14, 10) for i in range(3)]
    found_k = np.concatenate([(y @ down.T) @ up[:, :6].reshape(24, 10).T for up in ups], axis=1)
    found_v = np.concatenate([(y @ down.T) @ up[:, 6:].reshape(32, 10).T for up in ups], axis=1)
    close(np.concatenate((balance * found_k, found_v), axis=1), wanted)


@pytest.mark.parametrize("preset", ["svformer", "yoco_pp"])
def test_halves_and_mixtures_have_the_teachers_projections(
    tiny_config, make_teacher, new_student, text, preset
) -> None:
    teacher = make_teacher(tiny_config(n_layers=4, kv_bias=True))
    student = started(new_student, teacher, {"preset": preset}, text)
    for i in student.plan.owners:
        for name in ("k_proj", "v_proj"):
            if (linear := getattr(owner_of(student, i), name)) is not None:
                np.testing.assert_array_equal(weight_of(linear), weight_of(getattr(owner_of(teacher, i), name)))


def test_values_shared_after_folding(tiny_config, make_teacher, new_student, text) -> None:
    """`fold: mean`: the mean of regressions of each reader's folded values on the owner's input."""
    teacher = make_teacher(tiny_config(n_layers=3))
    kv = {"preset": "cla", "factor": 3, "kv_norm": False}
    student = started(new_student, teacher, kv, text, fold="mean", ridge=0.0)
    x = tokens(teacher, text, 0, "x")
    values = [tokens(teacher, text, i, "v").reshape(-1, 4, 8) for i in range(3)]
    targets = [values[0]]
    for own in values[1:]:
        targets.append(folded(values[0], own))
    mean = sum(targets).reshape(len(x), -1) / 3
    close(weight_of(owner_of(student, 0).v_proj), np.linalg.lstsq(x, mean, rcond=None)[0].T)


def root(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**power) @ vectors.T


def folded(anchor: np.ndarray, own: np.ndarray) -> np.ndarray:
    """VFOLD: own T in the order of the heads of the anchor, T = S22^(-1/2) W Uᵀ S11^(1/2). Heads are paired so that the
    sum of |anchor T⁻¹ - own| is least."""
    mapped, cost = {}, {}
    for i, j in itertools.product(range(4), repeat=2):
        a, b = anchor[:, i], own[:, j]
        s11, s22 = (t.T @ t + 1e-4 * np.trace(t.T @ t) / 8 * np.eye(8) for t in (a, b))
        u, _, wt = np.linalg.svd(root(s11, -0.5) @ a.T @ b @ root(s22, -0.5))
        t = root(s22, -0.5) @ wt.T @ u.T @ root(s11, 0.5)
        mapped[i, j], cost[i, j] = b @ t, np.linalg.norm(a @ np.linalg.inv(t) - b)
    order = min(itertools.permutations(range(4)), key=lambda p: sum(cost[i, j] for i, j in enumerate(p)))
    return np.stack([mapped[i, j] for i, j in enumerate(order)], axis=1)

"""Kinds that cannot be used are refused when they are registered or built, by one line that names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cllm.config import ModelConfig
from cllm.errors import PlanError, UserError
from cllm.model.sizes import meta_decoder
from cllm.model.sources import FusedRead, Reader
from cllm.plan import registry
from cllm.plan.fuse import Fuse
from cllm.plan.kinds import Own, Share
from cllm.plan.latent import Latent
from cllm.plan.presets import Preset, register_preset
from cllm.plan.registry import mixer_module, owner_module, read_module, register_read, register_source
from cllm.section import Section
from cllm.uptrain.decoder import build_traced
from cllm.uptrain.owners import copy_owners


@pytest.fixture(autouse=True)
def open_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registries as they are before the schema is made; what a test registers is forgotten."""
    monkeypatch.setattr(registry, "_closed", False)
    for name in ("SOURCES", "READS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def settings(**options: Any) -> type[Section]:
    """Settings with these options, all of them `int | None`."""
    return type("Settings", (Section,), {"__annotations__": dict.fromkeys(options, int | None), **options})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"key": "x"}, "X: its Settings have no field 'x', which names the owners"),
        ({"key": "x", "Settings": None}, "X: has no Settings"),
        ({"key": None}, "X: has no key"),
        ({"key": "x", "Settings": settings(x=None, init=None)}, "X: its option 'init' is one of Fuse"),
        ({"key": "init", "Settings": settings(init=None)}, "X: its option 'init' is one of Fuse"),
        ({"key": "share", "Settings": settings(share=None)}, "X: its option 'share' is one of Share"),
    ],
)
def test_a_kind_of_read_that_could_not_be_told_from_others_is_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        register_read(type("X", (Share,), members))


@pytest.mark.parametrize("key", ["window", "keys", "layers", "values"])
def test_a_kind_of_source_is_not_called_as_a_key_of_every_entry(key: str) -> None:
    with pytest.raises(PlanError, match=f"X: its key '{key}' is one of every entry"):
        register_source(type("X", (Own,), {"key": key}))


def test_a_preset_needs_a_name_and_a_plan() -> None:
    class Nameless(Preset):
        pass

    class Empty(Preset):
        preset: str = "empty"

    with pytest.raises(PlanError, match="Nameless: has no name"):
        register_preset(Nameless)
    with pytest.raises(PlanError, match="Empty: has no method expand"):
        register_preset(Empty)


@pytest.fixture
def read_module_of_fuse() -> Iterator[dict[type, Any]]:
    """The registry of read modules; what a test puts there is taken out again."""
    before = dict(read_module._by_kind)
    yield read_module._by_kind
    read_module._by_kind.clear()
    read_module._by_kind.update(before)


FUSED = {"vocab_size": 32, "d_model": 16, "n_layers": 4, "n_heads": 2, "kv": {"preset": "fusedkv"}}


def test_a_buffer_in_a_reader_is_refused_and_not_lost(read_module_of_fuse) -> None:
    class Scaled(FusedRead):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.register_buffer("factor", torch.full((1,), 0.5))

    read_module_of_fuse[Fuse] = Scaled
    with pytest.raises(TypeError, match=r"keys \(Scaled\) has the buffer factor, whose content"):
        meta_decoder(ModelConfig.model_validate(FUSED))


def test_a_reader_that_cannot_be_initialised_is_refused_before_training(read_module_of_fuse) -> None:
    class Forgetful(Reader):
        def __init__(self, read: Any, part: Any, places: Any, n_kv_heads: int, head_dim: int):
            super().__init__(places, part)
            self.weight = torch.nn.Parameter(torch.empty(1))

    read_module_of_fuse[Fuse] = Forgetful
    with pytest.raises(TypeError, match=r"keys \(Forgetful\) has parameters but no reset_parameters"):
        meta_decoder(ModelConfig.model_validate(FUSED))


def test_a_slot_that_is_not_keys_and_values_needs_a_mixer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.model_validate({**FUSED, "kv": {"preset": "mla"}})
    monkeypatch.delitem(mixer_module._by_kind, Latent)
    with pytest.raises(PlanError, match="layer 0: Latent is not keys and values and has no mixer"):
        meta_decoder(config)


def test_projections_are_copied_into_the_slots_they_are_made_for_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left as they were drawn, they would make a student that has learned nothing."""

    class Narrow(owner_module.of(Own(n_kv_heads=2))):  # type: ignore[misc]
        pass

    teacher = build_traced(ModelConfig.model_validate({**FUSED, "kv": {"preset": "mha"}}))
    monkeypatch.setitem(owner_module._by_kind, Own, Narrow)
    student = build_traced(ModelConfig.model_validate(FUSED))
    with pytest.raises(UserError, match="layer 0 owns a slot by own, which cannot be copied from another model"):
        copy_owners(student, teacher, {})

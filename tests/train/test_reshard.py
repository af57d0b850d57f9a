"""Optimizer states put together from shards: layouts written by hand. DeepSpeed's own are in test_strategy.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cllm.errors import UserError
from cllm.train.reshard import _Stage3, _Stages1And2, shards


def write(folder: Path, states: list[Any], **model_states: Any) -> Path:
    """A checkpoint with a shard of each process."""
    (folder / "checkpoint").mkdir()
    for rank, state in enumerate(states):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": state}, folder / "checkpoint" / name)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        torch.save(model_states, folder / "checkpoint" / name)
    return folder


def moments(*values: float) -> dict[str, Any]:
    flat = torch.tensor(values)
    return {"step": torch.tensor(3.0), "exp_avg": flat, "exp_avg_sq": flat * 10}


def test_shards_are_in_the_order_of_ranks_and_complete(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a checkpoint of a ZeRO run: it has no optimizer states"):
        shards(tmp_path)
    write(tmp_path, [None] * 11)
    names = [file.name for file in shards(tmp_path)]
    assert names == [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(11)]
    (tmp_path / "checkpoint" / names[4]).unlink()
    with pytest.raises(UserError, match="damaged: the optimizer states of process 4 are missing"):
        shards(tmp_path)


def test_a_parameter_that_lies_in_two_shards_is_put_together(tmp_path: Path) -> None:
    """ZeRO-1 and 2: group 0 has a (2, 2) and then b (3), with a number of padding; group 1 has c (2)."""

    def part(start: int, numel: int) -> SimpleNamespace:
        return SimpleNamespace(start=start, numel=numel)

    first = {
        "param_slice_mappings": [{"a": part(0, 4)}, {"c": part(0, 1)}],
        "base_optimizer_state": {"state": {0: moments(1, 2, 3, 4), 1: moments(8)}},
    }
    second = {
        "param_slice_mappings": [{"b": part(0, 3)}, {"c": part(0, 1)}],
        "base_optimizer_state": {"state": {0: moments(5, 6, 7, 0), 1: moments(9)}},
    }
    read = _Stages1And2(shards(write(tmp_path, [first, second])))
    a, b, c = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((2, 2), (3,), (2,)))
    assert read.state("a", "exp_avg", a).tolist() == [[1, 2], [3, 4]]
    assert read.state("b", "exp_avg", b).tolist() == [5, 6, 7]
    assert read.state("c", "exp_avg_sq", c).tolist() == [80, 90]
    assert read.state("d", "exp_avg", a) is None


def test_equal_parts_of_every_parameter_are_put_together_without_padding(tmp_path: Path) -> None:
    """ZeRO-3: a (3) in one tensor of each shard, b (4) and c (1, 2) in a second."""
    shapes = [{"a": torch.Size([3])}, {"b": torch.Size([4]), "c": torch.Size([1, 2])}]
    first = {"optimizer_state_dict": {"state": {0: moments(1, 2), 1: moments(4, 5, 8)}}}
    second = {"optimizer_state_dict": {"state": {0: moments(3, 0), 1: moments(6, 7, 9)}}}
    read = _Stage3(shards(write(tmp_path, [first, second], param_shapes=shapes)))
    empty: Any = SimpleNamespace
    assert read.state("a", "exp_avg", empty(ds_shape=[3])).tolist() == [1, 2, 3]
    assert read.state("b", "exp_avg", empty(ds_shape=[4])).tolist() == [4, 5, 6, 7]
    assert read.state("c", "exp_avg_sq", empty(ds_shape=[1, 2])).tolist() == [[80, 90]]
    assert read.state("d", "exp_avg", empty(ds_shape=[3])) is None

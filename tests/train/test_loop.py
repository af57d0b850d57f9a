"""A run whose plan has a loop: trained, stored and loaded with one set of weights, and started from no other model."""

from __future__ import annotations

import pytest
import torch

from cllm.errors import UserError
from cllm.runs import load_run
from cllm.runs.checkpoint import read_weights
from cllm.train.run import train
from cllm.uptrain.start import make_student

LOOP = ("--model.kv.preset", "yoco_u", "--model.kv.window", "5", "--train.steps", "2", "--train.validate_every", "2")


def test_a_run_trains_stores_and_loads_a_loop(tiny):
    folder = train(tiny(*LOOP, "--train.checkpoint_every", "1", "--optim.name", "muon"))
    rows = {row["step"]: row["val/loss"] for row in folder.metrics() if "val/loss" in row}
    assert rows[2] < rows[0]
    model = load_run(folder.path)[0]
    assert model.blocks[1].mlp.up_proj is model.blocks[0].mlp.up_proj
    stored = read_weights(folder.checkpoints()[-1][1])
    assert list(stored) == [name for name, _ in model.named_parameters()]
    (_, before), *_, (_, after) = folder.checkpoints()
    name = "blocks.0.mlp.up_proj.weight"
    assert not torch.equal(read_weights(before)[name], read_weights(after)[name])


def test_no_other_model_starts_a_loop(tiny):
    with pytest.raises(UserError, match=r"kv\.loop: layers 1-2 have the weights of layer 0: .* allowed: plans with"):
        make_student(tiny(*LOOP), None, tuple, device=torch.device("cpu"), resumed=False)

"""Plans from similarity: the layers that are alike share, within the goal, and what is written loads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from cllm.cache.accounting import kv_bytes
from cllm.config import Config
from cllm.errors import UserError
from cllm.plan.explicit import Explicit
from cllm.plan.plan import Share
from cllm.train.run import train
from cllm.uptrain.complete import load_config
from cllm.uptrain.decoder import owner_of
from cllm.uptrain.heads import heads_of, set_heads, to_channels, to_pairs
from cllm.uptrain.search import (
    Sharing,
    closeness,
    fusion_plan,
    main,
    plan_entries,
    share_plan,
    similarity,
    with_plan,
)


@pytest.fixture
def alike(tiny_config, make_teacher):
    """Six layers that see the same; 4 projects what 1 does, but for a little, and 3 nearly what 0 does."""
    teacher = make_teacher(tiny_config(n_layers=6))
    for block in teacher.blocks:
        block.attention.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        block.attention_norm.weight.copy_(teacher.blocks[0].attention_norm.weight)
    for own, other, noise in ((4, 1, 0.01), (3, 0, 0.05)):
        for name in ("k_proj", "v_proj"):
            weight = getattr(owner_of(teacher, other), name).weight
            getattr(owner_of(teacher, own), name).weight.copy_(weight + noise * torch.randn_like(weight))
    return teacher


@pytest.mark.parametrize("measure", ["cosine", "cka"])
def test_similarity_is_symmetric_at_most_one_and_finds_the_pair(alike, text, measure: str) -> None:
    found = similarity(alike, text, measure)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(6, dtype=torch.float64))
    assert float(found[4, 1]) > 0.99
    others = found - torch.eye(6)
    others[4, 1] = others[1, 4] = others[3, 0] = others[0, 3] = -1
    assert float(others.max()) < float(found[3, 0])


def test_cka_does_not_see_the_order_of_heads(alike, text) -> None:
    for name in ("k_proj", "v_proj"):
        linear = getattr(owner_of(alike, 4), name)
        set_heads(linear, heads_of(linear, 8)[[2, 0, 3, 1]])
    assert float(similarity(alike, text, "cka")[4, 1]) > 0.99
    assert float(similarity(alike, text, "cosine")[4, 1]) < 0.9


def test_the_layers_most_alike_share_first(alike, text) -> None:
    assert [share_plan(alike, text, Sharing(owners=5)).keys(i) for i in (3, 4)] == [Share(3), Share(1)]
    assert [share_plan(alike, text, Sharing(owners=4)).keys(i) for i in (3, 4)] == [Share(0), Share(1)]
    assert len(share_plan(alike, text, Sharing(owners=1)).owners) == 1
    apart = share_plan(alike, text, Sharing(owners=5, dissimilar_first=True))
    assert apart.keys(4) != Share(1)


def test_a_budget_of_bytes_is_kept_and_not_undercut_needlessly(alike, text) -> None:
    whole = kv_bytes(alike.config).resident
    plan = share_plan(alike, text, Sharing(max_bytes=0.7 * whole))
    assert kv_bytes(with_plan(alike.config, plan)).resident <= 0.7 * whole
    assert len(plan.owners) == 4


def test_a_threshold_on_hidden_states_stops_sharing(alike, text, tiny_config, make_teacher) -> None:
    assert closeness(alike, alike.plan, text) == pytest.approx(1, abs=1e-6)
    teacher = make_teacher(tiny_config(n_layers=4))
    with pytest.raises(UserError, match="no pair of layers is left"):
        share_plan(teacher, text, Sharing(owners=1, threshold=0.999))


@pytest.mark.parametrize("weights", [{}, {"keys": "complex", "values": "matrix"}])
def test_fusion_reads_the_layers_that_it_is_made_of(alike, text, new_student, weights) -> None:
    turn = torch.tensor(1j if weights else 1.0, dtype=torch.complex128)
    for name in ("k_proj", "v_proj"):
        a, b = (heads_of(getattr(owner_of(alike, j), name), alike.config.resolved_head_dim) for j in (1, 2))
        turned = a.flip(1) if weights and name == "v_proj" else to_channels(to_pairs(a) * turn)
        set_heads(getattr(owner_of(alike, 5), name), (0.6 * turned + 0.7 * b).float())
    plan = new_student(alike, {"preset": "fusedkv", "n_storage": 4, **weights}).plan
    found = fusion_plan(alike, plan, text, ridge=0.0)
    assert found.keys(5).layers == found.values(5).layers == (1, 2)
    assert found.owners == plan.owners


def test_a_layer_that_fuses_its_own_slot_keeps_its_sources(alike, text, new_student) -> None:
    plan = new_student(alike, {"preset": "resformer"}).plan
    found = fusion_plan(alike, plan, text, ridge=0.0)
    assert [found.values(i).layers for i in range(len(found))] == [plan.values(i).layers for i in range(len(plan))]


def test_a_run_chooses_its_sources_as_the_search_does_and_keeps_them(tiny, tmp_path: Path, capsys, caplog) -> None:
    """`best` is the search and `fit` in one command; a resumed run reads what its first command chose."""
    base = train(tiny("--model.n_layers", "6", "--train.steps", "20", "--optim.lr", "1e-2"))
    file = tmp_path / "student.yaml"
    data = tiny("--model.n_layers", "6", "--model.kv.preset", "fusedkv", "--model.kv.n_storage", "4").as_yaml_data()
    data |= {"model": {"kv": data["model"]["kv"]}, "name": "student"}
    file.write_text(yaml.safe_dump(data))

    def student(*words: str) -> Config:
        return load_config([file], ["--init.from", str(base.path), "--init.method", "fit", *words])

    assert main(["--config", str(file), "--init.from", str(base.path), "--fusion"]) == 0
    wanted = Explicit.model_validate(yaml.safe_load(capsys.readouterr().out)["model"]["kv"])
    best = ("--init.sources", "best", "--train.checkpoint_every", "1")
    folder = train(student(*best, "--train.steps", "2"))
    saved = folder.config()
    assert saved.model.kv == wanted
    assert saved.model.plan() != student().model.plan(), "something was chosen"
    assert saved.init.sources == "best"
    with caplog.at_level("INFO", logger="cllm"):
        caplog.clear()
        train(student(*best, "--train.steps", "3"), resume="auto")
    assert "resuming from" in caplog.text
    assert "init.sources best" not in caplog.text, "nothing is chosen anew"
    assert folder.config().model.kv == wanted
    with pytest.raises(UserError, match=r"model\.kv is"):
        train(student(*best, "--train.steps", "4", "--model.kv.n_storage", "3"), resume="auto")


def test_best_sources_need_fusion_fit_and_one_process(tiny, tmp_path: Path) -> None:
    base = train(tiny("--train.steps", "1"))
    start = ("--init.from", str(base.path), "--name", "student", "--train.steps", "1", "--init.sources", "best")
    with pytest.raises(UserError, match="sources is best, but method is copy"):
        tiny(*start)
    with pytest.raises(UserError, match=r"model\.kv fuses nothing; allowed with it: plan"):
        train(tiny(*start, "--init.method", "fit", "--model.kv.preset", "cla"))
    with pytest.raises(UserError, match="there are 2 processes, which might choose differently"):
        train(tiny(*start, "--init.method", "fit", "--model.kv.preset", "fusedkv", "--train.devices", "2"))


def test_every_plan_is_written_as_what_loads_back(reference, preset_config) -> None:
    for name in [*reference.PRESETS, *reference.VARIANTS]:
        config = preset_config(name)
        entries = yaml.safe_load(yaml.safe_dump(plan_entries(config.plan())))
        iterations = config.plan().iterations
        data = {"layers": entries}
        if iterations:
            data["iterations"] = {"forward": iterations.forward, "backward": iterations.backward}
        if loop := config.plan().loop:
            data["loop"] = loop.settings()
        assert Explicit.model_validate(data).expand(config.shape) == config.plan(), name


def test_the_command_writes_a_plan_that_trains_and_refuses_what_it_would_ignore(tiny, tmp_path: Path, capsys) -> None:
    run = train(tiny("--train.steps", "1"))
    base, out = tmp_path / "base.yaml", tmp_path / "made" / "plan.yaml"
    data = tiny().as_yaml_data()
    del data["model"]
    base.write_text(yaml.safe_dump(data | {"name": "student"}))
    settings = ["--config", str(base), "--init.from", str(run.path)]
    assert main([*settings, "--owners", "2", "--out", str(out)]) == 0
    config = load_config([base, out], ["--init.from", str(run.path)])
    assert len(config.model.plan().owners) == 2
    train(config)
    for arguments, message in (
        (["--owners", "99"], "--owners is 99; allowed: 1 to 3"),
        (["--owners", "0"], "--owners is 0; allowed: 1 to 3"),
        (["--max-bytes", "1e9"], "--max-bytes is 1e+09; allowed: less than 512"),
        (["--owners", "2", "--init.calibration_sequences", "0"], "init.calibration_sequences is 0"),
        (["--owners", "2", "--init.calibration_sequences", "9999"], "init.calibration_sequences is 9999, but"),
        (["--owners", "2", "--fusion", "--model.kv.preset", "fusedkv"], "leave out --owners"),
        (["--measure", "cosine", "--fusion", "--model.kv.preset", "fusedkv"], "leave out --measure"),
    ):
        assert main([*settings, *arguments]) == 2
        assert message in capsys.readouterr().err

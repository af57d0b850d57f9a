"""How a run is spread over devices: what is chosen and refused, what ZeRO's traps would break, what its files give.

Lightning runs DeepSpeed on CUDA alone, so what needs DeepSpeed itself is `tests/gpu/test_strategies.py`; where
DeepSpeed is installed, the last tests here run it on the CPU with that one check taken out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from safetensors.torch import save_file

from cllm.cache.slot import Slot
from cllm.config import Config, ModelConfig, TrainConfig
from cllm.errors import UserError
from cllm.model.loss import Head, next_token_loss
from cllm.model.norm import RMSNorm
from cllm.model.rope import Rope, apply_rope, rope_table
from cllm.model.sizes import build_decoder
from cllm.model.sources import FusedRead
from cllm.plan.plan import Fuse
from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights
from cllm.train import strategy
from cllm.train.checkpoints import Checkpoints
from cllm.train.launch import Launch, check_launcher
from cllm.train.optim import parameter_groups
from cllm.train.reshard import shards
from cllm.train.resume import check_resumable
from cllm.train.run import train, with_vocabulary
from cllm.train.strategy import ZeroStrategy, cluster_plugins, gradient_norm, make_strategy
from cllm.train.throughput import Clock
from cllm.train.trainer import make_trainer
from tests.watched import run_watched

ROOT = Path(__file__).resolve().parents[2]
Tiny = Callable[..., Config]
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or torch.cuda.is_available(), reason="needs DeepSpeed, and no GPU"
)


def make(devices: int = 1, accelerator: str = "cpu", **settings: Any):
    model = ModelConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=512)
    config = Config(model=model, train=TrainConfig(**settings))
    return make_strategy(Launch.on(config, accelerator, devices), config)


# ---- choosing and refusing ------------------------------------------------------------------------------------------


def test_auto_is_one_device_or_ddp() -> None:
    assert make() == "auto"
    assert make(strategy="single") == "auto"
    assert isinstance(make(devices=2), DDPStrategy)
    assert isinstance(make(num_nodes=2), DDPStrategy)
    assert isinstance(make(strategy="ddp"), DDPStrategy), "asked for by name, also for one device"
    with pytest.raises(UserError, match=r"train\.strategy is single, but train\.devices"):
        make(devices=2, strategy="single")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_without_a_gpu_says_what_is_allowed(tiny: Tiny, name: str) -> None:
    with pytest.raises(
        UserError, match=rf"train\.strategy is {name}, .* CUDA devices only; allowed here: auto, single, d"
    ):
        make(strategy=name)
    if not torch.cuda.is_available():
        config = tiny("--train.strategy", name)
        with pytest.raises(UserError, match=r"train\.strategy"):
            train(config)
        assert not (Path(config.runs_dir) / config.name).exists()


def test_zero_without_deepspeed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"train\.strategy is zero1, but DeepSpeed cannot be imported .* pip install"):
        make(strategy="zero1", accelerator="gpu")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--train.strategy", "zero2", "--train.precision", "fp32"], "zero2 trains in bf16, but precision is fp32"),
        (["--train.strategy", "single", "--train.devices", "2"], "strategy is single, but devices is 2"),
        (["--train.strategy", "zero1", "--train.fp32_residual", "true"], "fp32_residual is true, but zero1 keeps"),
        (["--train.offload_optimizer", "true"], "offload_optimizer needs strategy zero1, zero2 or zero3"),
        (["--train.recompute_fusion", "true", "--train.gradient_checkpointing", "true"], "which recomputes all"),
        (["--train.strategy", "zero4"], "train.strategy"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny: Tiny, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(*settings)


def test_a_run_may_go_on_under_another_strategy_only_if_checkpoints_are_alike(tiny: Tiny) -> None:
    folder = train(tiny("--train.steps", "2", "--train.strategy", "single"))
    for name in ("auto", "ddp"):
        check_resumable(with_vocabulary(tiny("--train.strategy", name)), folder)
    with pytest.raises(UserError, match=r"train\.strategy is 'zero1', but the run"):
        train(tiny("--train.steps", "4", "--train.strategy", "zero1"), resume="auto")


# ---- traps ----------------------------------------------------------------------------------------------------------


def test_modules_cast_to_bf16_still_compute_in_fp32() -> None:
    """DeepSpeed casts every parameter to bf16. Results are fp32 maths on rounded weights, rounded once at the end."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 16, dtype=torch.bfloat16)

    norm = RMSNorm(16, eps=1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    wide = x.float() * (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.float()
    torch.testing.assert_close(norm(x), wide.bfloat16(), rtol=0, atol=0)

    for part in ("k", "v"):
        fused = FusedRead(Fuse(layers=(0, 1), init="randn"), [0, 1], part, 3, 16)
        fused.reset_parameters()
        fused = fused.bfloat16()
        slots = [Slot(x, x + 1), Slot(x * 2, x - 1)]
        exact = FusedRead(Fuse(layers=(0, 1)), [0, 1], part, 3, 16)
        exact.load_state_dict({"weight": fused.weight.float()})
        wanted = exact([Slot(s.k.float(), s.v.float()) for s in slots])
        torch.testing.assert_close(fused(slots), wanted.bfloat16(), rtol=0, atol=0)

    table = rope_table(Rope(), 16, torch.arange(100_000, 100_005)[None])
    assert all(t.dtype == torch.float32 for t in table)
    torch.testing.assert_close(apply_rope(x, table), apply_rope(x.float(), table).bfloat16(), rtol=0, atol=0)

    head = Head(16, 32, bias=False).bfloat16()
    hidden, labels = x[:, :, 0], torch.randint(32, (2, 5))
    loss = head(hidden, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(head(hidden), labels), rtol=1e-6, atol=1e-6)


def test_a_whole_model_cast_to_bf16_differs_by_bf16_noise(tiny: Tiny) -> None:
    config = tiny("--model.kv.preset", "fusedkv", "--model.vocab_size", "320", "--model.tie_embeddings", "true")
    model = build_decoder(config.model)
    model.init_weights()
    ids = torch.randint(320, (2, 32))
    wide = model.loss(ids, ids)
    narrow = model.bfloat16().loss(ids, ids)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(wide.item(), rel=2e-3)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, config.optim)}
    assert len(groups["fusion"]) == 4, "fusion weights are found by class, whatever their dtype"
    assert model.head.weight is model.embed.weight


def test_the_trainers_step_estimate_is_never_asked_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking builds the loaders too early, and their state is lost."""
    monkeypatch.setattr(
        Trainer, "estimated_stepping_batches", property(lambda self: pytest.fail("estimated_stepping_batches was read"))
    )
    train(tiny("--train.steps", "2"))


def test_the_loss_is_divided_by_the_accumulation_rounds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning divides it; DeepSpeed's engine would do it again."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(DeepSpeedStrategy, "backward", lambda self, loss, optimizer, **kwargs: seen.update(kwargs))
    ZeroStrategy.backward(object.__new__(ZeroStrategy), torch.zeros(()), None)
    assert seen == {"scale_wrt_gas": False}


def test_the_gradient_norm_is_the_engines() -> None:
    assert gradient_norm(SimpleNamespace(get_global_grad_norm=lambda: torch.tensor(1.5))) == 1.5
    assert gradient_norm(SimpleNamespace(get_global_grad_norm=lambda: float("inf"))) == float("inf")
    assert gradient_norm(SimpleNamespace(get_global_grad_norm=lambda: None)) != 0


class ThreeLayers(torch.nn.Module):
    """1.4 MB of weights each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(600, 600) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@torch._dynamo.config.patch(optimize_ddp=True)
def test_a_compiled_block_stays_whole_under_ddp(tmp_path: Path) -> None:
    """Left alone, Dynamo cuts it where DDP's buckets end: here after each of three layers, all above 1 MiB."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    make(strategy="ddp")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        block = ThreeLayers()
        block.compile(backend=count)
        torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(block))(torch.randn(2, 600)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
        torch._dynamo.reset()
    assert len(graphs) == 1


def test_the_trainer_of_a_run_does_not_broadcast_before_each_micro_batch(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every host would wait for its device; see also `tests/train/test_lightning.py`."""
    config = with_vocabulary(tiny())
    epoch_loop = make_trainer(config, Launch.here(config), Path(config.runs_dir), []).fit_loop.epoch_loop
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: pytest.fail("asked another process"))
    epoch_loop._broadcast_sigterm_tensor()


# ---- checkpoints that are folders -----------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def as_folder(file: Path) -> None:
    """Turn a checkpoint file into what ZeRO writes, with pickles in it that end the process that reads them."""
    weights = read_weights(file)
    file.unlink()
    (file / "checkpoint").mkdir(parents=True)
    torch.save(Bomb(), file / "checkpoint" / "mp_rank_00_model_states.pt")
    tied = (
        {"head.weight": "embed.weight"}
        if weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()
        else {}
    )
    save_file(
        {n: t.clone() for n, t in weights.items() if n not in tied},
        file / "model.safetensors",
        {"tied": json.dumps(tied)},
    )


@pytest.mark.parametrize("tied", ["true", "false"])
def test_weights_come_from_safetensors_and_no_pickle_is_read(tiny: Tiny, tied: str) -> None:
    folder = train(tiny("--train.steps", "2", "--model.tie_embeddings", tied))
    before, _, _ = load_run(folder.path)
    checkpoint = folder.checkpoints()[-1][1]
    as_folder(checkpoint)
    after, _, step = load_run(folder.path)
    assert step == 2
    assert load_run(checkpoint)[2] == 2
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    with pytest.raises(UserError, match="no optimizer states"):
        shards(checkpoint)
    (checkpoint / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"model\.safetensors: not readable"):
        read_weights(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: not readable"):
        read_weights(checkpoint)


def test_a_folder_gets_its_name_when_it_is_whole_and_old_ones_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    callback = Checkpoints(folder, TrainConfig(steps=3, checkpoint_every=1, keep_checkpoints=2), clock=Clock())
    seen = []

    def save_checkpoint(path: Path, weights_only: bool) -> None:
        assert not path.exists(), "left over from a run that was killed"
        assert not folder.checkpoint_path(trainer.global_step).exists()
        seen.append(path)
        (path / "checkpoint").mkdir(parents=True)

    plan = SimpleNamespace(broadcast=lambda x: x, barrier=lambda: None, reduce_boolean_decision=lambda x, all: x)
    trainer: Any = SimpleNamespace(strategy=plan, is_global_zero=True, save_checkpoint=save_checkpoint, global_step=1)
    trainer.lightning_module = torch.nn.Linear(2, 2)
    callback.setup(trainer, trainer.lightning_module, "fit")
    (folder.checkpoint_path(1).with_suffix(".partial") / "checkpoint").mkdir(parents=True)
    for trainer.global_step in (1, 2, 3):
        callback.save(trainer)
        callback.save(trainer)  # a step is saved once
    assert len(seen) == 3
    assert [step for step, _ in folder.checkpoints()] == [2, 3]
    trainer.lightning_module.weight.data[1, 1] = torch.inf
    trainer.global_step = 4
    with pytest.raises(UserError, match=r"weights are not finite after step 4 .* newest checkpoint is .*step-00000003"):
        callback.save(trainer)
    assert [step for step, _ in folder.checkpoints()] == [2, 3]
    assert not list(folder.checkpoint_folder.glob("*.partial"))


# ---- SLURM ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted((ROOT / "scripts" / "slurm").iterdir()), ids=lambda path: path.name)
def test_job_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


@pytest.mark.parametrize(
    ("code", "status", "number"),
    [
        (3, 3, signal.SIGUSR1),
        (0, 0, signal.SIGUSR1),  # it had just finished
        (2, 2, signal.SIGUSR1),
        (138, 138, signal.SIGUSR1),  # of a process that USR1 has ended
        (3, 3, None),  # somebody else stopped the run
    ],
)
def test_a_job_whose_time_is_up_saves_and_is_put_back_into_the_queue(
    tmp_path: Path, code: int, status: int, number: int | None
) -> None:
    fakes = {
        # As srun does: USR1 goes to every process of a task, TERM ends them.
        "srun": """while [[ $1 == --* ]]; do shift; done
set -m
"$@" &
trap 'kill -USR1 -- -$!' USR1
trap 'kill -KILL -- -$!; exit 143' TERM
until [ -z "$(jobs -r)" ]; do wait $!; done
wait $!""",
        "train": """echo "$*"
trap 'echo saved; exit $CODE' USR1
touch ready
if [ -n "$ALONE" ]; then exit "$CODE"; fi
while :; do sleep 0.05; done""",
        "scontrol": 'echo "scontrol $*"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CLLM_PYTHON": str(tmp_path / "train"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_JOB_ID": "7",
        "CODE": str(code),
        "ALONE": "" if number else "1",
    }
    command = ["bash", str(ROOT / "scripts" / "slurm" / "run.sh"), "--config", "a b.yaml"]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number:
        job.send_signal(number)
    out, _ = job.communicate(timeout=300)
    assert job.returncode == status
    first, *rest = out.splitlines()
    assert first == "train.py --train.devices 8 --train.num_nodes 2 --resume auto --config a b.yaml"
    assert rest == ["saved"] * bool(number) + ["scontrol requeue 7"] * (status == 3 and bool(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ready", "scontrol", "srun", "train"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2"},
            r"train\.devices is 1 .* torchrun has started 2 .*WORLD_SIZE",
        ),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "job"}, r"train\.devices is 1 .* SLURM has started 4 .*SLURM_NTASKS"),
    ],
)
def test_a_launcher_that_starts_another_number_of_processes_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = tiny("--train.devices", "1")
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (Path(config.runs_dir) / config.name).exists()
    check_launcher(int(variables.get("WORLD_SIZE", "2")), int(variables.get("SLURM_NTASKS", "2")) // 2)


def test_torchrun_inside_a_slurm_allocation_is_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job"}.items():
        monkeypatch.setenv(name, value)
    (plugin,) = cluster_plugins()
    assert not plugin.auto_requeue
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cluster_plugins() == []
    check_launcher(4, 2)


# ---- DeepSpeed itself, on the CPU -----------------------------------------------------------------------------------

ON_CPU = """
import argparse, os, sys, types
os.environ["DS_ACCELERATOR"] = "cpu"
import lightning.pytorch.strategies.deepspeed as theirs
from lightning.pytorch.strategies import DDPStrategy
from cllm.train import strategy
theirs._validate_device_index_selection = lambda devices: None
theirs.DeepSpeedStrategy.setup_environment = DDPStrategy.setup_environment
theirs.argparse = types.SimpleNamespace(Namespace=lambda **_: argparse.Namespace())
strategy.check_zero = lambda *_: None
import train
sys.exit(train.main())
"""


def on_cpu(config: Config, script: Path, *arguments: str) -> RunFolder:
    done = train_on_cpu(config, script, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return RunFolder(Path(config.runs_dir) / config.name)


def train_on_cpu(
    config: Config, script: Path, *arguments: str, program: str = ON_CPU
) -> subprocess.CompletedProcess[str]:
    file = script.with_name(f"{config.name}.yaml")
    file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
    script.write_text(program, encoding="utf-8")
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), "--config", str(file), *arguments]
    return run_watched(command, seconds=900, tell=print, cwd=ROOT, environment=environment)


KILLED = """
import signal
from cllm.train.module import TrainingModule
_step = TrainingModule.training_step
def killed(self, *words):
    if os.environ.get("LOCAL_RANK") == "1" and self.trainer.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return _step(self, *words)
TrainingModule.training_step = killed
import train
"""
"""In the script: the second process is killed in its fourth step."""


def rows(folder: RunFolder, tag: str) -> list[tuple[int, float]]:
    return [(row["step"], row[tag]) for row in folder.metrics() if tag in row]


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_zero_takes_the_steps_of_one_device_and_resumes_exactly(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """Two micro-batches a step, clipping at half the norm, tied embeddings, fused keys and values."""
    settings = ["--model.kv.preset", "fusedkv", "--model.tie_embeddings", "true", "--train.precision", "bf16"]
    settings += ["--optim.grad_clip", "0.5", "--optim.fusion_lr_multiplier", "3"]
    alone = train(tiny("--name", "alone", *settings))
    config = tiny("--name", name, "--train.strategy", name, "--train.devices", "1", *settings)
    script = tmp_path / "on_cpu.py"
    folder = on_cpu(config, script)
    losses = rows(folder, "train/loss")
    assert [step for step, _ in losses] == list(range(1, 9)), "one row an optimizer step, not a micro-batch"
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in rows(alone, "train/loss")], abs=0.02)
    norms = [norm for _, norm in rows(alone, "train/gradient_norm")]
    assert [norm for _, norm in rows(folder, "train/gradient_norm")] == pytest.approx(norms, rel=0.03)
    assert [step for step, _ in folder.checkpoints()] == [4, 8]
    assert {skipped for _, skipped in rows(folder, "train/skipped_steps")} == {0}
    whole = read_weights(folder.checkpoints()[-1][1])
    assert all(tensor.dtype == torch.float32 for tensor in whole.values())
    assert any((tensor != tensor.bfloat16()).any() for tensor in whole.values()), "master weights, not rounded ones"
    one = load_run(alone.path)[0].state_dict()
    assert whole.keys() == one.keys()

    last = rows(folder, "train/lr")
    shutil.rmtree(folder.checkpoints()[-1][1])
    resumed = on_cpu(config, script, "--resume", "auto")
    assert rows(resumed, "train/loss") == losses
    assert rows(resumed, "train/lr") == last
    for tag, tensor in read_weights(resumed.checkpoints()[-1][1]).items():
        assert torch.equal(tensor, whole[tag]), tag


@needs_deepspeed
@pytest.mark.parametrize(("name", "most"), [("zero1", 4), ("zero2", 4), ("zero3", 4), ("zero1", 8)])
def test_zero_goes_on_with_another_number_of_processes(tiny: Tiny, tmp_path: Path, name: str, most: int) -> None:
    """On half of them, then on a quarter. Steps of 1, 2 and 4 micro-batches have two optimizers of DeepSpeed's under
    ZeRO-1."""
    settings = ["--model.kv.preset", "fusedkv", "--model.tie_embeddings", "true", "--train.precision", "bf16"]
    settings += ["--train.micro_batch", "1", "--train.checkpoint_every", "2", "--train.keep_checkpoints", "9"]
    settings += ["--train.strategy", name, "--train.steps", "6", "--train.global_batch", str(most)]
    script = tmp_path / "on_cpu.py"
    wanted = on_cpu(tiny("--name", "most", "--train.devices", str(most), *settings), script)
    shutil.copytree(wanted.path, wanted.path.with_name("fewer"))
    for devices, saved, ends in ((most // 2, 2, 4), (most // 4, 4, 6)):
        config = tiny("--name", "fewer", "--train.devices", str(devices), *settings)
        folder = RunFolder(Path(config.runs_dir) / config.name)
        for step, path in folder.checkpoints():
            if step > saved:
                shutil.rmtree(path)
        on_cpu(config, script, "--resume", "auto")
        assert len(shards(folder.checkpoint_path(ends))) == devices
    for tag, bound in (("train/loss", 1e-4), ("train/gradient_norm", 2e-3), ("train/lr", 0), ("val/loss", 1e-4)):
        assert [step for step, _ in rows(folder, tag)] == [step for step, _ in rows(wanted, tag)]
        values = [value for _, value in rows(wanted, tag)]
        assert [value for _, value in rows(folder, tag)] == pytest.approx(values, rel=bound), tag
    before = read_weights(wanted.checkpoints()[-1][1])
    for tag, tensor in read_weights(folder.checkpoints()[-1][1]).items():
        torch.testing.assert_close(tensor, before[tag], rtol=0, atol=2e-3, msg=tag)


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_killed_process_ends_the_others_with_its_name_and_nothing_is_lost(
    tiny: Tiny, tmp_path: Path, name: str
) -> None:
    settings = ["--train.precision", "bf16", "--train.micro_batch", "1", "--train.checkpoint_every", "2"]
    settings += ["--train.steps", "6", "--train.strategy", name]
    config = tiny("--name", name, "--train.devices", "2", *settings)
    program = ON_CPU.replace("\nimport train\n", KILLED)
    assert program != ON_CPU
    done = train_on_cpu(config, tmp_path / "killed.py", program=program)
    assert done.returncode == 2, done.stderr[-3000:]  # in less than the half hour of collective operations
    assert re.search(
        r"error: rank 1 \(\S+\) ended before the run did; .*step-00000002\.ckpt; --resume auto", done.stderr
    )
    folder = RunFolder(Path(config.runs_dir) / name)
    assert [step for step, _ in folder.checkpoints()] == [2]
    fewer = tiny("--name", name, "--train.devices", "1", *settings)
    on_cpu(fewer, tmp_path / "on_cpu.py", "--resume", "auto")
    assert [step for step, _ in rows(folder, "train/loss")] == [1, 2, 3, 4, 5, 6]


@needs_deepspeed
@pytest.mark.parametrize(
    ("name", "micro_batches"), [("zero1", 1), ("zero1", 2), ("zero2", 1), ("zero2", 2), ("zero3", 2)]
)
def test_steps_without_a_finite_gradient_are_skipped_and_end_the_run(
    tiny: Tiny, tmp_path: Path, name: str, micro_batches: int
) -> None:
    """DeepSpeed has other optimizers for ZeRO-1 with and without accumulation."""
    settings = ["--train.precision", "bf16", "--optim.lr", "1e30", "--optim.warmup_steps", "0"]
    settings += ["--train.max_skipped_steps", "2", "--train.global_batch", "4"]
    settings += ["--train.micro_batch", str(4 // micro_batches)]
    config = tiny("--name", name, "--train.strategy", name, *settings)
    done = train_on_cpu(config, tmp_path / "on_cpu.py")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "train.max_skipped_steps is 2" in done.stderr


@needs_deepspeed
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_master_weights_start_from_the_unrounded_weights(tiny: Tiny, tmp_path: Path, name: str) -> None:
    """With a learning rate of nothing the exported weights are those that were drawn, in all their bits."""
    settings = ["--train.steps", "1", "--train.precision", "bf16", "--optim.lr", "1e-30", "--optim.min_lr", "0"]
    settings += ["--optim.weight_decay", "0"]
    alone = train(tiny("--name", "alone", *settings))
    folder = on_cpu(tiny("--name", "z", "--train.strategy", name, *settings), tmp_path / "on_cpu.py")
    wanted = read_weights(alone.checkpoints()[-1][1])
    for tag, tensor in read_weights(folder.checkpoints()[-1][1]).items():
        assert torch.equal(tensor, wanted[tag]), tag


def test_the_cpu_patches_are_of_things_that_exist() -> None:
    assert callable(strategy.check_zero)

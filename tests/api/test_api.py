"""`import cllm`: light, and thin calls of what the commands call."""

from __future__ import annotations

import csv
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import LlamaConfig, LlamaForCausalLM

import cllm
from cllm.api.settings import model_config, run_config
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.registry import parse
from cllm.runs import load_run

_LIGHT = """
import sys, cllm
slow = {"torch", "transformers", "lightning", "pydantic"}
assert not slow & set(sys.modules), slow & set(sys.modules)
assert {"train", "build", "score", "__version__"} <= set(dir(cllm))
cllm.plan("yoco", layers=8)
try:
    cllm.plan("yoko")
except cllm.UserError as error:
    print(error)
assert not {"torch", "transformers", "lightning"} & set(sys.modules)
try:
    cllm.trian
except AttributeError as error:
    print(error)
import cllm.plan.kinds
assert cllm.plan.kinds.Own and callable(cllm.plan)
"""


def test_importing_cllm_loads_nothing_slow_and_packages_stay_packages() -> None:
    done = subprocess.run([sys.executable, "-c", _LIGHT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    unknown, missing = done.stdout.splitlines()
    assert unknown.startswith('yoko: no such config file, shipped config or design; did you mean "yoco"')
    assert missing == "module 'cllm' has no attribute 'trian'"


@pytest.mark.parametrize("name", sorted(set(cllm.__all__) - {"UserError"}))
def test_every_function_is_callable_documented_and_typed(name: str) -> None:
    signature = inspect.signature(getattr(cllm, name))
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_configs_come_from_names_dicts_objects_and_lists_and_later_ones_win(workspace: Path) -> None:
    config = run_config("tiny.yaml", {})
    assert run_config(config, {}) is config
    steps = config.train.model_copy(update={"steps": 7})
    assert run_config(config, {"train.steps": 7}) == config.model_copy(update={"train": steps})
    nested = run_config(["tiny.yaml", {"train.steps": 3, "train": {"log_every": 3}}], {"optim": {"lr": 1.0}})
    assert (nested.train.steps, nested.train.log_every, nested.optim.lr) == (3, 3, 1.0)
    assert nested.train.global_batch == config.train.global_batch, "a dict adds to a section"
    gqa: Any = run_config(["tiny.yaml", "gqa:n_kv_heads=1"], {}).model.kv
    assert (gqa.preset, gqa.n_kv_heads) == ("gqa", 1)
    for order in (("kv.preset", "kv.n_kv_heads"), ("kv.n_kv_heads", "kv.preset")):
        settings = {key: {"kv.preset": "gqa", "kv.n_kv_heads": 2}[key] for key in order}
        assert model_config("mha", settings) == model_config("gqa:n_kv_heads=2", {})
    shipped = model_config("model/332m", {"d_model": 512, "d_ff": None})
    assert (shipped.n_layers, shipped.d_model, shipped.vocab_size) == (16, 512, 128000)
    assert model_config(shipped, {}) is shipped
    assert run_config({"data.path": Path("data"), "model": shipped}, {}).data.path == "data"


def _any(value: Any) -> Any:
    """A value whose type is not checked."""
    return value


def _compress(model: Any, prompt: Any) -> Any:
    return cllm.compress(model or cllm.load("runs/tiny"), prompt, "kivi")


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda: cllm.build("mha", d_modl=64), 'arguments: model.d_modl: unknown key; did you mean "d_model"?'),
        (lambda: cllm.build("mha", layers=4), 'arguments: model.layers: unknown key; did you mean "n_layers"?'),
        (lambda: cllm.prepare(_any(3)), "prepare: recipe is a int; allowed: a path"),
        (lambda: cllm.compare(["runs/tiny"], baseline=_any(Path("a"))), "compare: baseline is a PosixPath; allowed: a"),
        (lambda: cllm.score("runs/tiny", prefix=4), "score: prefix is 4; it needs posthoc="),
        (lambda: cllm.build("gqa:heads=2"), "gqa:heads=2: model.kv.heads: unknown key"),
        (lambda: cllm.plan(3), "config is a int; allowed: a path, the name"),
        (lambda: cllm.export("runs/tiny", "other", dtype=_any("fp16")), "dtype is 'fp16'; allowed: fp32, bf16"),
        (lambda: cllm.train("tiny.yaml", **{"train.steps": "x"}), "arguments: train.steps: input should be"),
        (lambda: cllm.train("tiny.yaml"), "runs/tiny holds a run already; "),
        (lambda: cllm.train({"train": 1, "train.steps": 2}), "arguments: train.steps: train was given a value"),
        (lambda: cllm.prepare("recipes/stdlib", texts=["a"]), "prepare: give either a recipe or texts="),
        (lambda: cllm.prepare(texts="a"), "prepare: texts is not a list of str"),
        (lambda: cllm.prepare(texts=["a"], name="days"), "data/prepared/days: was prepared from a different recipe"),
        (lambda: cllm.score("runs/none", text="a"), "runs/none: no such run, checkpoint or Hugging Face folder"),
        (lambda: cllm.score("runs/tiny", text="  "), "<text>: holds no text"),
        (lambda: cllm.score("runs/tiny", "tiny.yaml", text="a"), "score: give either data or text="),
        (
            lambda: cllm.score(cllm.build("mha", n_layers=1, d_model=8), text="a"),
            "score: a model in memory needs tokenizer=",
        ),
        (
            lambda: cllm.compress(cllm.load("runs/tiny"), torch.zeros(1, 9).long(), "xvk"),
            'compress: method "xvk": unknown',
        ),
        (lambda: cllm.export("runs/none", "out"), "runs/none"),
        (lambda: cllm.compare(["data"]), "no run to compare among: data"),
        (lambda: cllm.plan(b"mha"), "config is a bytes; allowed: a path"),
        (lambda: cllm.build([_any(3)]), "config is a int; allowed: a path"),
        (lambda: cllm.plan("runs/tiny"), "runs/tiny: is a folder; give its runs/tiny/config.yaml"),
        (lambda: cllm.train("tiny.yaml", resume=True), "train: resume is a bool; allowed: "),
        (lambda: cllm.train("tiny.yaml", callbacks=Callback()), "train: callbacks is a Callback; allowed: a list of"),
        (
            lambda: cllm.train("tiny.yaml", callbacks=[_any(Callback)]),
            "train: callbacks: item 0 is the class Callback, not",
        ),
        (lambda: cllm.train("tiny.yaml", loggers=False), "train: loggers is a bool; allowed: a list of Logger objects"),
        (lambda: cllm.load(3), "load: path is a int; allowed: a path"),
        (lambda: cllm.score("runs/tiny", posthoc="nope"), 'score: posthoc "nope": unknown method "nope"'),
        (lambda: cllm.load("runs/tiny", device="cuda:0"), "load: device is 'cuda:0'; allowed: auto, cpu, cuda"),
        (lambda: cllm.load_tokenizer(None), "load_tokenizer: path is a NoneType"),
        (lambda: cllm.export(cllm.build("mha", d_model=8), "out"), "export: run is a CLLMForCausalLM; allowed: "),
        (lambda: cllm.compare([_any(3)]), "compare: runs: item 0 is a int; allowed: a path"),
        (lambda: cllm.score(["runs/tiny"]), "score: model is a list; allowed: a path, or a model in memory"),
        (lambda: cllm.score("runs/tiny", text=[_any(3)]), "score: text: item 0 is a int; allowed: str"),
        (lambda: cllm.score("runs/tiny", window=0), "score: window is 0; allowed: a positive int, or None"),
        (lambda: _compress("runs/tiny", torch.zeros(1, 9).long()), "compress: model is a str; allowed: a model in"),
        (lambda: _compress(None, [1, 2]), "compress: cache is a list; allowed: a tensor of token ids, (B, T) int64"),
        (
            lambda: _compress(None, torch.zeros(9).long()),
            "compress: cache has shape (9) and dtype torch.int64; allowed",
        ),
        (lambda: _compress(None, torch.full((1, 9), 10**7)), "compress: cache has token 10000000; allowed: 0 to "),
    ],
)
def test_mistakes_are_user_errors_of_one_line(workspace: Path, call: Any, line: str) -> None:
    with pytest.raises(cllm.UserError) as caught:
        call()
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


class Steps(Callback):
    """Counts batches, and notes the losses of validations."""

    def __init__(self) -> None:
        self.batches, self.validated = 0, list[float]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(trainer.callback_metrics["val/loss"].item())


def test_callbacks_are_called_and_loggers_get_every_metric(workspace: Path, tmp_path: Path) -> None:
    steps, logger = Steps(), CSVLogger(tmp_path, name="csv", version="")
    settings = {"runs_dir": tmp_path, "train": {"steps": 4, "global_batch": 4}}
    run = cllm.train("tiny.yaml", callbacks=[steps], loggers=[logger], **settings)
    rows = list(run.folder.metrics())
    with (tmp_path / "csv" / "metrics.csv").open(newline="") as file:
        logged = [{tag: float(value) for tag, value in row.items() if value} for row in csv.DictReader(file)]
    assert logged == [{tag: value for tag, value in row.items() if tag != "time"} for row in rows]
    assert steps.batches == 8
    assert steps.validated == run.history("val/loss")[1][1:], "the first is that of the untrained model"
    assert run.metrics["train/loss"] == rows[-2]["train/loss"] == run.history("train/loss")[1][-1]
    assert run.metrics["step"] == 4
    assert run.is_finished
    assert not cllm.train("tiny.yaml", resume="auto", **settings).history("val/ppl")[0][3:]
    with pytest.raises(cllm.UserError, match=r"has no values of val/los; it has kv/bytes_per_token, .*val/loss"):
        run.history("val/los")


def test_a_trainer_of_ones_own_computes_the_losses_of_a_run(workspace: Path) -> None:
    losses = list[float]()

    class Losses(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

    torch.manual_seed(0)
    module, data = cllm.lightning_modules("tiny.yaml")
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, use_distributed_sampler=False,
        limit_val_batches=0, enable_progress_bar=False, enable_model_summary=False, callbacks=[Losses()],
    )  # fmt: skip
    trainer.fit(module, data)
    suites = [{"suite": "copying:distances=4,samples=1", "every": 2}]
    run = cllm.train("tiny.yaml", name="again", evaluate_suites=suites, **{"train.seed": 0})
    assert run.history("suite/copying/loss")[0] == [2]
    assert losses == pytest.approx(run.history("train/loss")[1], rel=1e-6)


def test_a_run_its_export_its_checkpoint_and_a_model_in_memory_have_the_same_score(workspace: Path) -> None:
    run = Path("runs/tiny")
    text = [f"{n} fine days and {n + 1} nights" for n in range(30)]
    Path("text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    cllm.export(run, "exported/run")
    model = cllm.load(run).train()
    scores = [
        cllm.score(run, "text.jsonl"),
        cllm.score(run, text=text),
        cllm.score(next(run.glob("checkpoints/*.ckpt")), text=text),
        cllm.score("exported/run", text=text),
        cllm.score(model, text=text, tokenizer=cllm.load_tokenizer("exported/run")),
        cllm.score(load_run(run)[0], text=text, tokenizer=cllm.load_tokenizer(run)),
    ]
    assert model.training, "as it was"
    assert [score.loss for score in scores] == pytest.approx([scores[0].loss] * 6, rel=1e-6)
    assert {score.bits_per_byte for score in scores[:2]} == {scores[0].bits_per_byte}
    assert str(scores[1]).splitlines()[1].startswith("tiny ")
    own = cllm.score(model, "data/prepared/days")
    assert own.loss == pytest.approx(cllm.score(run).loss, rel=1e-6)
    assert not (run / "evaluation").exists()
    cllm.score(run, save=True)
    assert cllm.compare([run]).comparison.rows[0].loss == pytest.approx(own.loss, rel=1e-6)


def test_a_prompt_is_compressed_as_a_cache_that_was_filled_by_hand(workspace: Path) -> None:
    model, ids = cllm.load("runs/tiny"), torch.arange(3, 31)[None]
    spec = "xkv:group=2,ratio=2"
    with torch.no_grad():
        filled = model(ids[:, :-1], use_cache=True).past_key_values
    caches = [
        cllm.compress(model, ids[:, :-1], spec),
        cllm.compress(model, filled, spec),
        compress_cache(filled, parse(spec)),
    ]
    logits = [model(ids[:, -1:], past_key_values=cache).logits for cache in caches]
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[2])
    written = model.generate(ids, past_key_values=cllm.compress(model, ids[:, :-1], spec), max_new_tokens=2)
    assert written.shape == (1, 30)
    with pytest.raises(cllm.UserError, match="calibrates on tokens; give calibration="):
        cllm.compress(model, filled, "kvsharer")
    assert cllm.compress(model, ids, "kvsharer:share=1").nbytes() < cllm.compress(model, ids, "none").nbytes()


def test_a_model_of_another_family_is_loaded_compressed_and_scored(workspace: Path) -> None:
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained("llama")
    model: Any = cllm.load("llama")
    ids = torch.arange(3, 31)[None]
    assert type(model).__name__ == "LlamaForCausalLM"
    compressed = cllm.compress(model, ids[:, :-1], "xkv:group=4,ratio=2")
    assert compressed.nbytes() < cllm.compress(model, ids[:, :-1], "none").nbytes()
    assert model.generate(ids, past_key_values=compressed, max_new_tokens=2).shape == (1, 30)
    scores = cllm.score(model, "data/prepared/days", posthoc="none", window=32)
    assert scores.loss == pytest.approx(scores[0]["uncompressed_loss"], rel=1e-6)
    assert (scores[0]["run"], scores[0]["design"]) == ("LlamaForCausalLM", "llama")


def test_the_picture_of_a_plan_is_a_png() -> None:
    view = cllm.plan(ModelConfig(d_model=32, n_layers=4, n_heads=2, kv={"preset": "cla"}))
    assert view._repr_png_().startswith(b"\x89PNG")
    assert view.kv_bytes.resident == 2 * 2 * 32 * 2
    assert view.mha_kv_bytes.resident == 2 * view.kv_bytes.resident
    assert "against mha  0.5x resident" in str(view)


def _filled(model: Any) -> Any:
    """The cache of eight tokens."""
    return model(torch.arange(8)[None] + 1, use_cache=True).past_key_values


def test_a_cache_of_another_model_is_not_compressed() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

    def llama(**options: Any) -> Any:
        return LlamaForCausalLM(LlamaConfig(**{**shape, "vocab_size": 64, **options})).eval()

    sizes = {"d_model": 32, "n_heads": 2, "vocab_size": 64, "n_layers": 2}
    own, foreign = cllm.build("mha", **sizes).eval(), llama()
    for model, cache, difference in (
        (own, _filled(foreign), "it is a DynamicCache, the model fills a KVCache"),
        (foreign, _filled(own), "it is a KVCache, the model fills a DynamicCache"),
        (own, _filled(cllm.build("mha", **sizes | {"n_layers": 3}).eval()), "its KV plan is not the model's"),
        (own, _filled(cllm.build("mha", **sizes | {"n_heads": 4}).eval()), "its n_heads is 4, the model's 2"),
        (foreign, _filled(llama(num_hidden_layers=3)), "it has 3 layers, the model 2"),
        (foreign, _filled(llama(num_key_value_heads=1)), "it has 1 heads of 16, the model 2 of 16"),
        (llama().bfloat16(), _filled(foreign), "its dtype is float32, the model's bfloat16"),
    ):
        with pytest.raises(UserError, match=r"(made for|filled by) another model") as refused:
            cllm.compress(model, cache, "svd:ratio=1.2,sinks=0")
        assert difference in str(refused.value)
    for model in (own, foreign):
        assert cllm.compress(model, _filled(model), "svd:ratio=1.2,sinks=0").nbytes() > 0


def test_a_missing_gpu_is_an_error_that_names_the_argument(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(cllm.UserError, match=r"^load: device cuda: there is no usable GPU; allowed here: cpu$"):
        cllm.load("runs/none", device="cuda")

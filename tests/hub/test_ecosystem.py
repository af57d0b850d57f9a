"""Programs that build on transformers: its pipeline and Trainer, PEFT's LoRA, the lm-evaluation-harness."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from cllm.errors import UserError
from cllm.hub.model import CLLMForCausalLM

TEXTS = ["the first number 1 is naïve", "the second number 2 is 日本 and 4", "the first number 3 is naïve and 9"]


@pytest.fixture
def folder(convert, make_run, tmp_path) -> Path:
    """An exported run."""
    run, _ = make_run()
    assert convert("export", run.path, tmp_path / "out") == 0
    return tmp_path / "out"


@pytest.fixture
def tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_the_text_generation_pipeline(folder, tokenizer) -> None:
    options = {"max_new_tokens": 6, "do_sample": False}
    generator = pipeline("text-generation", model=str(folder), tokenizer=tokenizer, device="cpu")
    one_by_one = [generator(text, **options) for text in TEXTS]
    assert generator(TEXTS, batch_size=3, **options) == one_by_one
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    expected = generator.model.generate(ids, **options)
    assert one_by_one[0][0]["generated_text"] == tokenizer.decode(expected[0], skip_special_tokens=True)


def test_trainer_learns_saves_and_goes_on(folder, tokenizer, tmp_path) -> None:
    pytest.importorskip("accelerate")
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    data = [{"input_ids": tokenizer(text).input_ids} for text in TEXTS * 4]

    def trainer(model: CLLMForCausalLM, accumulate: int, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "trainer"),
            per_device_train_batch_size=12 // accumulate,
            gradient_accumulation_steps=accumulate,
            max_steps=steps,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
            gradient_checkpointing=accumulate > 1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)

    whole = trainer(AutoModelForCausalLM.from_pretrained(folder), 1, 3)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    assert whole.evaluate()["eval_loss"] < before
    # Sequences differ in length, so a mean of means would not be the mean: num_items_in_batch is respected.
    parts = trainer(AutoModelForCausalLM.from_pretrained(folder), 4, 3)
    parts.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "trainer" / "checkpoint-3")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), parts.model.parameters(), strict=True))
    again = trainer(AutoModelForCausalLM.from_pretrained(folder), 1, 4)
    assert again.train(resume_from_checkpoint=str(tmp_path / "trainer" / "checkpoint-3")).global_step == 4


@pytest.mark.parametrize("name", ["fusedkv", "yoco", "lckv"])
def test_smoothed_labels_are_those_of_the_next_token(name, hub_model, preset_config, tmp_path) -> None:
    """Trainer smooths labels itself, and shifts them for models that it knows by their name."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = hub_model(config=preset_config(name))
    ids = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    arguments = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for smoothing in (0.0, 0.1):
        options = TrainingArguments(str(tmp_path), label_smoothing_factor=smoothing, **arguments)
        found = Trainer(model=model, args=options, eval_dataset=rows).evaluate()["eval_loss"]
        expected = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=smoothing)
        assert found == pytest.approx(expected.item(), rel=1e-5)


def test_lora_trains_its_own_weights_only(folder, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = base(ids, use_cache=False).logits
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.enable_input_require_grads()
    model.train().gradient_checkpointing_enable()
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert model.generate(input_ids=ids, max_new_tokens=2, eos_token_id=None).shape == (1, 10)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids, use_cache=False).logits, adapted)


@pytest.mark.parametrize(("plan", "bias"), [("mla", False), ("mla", True), ("mlra", True)])
def test_adapters_on_up_projections_of_latents_are_seen_by_decoding(plan, bias, hub_model, preset_config) -> None:
    """Decoding absorbs the up-projections, and has to absorb what an adapter adds to them."""
    peft = pytest.importorskip("peft")
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_bias=bias, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(hub_model(config=preset_config(plan)), config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter)
    up = "kv_up_proj.lora_A" if plan == "mla" else "kv_up_proj.2.lora_A"
    assert any(up in name for name, _ in model.named_parameters())
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = model(input_ids=ids[:, :5]).past_key_values
        decoded = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 8)]
        torch.testing.assert_close(torch.cat(decoded, 1), whole[:, 5:])
        last = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        torch.testing.assert_close(last, whole[:, -1:])
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(input_ids=ids, use_cache=False, **options)
    for kind in ("dynamic", "static"):
        assert torch.equal(model.generate(input_ids=ids, cache_implementation=kind, **options), expected)


def test_adapters_that_do_not_fit_are_refused(hub_model) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.arange(1, 9)[None]
    lora = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    whole = peft.get_peft_model(hub_model(n_layers=2), peft.LoraConfig(**lora, modules_to_save=["head"]))
    assert whole(input_ids=ids, labels=ids).loss.ndim == 0
    for config, message in (
        (peft.LoraConfig(**{**lora, "target_modules": ["head"]}), "model.head has an adapter"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "past_key_values is a DynamicCache"),
    ):
        model = peft.get_peft_model(hub_model(n_layers=2), config)
        with pytest.raises(UserError, match=message):
            model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))


def test_the_evaluation_harness(folder, tokenizer) -> None:
    """Its log-likelihoods are those of the model's logits, and it generates what `generate` does."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    assert harness.max_length == 64
    of_folder = HFLM(pretrained=str(folder), batch_size=2, device="cpu", dtype="float32")  # as its command line does
    assert (of_folder.max_length, type(of_folder.model)) == (64, CLLMForCausalLM)

    def ask(kind: str, arguments: list[tuple], harness: HFLM = harness) -> list:
        requests = [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]
        return getattr(harness, kind)(requests)

    pairs = [("the first number", " 1 is naïve"), ("the", " second"), (TEXTS[1], " and 16")]
    found = ask("loglikelihood", pairs)
    assert ask("loglikelihood", pairs, of_folder) == found
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        start, ids = len(tokenizer(context).input_ids), tokenizer(context + continuation).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, start - 1 : -1].log_softmax(-1)
        expected = logits[range(len(ids) - start), ids[start:]].sum().item()
        assert math.isclose(total, expected, rel_tol=1e-4)
        assert greedy == (logits.argmax(-1).tolist() == ids[start:])
    options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    answers = ask("generate_until", [(text, options) for text in TEXTS])
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        new = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True).split("\n")[0]

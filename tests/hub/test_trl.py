"""TRL's trainers, unpatched: the losses that they log are those of plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cllm.hub.export import as_pretrained
from cllm.hub.model import CLLMForCausalLM

trl = pytest.importorskip("trl")
PLANS = ["fusedkv", "yoco", "lckv"]
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
TEXTS = ["w1 w2 w3 w4", "w4 w3 w2", "w5 w6 w7 w8 w9", "w11 w3"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """32 tokens: a word is a token."""
    words = [*(f"w{i}" for i in range(29)), *SPECIAL.values()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.fixture
def folder(hub_model, preset_config, tokenizer, tmp_path) -> Callable[[str], Path]:
    """A folder with a tiny model of a preset and the tokenizer."""

    def build(name: str) -> Path:
        model = hub_model(config=preset_config(name))
        model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def _arguments(tmp_path: Path, **others: Any) -> dict[str, Any]:
    """One step over four rows, which are one batch."""
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "use_cpu": True, "bf16": False}
    return {"output_dir": str(tmp_path / "trainer"), **quiet, **options, **others}


def _trained(trainer: Any) -> float:
    """The loss of the first step."""
    trainer.train()
    return trainer.state.log_history[0]["loss"]


def _log_probs(model: CLLMForCausalLM, ids: list[int]) -> Tensor:
    """Log-probability of every token but the first, (T - 1,): from the decoder's logits, without padding."""
    entire = torch.tensor([ids])
    with torch.no_grad():
        logits = model.model(entire)
    return -F.cross_entropy(logits[0, :-1], entire[0, 1:], reduction="none")


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("packing", [False, True])
def test_the_first_loss_of_sft_is_the_cross_entropy(name, packing, folder, tokenizer, tmp_path) -> None:
    """Of rows that are padded, and of rows that are packed into one sequence: a document does not see another."""
    options = {"packing": True, "max_length": 32, "per_device_train_batch_size": 1} if packing else {}
    source = folder(name)
    arguments = trl.SFTConfig(**_arguments(tmp_path, **options))
    data = Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(str(source), args=arguments, train_dataset=data)
    assert len(trainer.train_dataset) == (1 if packing else len(TEXTS))
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = -torch.cat([_log_probs(model, [*tokenizer(t).input_ids, tokenizer.eos_token_id]) for t in TEXTS]).mean()
    assert _trained(trainer) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_sft_of_an_adapter(name, folder, tokenizer, tmp_path) -> None:
    """Before its first step an adapter changes nothing; that step changes the adapter, and nothing else."""
    peft = pytest.importorskip("peft")
    source = folder(name)
    trainer = trl.SFTTrainer(
        str(source),
        args=trl.SFTConfig(**_arguments(tmp_path)),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        peft_config=peft.LoraConfig(r=2, task_type="CAUSAL_LM"),
    )
    model = AutoModelForCausalLM.from_pretrained(source)
    expected = -torch.cat([_log_probs(model, [*tokenizer(t).input_ids, tokenizer.eos_token_id]) for t in TEXTS]).mean()
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert _trained(trainer) == pytest.approx(expected.item(), rel=1e-5)
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_B" in name for name in changed)  # lora_A has no gradient as long as lora_B is 0


PAIRS = {"prompt": ["w1 w2", "w3", "w4 w4", "w9"], "chosen": [" w4 w5", " w6", " w7", " w8 w1 w2"]}
PAIRS["rejected"] = [" w7", " w8 w9", " w1 w1 w1", " w2"]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("other_reference", [False, True])
def test_the_first_loss_of_dpo_is_that_of_its_margins(
    name, other_reference, folder, tokenizer, preset_config, random_model, tmp_path
) -> None:
    """The mean of -log sigmoid(beta * margin): log 2 where the reference is the policy, read from the same folder."""
    source = folder(name)
    policy = AutoModelForCausalLM.from_pretrained(source)
    reference = as_pretrained(random_model(preset_config(name), seed=1)).eval() if other_reference else None
    arguments = trl.DPOConfig(**_arguments(tmp_path, beta=0.3))
    data = Dataset.from_dict(PAIRS)
    trainer = trl.DPOTrainer(str(source), ref_model=copy.deepcopy(reference), args=arguments, train_dataset=data)

    def log_ratio(row: int, kind: str) -> Tensor:
        prompt = tokenizer(PAIRS["prompt"][row]).input_ids
        ids = [*prompt, *tokenizer(PAIRS[kind][row]).input_ids, tokenizer.eos_token_id]
        scored = [_log_probs(m, ids)[len(prompt) - 1 :].sum() for m in (policy, reference or policy)]
        return scored[0] - scored[1]

    margins = torch.stack([log_ratio(i, "chosen") - log_ratio(i, "rejected") for i in range(4)])
    expected = -F.logsigmoid(0.3 * margins).mean()
    assert (expected.item() == pytest.approx(math.log(2))) is not other_reference
    assert _trained(trainer) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", PLANS)
def test_a_step_of_grpo_makes_what_was_rewarded_more_likely(name, folder, tmp_path) -> None:
    """The loss is that of equation 3 of DeepSeekMath at ratio 1, a mean over tokens: minus their mean advantage."""
    source = folder(name)
    seen: list[tuple[list[int], float]] = []

    def reward(prompt_ids: Any = None, completion_ids: Any = None, **others: Any) -> list[float]:
        rewards = [float(len(set(ids))) + ids[0] / 100 for ids in completion_ids]
        seen.extend(zip(completion_ids, rewards, strict=True))
        return rewards

    arguments = trl.GRPOConfig(**_arguments(tmp_path, num_generations=4, max_completion_length=6, seed=3))
    data = Dataset.from_dict({"prompt": ["w1 w2"]})
    trainer = trl.GRPOTrainer(str(source), reward_funcs=reward, args=arguments, train_dataset=data)
    loss = _trained(trainer)
    rewards = torch.tensor([r for _, r in seen])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    lengths = torch.tensor([len(ids) for ids, _ in seen])
    assert len(seen) == 4
    assert loss == pytest.approx(-((advantages * lengths).sum() / lengths.sum()).item(), abs=1e-5)

    def objective(model: CLLMForCausalLM) -> float:
        scores = torch.stack([_log_probs(model, [1, 2, *ids])[1:].sum() for ids, _ in seen])
        return (advantages * scores).sum().item()

    assert objective(trainer.model.eval()) > objective(AutoModelForCausalLM.from_pretrained(source))

"""Answers to samples: equal to those of plain forward passes, whatever the batch, the order and the kind of cache."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.evaluate.tasks.batches import batches
from cllm.evaluate.tasks.run import run_samples
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.posthoc.engine import DecoderEngine
from cllm.posthoc.registry import parse

CPU = torch.device("cpu")
VOCABULARY = 300
PLANS = {
    "mha": {"preset": "mha"},
    "fusedkv": {"preset": "fusedkv"},
    "mla": {"preset": "mla"},
    "yoco": {"preset": "yoco", "window": 6},
    "lckv": {"preset": "lckv", "iterations": {"forward": 0, "backward": 2}},
    "retention": {"preset": "yoco", "lower": "retention"},
}


def _tokens(draw: random.Random, n: int) -> tuple[int, ...]:
    return tuple(draw.randrange(1, VOCABULARY) for _ in range(n))


def _samples(seed: int = 0, *, generate: bool = True) -> list[Sample]:
    """Contexts of three lengths; prompts and options of several lengths, and some without a prompt."""
    draw, samples = random.Random(seed), []
    for i in range(5):
        questions = [
            Question(prompt=_tokens(draw, n), options=tuple(_tokens(draw, draw.randint(1, 5)) for _ in range(2)))
            for n in (0, 3, 1 + i % 3)
        ]
        if generate and i % 3:
            questions.append(Question(prompt=_tokens(draw, 3 * i % 7), generate=4 + i % 2))
        samples.append(Sample(task="t", context=_tokens(draw, (12, 9, 12, 17)[i % 4]), questions=tuple(questions)))
    return samples


def _decoder(random_model: Any, kv: dict[str, Any]) -> Any:
    shape = {"d_model": 24, "n_layers": 4, "n_heads": 2, "head_dim": 8, "d_ff": 32, "max_seq_len": 64}
    return random_model(ModelConfig(vocab_size=VOCABULARY, kv=kv, **shape)).eval()


def _llama(**options: Any) -> Any:
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"vocab_size": VOCABULARY, "initializer_range": 0.3, "max_position_embeddings": 64, **options}
    if "sliding_window" in options:
        return MistralForCausalLM(MistralConfig(num_key_value_heads=1, **shape)).eval()
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **shape)).eval()


def _plain_answer(subject: Any, sample: Sample, question: Question) -> Answer:
    """The answer without any cache."""

    def logits(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            model: Any = subject.model
            out = model(torch.tensor([ids]))
            return (out if isinstance(out, torch.Tensor) else out.logits)[0]

    losses, top1 = [], []
    for option in question.options:
        before = sample.context + question.prompt
        predicted = logits(before + option)[len(before) - 1 : -1].log_softmax(-1)
        losses.append(tuple(-predicted[i, token].item() for i, token in enumerate(option)))
        top1.append(tuple(int(predicted[i].argmax()) == token for i, token in enumerate(option)))
    generated: tuple[int, ...] = ()
    for _ in range(question.generate):
        token = int(logits(sample.context + question.prompt + generated)[-1].argmax())
        if token == subject.tokenizer.eos_token_id:
            break
        generated += (token,)
    return Answer(losses=tuple(losses), top1=tuple(top1), generated=generated)


def _assert_equal(found: Answer, expected: Answer) -> None:
    assert [len(losses) for losses in found.losses] == [len(losses) for losses in expected.losses]
    for ours, theirs in zip(found.losses, expected.losses, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    assert found.top1 == expected.top1
    assert found.generated == expected.generated


@pytest.mark.parametrize("name", ["mha", "fusedkv", "mla", "yoco", "retention", "llama", "mistral"])
def test_answers_are_those_of_plain_forward_passes(name: str, subject, random_model) -> None:
    model = {"llama": lambda: _llama(), "mistral": lambda: _llama(sliding_window=8)}.get(
        name, lambda: _decoder(random_model, PLANS[name])
    )()
    subject, samples = subject(model, context=64), _samples()
    (result,) = run_samples(subject, samples, (), CPU, batch=3)
    for sample, answers in zip(samples, result.answers, strict=True):
        for question, answer in zip(sample.questions, answers, strict=True):
            _assert_equal(answer, _plain_answer(subject, sample, question))


@pytest.mark.parametrize("name", ["mha", "yoco", "lckv"])
def test_batch_size_and_order_change_nothing(name: str, subject, random_model) -> None:
    subject, samples = subject(_decoder(random_model, PLANS[name]), context=64), _samples()
    specs = ["none", "svd:rank_k=3,rank_v=3,sinks=1"]
    specs += ["kvsharer:threshold=-1", "svd:energy=0.8,sinks=1", "entropy:tokens=6,sinks=1,window=2"] * (name == "mha")
    together = run_samples(subject, samples, specs, CPU, batch=100)
    backwards = run_samples(subject, samples[::-1], specs, CPU, batch=1)
    for one, other in zip(together, backwards, strict=True):
        for ours, theirs in zip(one.answers, other.answers[::-1], strict=True):
            for found, expected in zip(ours, theirs, strict=True):
                _assert_equal(found, expected)


def test_none_is_allowed_for_plans_that_no_method_compresses(subject, random_model) -> None:
    subject, samples = subject(_decoder(random_model, {"preset": "kv_tie"}), context=64), _samples()[:2]
    (as_it_is,) = run_samples(subject, samples, (), CPU)
    none, lossy = run_samples(subject, samples, ["none", "kivi:group=4,residual=0"], CPU)
    assert none.answers == as_it_is.answers
    assert none.nbytes == none.own_nbytes > 0
    assert "K = V, which no post-hoc method compresses" in next(iter(lossy.left_out.values()))


@pytest.mark.parametrize("name", ["mha", "yoco", "llama"])
def test_none_equals_no_compression_to_the_bit(name: str, subject, random_model) -> None:
    model = _llama() if name == "llama" else _decoder(random_model, PLANS[name])
    subject, samples = subject(model, context=64), _samples()
    (as_it_is,) = run_samples(subject, samples, (), CPU)
    (none, lossy) = run_samples(subject, samples, ["none", "kivi:bits=2,group=4,residual=0,sinks=1"], CPU)
    assert none.answers == as_it_is.answers
    assert lossy.answers != as_it_is.answers


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("mha", "xkv:ratio=1.5,sinks=1"),
        ("mha", "xkv:ratio=1,sinks=1,recompress=2"),
        ("mha", "xkv:rank_k=3,rank_v=3,sinks=1,select=4,chunk=2,outliers=0,local=1"),
        ("mha", "svd:rank_k=3,rank_v=3,sinks=1,every=2"),
        ("mha", "h2o:tokens=4,sinks=1,every=2"),
        ("mha", "h2o:tokens=4,sinks=1"),
        ("mha", "streaming:tokens=4,sinks=1"),
        ("mha", "snapkv:tokens=5,sinks=1,window=2+xkv:group=2,rank_k=2,rank_v=2"),
        ("mha", "minicache:sinks=1"),
        ("mha", "kvsharer:threshold=-1"),
        ("mha", "commonkv:group=2,recent=2,sinks=1"),
        ("yoco", "kivi:bits=4,group=4,residual=4,sinks=0"),
        ("llama", "xkv:ratio=1.5,sinks=1"),
        ("llama", "kivi:bits=4,group=4,residual=0,sinks=1,recompress=2"),
        ("llama", "kvsharer:threshold=-1"),
        ("llama", "streaming:tokens=4,sinks=1"),
        ("llama", "h2o:tokens=4,sinks=1+svd:rank_k=2,rank_v=2"),
    ],
)
def test_questions_read_the_compressed_cache(name: str, spec: str, subject, random_model) -> None:
    """Each option alone, on a cache that was filled and compressed for it, has the same losses."""
    model = _llama() if name == "llama" else _decoder(random_model, PLANS[name])
    subject, samples = subject(model, context=64), _samples(generate=False)[:2]
    (all_at_once,) = run_samples(subject, samples, [spec], CPU)
    (exact,) = run_samples(subject, samples, (), CPU)
    assert not all_at_once.left_out
    assert all_at_once.answers != exact.answers
    engine, method = subject.engine(), parse(spec)
    longest = [sample for sample in samples if len(sample.context) == max(len(s.context) for s in samples)]
    method.prepare(engine, torch.tensor(sorted(sample.context for sample in longest)))
    for sample, answers in zip(samples, all_at_once.answers, strict=True):
        for question, answer in zip(sample.questions, answers, strict=True):
            for option, losses in zip(question.options, answer.losses, strict=True):
                with torch.inference_mode():
                    cache = engine.new_cache()
                    with method.watch(engine):
                        last = engine.hidden(torch.tensor([sample.context]), cache)[:, -1:]
                    cache = engine.compress(cache, method, measure=False)
                    chunk = 1 if method.selects_tokens else method.every or method.recompress or 99
                    parts = torch.tensor([question.prompt + option]).split(chunk, dim=1)
                    states = [last, *(engine.hidden(part, cache) for part in parts)]
                    log_p = engine.head(torch.cat(states, dim=1))[0].log_softmax(-1)
                wanted = [-log_p[len(question.prompt) + i, token].item() for i, token in enumerate(option)]
                assert losses == pytest.approx(wanted, abs=2e-4)


def test_batches_hold_contexts_of_one_length_and_every_sample_once() -> None:
    samples = _samples()
    for exact in (False, True):
        found = list(batches(samples, lambda longest: 2, exact=exact))
        assert sorted(i for batch in found for i in batch) == list(range(len(samples)))
        assert all(len({len(samples[i].context) for i in batch}) == 1 for batch in found)
        assert max(map(len, found)) == 2 or exact
    for batch in batches(samples, lambda longest: 60 // longest):
        assert len(batch) == 1 or len(batch) * max(samples[i].longest for i in batch) <= 60


def test_generation_ends_at_a_stop_and_at_eos_before_its_limit(subject, planted) -> None:
    """The oracle writes `text` after any context, again and again."""
    tokenizer = subject(planted.noise).tokenizer
    text = tokenizer.encode(" alpha beta\n gamma", add_special_tokens=False)
    calls = []

    def write(ids: Any) -> int:
        calls.append(1)
        return ([*text, tokenizer.eos_token_id] * 9)[len(ids) - 4]

    samples = [
        Sample(
            task="t",
            context=(5, 6, 7),
            questions=(Question(prompt=(8,), generate=40, stop=stop), Question(prompt=(8,), generate=3)),
        )
        for stop in (("\n", "zeta"), ())
    ]
    (result,) = run_samples(subject(write), samples, (), CPU)
    (stopped, short), (ended, _) = (answers or [] for answers in result.answers)
    assert stopped.text == " alpha beta"
    assert tokenizer.decode(stopped.generated) == " alpha beta\n"
    assert (ended.text, list(ended.generated)) == (" alpha beta\n gamma", text)
    assert list(short.generated) == text[:3]
    assert len(calls) < 2 * 40, "generation went on after both rows had ended"


def test_a_context_that_a_method_cannot_compress_leaves_its_task_out(subject, random_model) -> None:
    subject, draw = subject(_decoder(random_model, PLANS["mha"]), context=64), random.Random(0)
    question = Question(prompt=(3,), options=((4,),))
    samples = [Sample(task=str(n), context=_tokens(draw, n), questions=(question,)) for n in (3, 30)]
    (result,) = run_samples(subject, samples, ["svd:ratio=3"], CPU)
    assert list(result.left_out) == ["3"]
    assert [answers is None for answers in result.answers] == [True, False]
    with pytest.raises(UserError, match="svd"):
        run_samples(subject, samples[:1], ["svd:ratio=3"], CPU)


def test_methods_that_cannot_calibrate_or_watch_are_refused_like_others(subject, random_model) -> None:
    subject, samples = subject(_decoder(random_model, PLANS["mla"]), context=64), _samples()
    specs = ["palu:keep=0.5", "h2o:ratio=2", "none"]
    refused: dict[str, str] = {}
    for found in (None, refused):
        *others, none = run_samples(subject, samples, specs, CPU, refused=found)
        assert all(answers is None for result in others for answers in result.answers)
        assert none.answers == run_samples(subject, samples, (), CPU)[0].answers
    assert list(refused) == specs[:2]
    for spec in specs[:2]:
        with pytest.raises(UserError, match=f'--posthoc "{spec}": {spec.partition(":")[0]}'):
            run_samples(subject, samples, [spec], CPU)


def test_a_task_that_is_left_out_changes_no_other(subject, random_model, monkeypatch) -> None:
    """Also not in a batch with both, for a method that watches the prefill."""
    subject, draw = subject(_decoder(random_model, PLANS["mha"]), context=64), random.Random(0)
    question = Question(prompt=(3,), options=((4,),))
    left, kept = (Sample(task=name, context=_tokens(draw, 12), questions=(question,)) for name in ("left", "kept"))
    long = Sample(task="left", context=_tokens(draw, 20), questions=(question,))
    compress = DecoderEngine.compress

    def not_long(engine: Any, cache: Any, method: Any, **options: Any) -> Any:
        if cache.seen > 12:
            raise UserError("too long")
        return compress(engine, cache, method, **options)

    monkeypatch.setattr(DecoderEngine, "compress", not_long)
    (result,) = run_samples(subject, [long, left, kept], ["h2o:tokens=6,sinks=1"], CPU, batch=2)
    (alone,) = run_samples(subject, [kept], ["h2o:tokens=6,sinks=1"], CPU)
    assert result.left_out == {"left": "too long"}
    assert result.answers[:2] == [None, None]
    _assert_equal(result.answers[2][0], alone.answers[0][0])

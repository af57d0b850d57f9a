"""The suites copying and mqar, and the base of task suites: samples, means, standard errors, records."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cllm.errors import UserError
from cllm.evaluate.tasks.copying import Copying
from cllm.evaluate.tasks.mqar import Mqar
from cllm.evaluate.tasks.sample import Answer, Question, Sample
from cllm.evaluate.tasks.suite import TaskSuite, mean_over_questions, share, value
from cllm.evaluate.tasks.text import continuations, decode, encode, pieces
from cllm.section import Section

COPYING = {"distances": [12, 20], "length": 12, "samples": 6}
MQAR = {"pairs": [4, 8], "samples": 6}


# ---- the two suites --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "settings"), [(Copying(), COPYING), (Mqar(), MQAR)])
def test_a_model_that_copies_scores_100_and_noise_scores_chance(suite, settings, subject, planted, measure) -> None:
    exact = measure(suite, subject(planted.copying), settings)
    assert {record["accuracy"] for record in exact.values()} == {100.0}
    assert {record["accuracy_stderr"] for record in exact.values()} == {0.0}
    assert all(record["loss"] < 1e-4 for record in exact.values())
    for (task, _), record in measure(suite, subject(planted.noise), settings).items():
        scored = 12 * record["questions"] if isinstance(suite, Copying) else record["questions"]
        chance = 100 / 300
        assert record["accuracy"] < chance + 4 * 100 * math.sqrt(0.01 / scored), task
        assert record["loss"] > 10, "noise is certain of the wrong token"


def test_a_decoder_with_an_induction_head_copies_until_its_cache_is_of_rank_one(subject, planted, measure) -> None:
    model = subject(planted.induction_decoder(300))
    specs = ["none", "xkv:group=2,rank_k=1,rank_v=1", "svd:rank_k=4,rank_v=4"]
    records = measure(Copying(), model, {"distances": [32], "samples": 4}, specs)
    accuracy = [records["all", spec]["accuracy"] for spec in specs]
    assert accuracy[0] == 100.0
    assert accuracy[1] < 15
    assert 2 * accuracy[1] < accuracy[2] < 50
    assert records["all", specs[1]]["ratio_to_own"] > records["all", specs[2]]["ratio_to_own"] > 1
    (control,) = {record["new_loss"] > 5 for record in records.values()}
    assert control, "new tokens cannot be copied, whatever the cache"
    assert measure(Mqar(), model, {"pairs": [4], "samples": 4})["all", "as it is"]["accuracy"] > 90


def test_copies_have_the_distance_and_the_length_that_were_asked_for(subject, planted) -> None:
    model, suite = subject(planted.noise), Copying()
    for sample in suite.samples(model, suite.settings(**COPYING)):
        copied, new = sample.questions
        distance = copied.facts["distance"]
        whole = sample.context + copied.prompt + copied.options[0]
        assert sample.context[0] == model.start_id
        assert whole[1:13] == whole[1 + distance :]
        assert len(whole) == 1 + distance + 12
        assert not {*new.prompt, *new.options[0]} & {*whole}
    defaults = suite.samples(subject(planted.noise, context=255), suite.settings(samples=1))
    assert [sample.questions[0].facts["distance"] for sample in defaults] == [32, 64]
    defaults = suite.samples(subject(planted.noise, context=256), suite.settings(samples=1))
    assert [sample.longest for sample in defaults] == [64, 128, 256]


def test_mqar_follows_the_papers_generator(subject, planted) -> None:
    """Pairs first; every key once among the places after them, few places far away; the label is the key's value."""
    model, suite = subject(planted.noise), Mqar()
    samples, places = suite.samples(model, suite.settings(pairs=[8], samples=200)), []
    ordinary = [i for i in range(300) if i not in model.tokenizer.all_special_ids]
    half = ordinary[len(ordinary) // 2]
    for sample in samples:
        keys, values = sample.context[1::2], sample.context[2::2]
        assert len({*keys}) == len({*values}) == 8
        assert max(keys) < half <= min(values)
        after = max((question.prompt for question in sample.questions), key=len)
        for question, k, v in zip(sample.questions, keys, values, strict=True):
            assert question.prompt[-1] == k
            assert question.options == ((v,),)
            assert question.prompt == after[: len(question.prompt)]
            assert len(question.prompt) % 2 == 1
            place = len(sample.context) + len(question.prompt) - 1
            assert question.facts["distance"] == place - sample.context.index(k)
            places.append(len(question.prompt) // 2)
    assert max(places) < (64 - 16) // 2
    # The first of 24 places has probability p_0 in each draw, and with 8 draws is nearly always taken.
    weight = np.arange(1, 25) ** -0.99
    assert places.count(0) / 200 > 1 - (1 - weight[0] / weight.sum()) ** 8
    assert places.count(0) > 2 * places.count(12) > 0


@pytest.mark.parametrize(
    ("suite", "settings", "message"),
    [
        (Copying(), {"distances": [500]}, "a sample of distance=500 has 1000 tokens; allowed: up to the context of"),
        (Copying(), {"distances": [8], "length": 9}, "distances has 8; allowed: the length of a copy, 9, or more"),
        (Mqar(), {"pairs": [4], "length": 14}, "length is 14; allowed with 4 pairs: even, 16 or more"),
        (Mqar(), {"pairs": [4], "length": 302}, "has 299 ordinary tokens"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(suite, settings, message, subject, measure) -> None:
    def never(ids: Any) -> int:
        raise AssertionError("the model ran")

    with pytest.raises(UserError, match=message):
        measure(suite, subject(never), settings)


# ---- the base --------------------------------------------------------------------------------------------------------


def test_standard_errors_count_questions_of_one_sample_as_dependent() -> None:
    single = [[1.0], [0.0], [0.0], [1.0], [1.0]]
    mean, error, questions = mean_over_questions(single)
    assert (mean, questions) == (0.6, 5)
    assert error == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / math.sqrt(5))
    doubled = mean_over_questions([sample * 2 for sample in single])
    assert doubled.error == pytest.approx(error), "a second question that says the same is no information"
    assert mean_over_questions([[1.0, 0.0]]).error is None


class _Depths(Section):
    depth: int = 2


class _Shares(TaskSuite):
    name, help, settings, main, groups = "shares", "a test", _Depths, "hit", ("depth",)
    numbers = (share("hit"), value("rare"))

    def samples(self, subject: Any, settings: Any) -> Sequence[Sample]:
        question = [Question(prompt=(5,), options=((6,),), facts={"depth": i}) for i in range(settings.depth)]
        return [Sample(task=task, context=(4, 5), questions=(*question,)) for task in ("a", "a", "b")]

    def score(self, sample: Sample, question: Question, answer: Answer) -> dict[str, float]:
        hit = float(question.facts["depth"] == 0)
        return {"hit": hit, "rare": 3.0} if sample.task == "b" else {"hit": hit}


def test_records_have_means_by_task_by_group_and_over_tasks(subject, planted, measure) -> None:
    records = measure(_Shares(), subject(planted.noise), {"depth": 4})
    a, b, both = (records[task, "as it is"] for task in ("a", "b", "all"))
    assert (a["hit"], a["samples"], a["questions"]) == (25.0, 2, 8)
    assert a["groups"]["depth"]["0"]["hit"] == 100.0
    assert a["groups"]["depth"]["3"]["hit"] == 0.0
    assert "rare" not in a
    assert (b["rare"], both["rare"], both["tasks"], both["questions"]) == (3.0, 3.0, 2, 12)
    assert (b["hit_stderr"], both["hit_stderr"]) == (None, None)
    assert both["settings"] == {"depth": 4}


def test_numbers_that_were_not_measured_are_left_out_of_tables_and_events(subject, planted, measure, tmp_path) -> None:
    model, suite = subject(planted.noise, folder=tmp_path), _Shares()
    model.step, model.tensorboard = 3, tmp_path / "tensorboard"
    records = list(measure(suite, model, {"depth": 1}).values())
    assert [line.split()[-1] for line in suite.table(records).splitlines()[2:]] == ["-", "3.000", "3.000"]
    without = [{key: number for key, number in record.items() if key != "rare"} for record in records]
    assert "rare" not in suite.table([record | {"spec": spec} for record in without for spec in ("none", "svd")])
    for missing in ({"rare"}, {"hit", "rare"}):
        kept = {key: number for key, number in records[-1].items() if key not in missing}
        (tmp_path / "evaluation" / "shares" / "shares.json").unlink(missing_ok=True)
        assert suite.save(model, kept) == tmp_path / "evaluation" / "shares" / "depth=1" / "all.json"
        assert (tmp_path / "evaluation" / "shares" / "shares.json").exists() == ("hit" in kept)


def test_long_settings_that_begin_alike_have_two_folders(subject, planted, measure, tmp_path) -> None:
    model, suite = subject(planted.noise, folder=tmp_path), _Shares()
    record = next(iter(measure(suite, model, {"depth": 1}).values()))
    first, second = (suite.save(model, record | {"settings": {"depth": 300 * "x" + end}}) for end in "ab")
    assert first.parent != second.parent
    assert len(first.parent.name) < 200


def test_the_example_of_the_documentation_is_a_suite(subject, planted, measure) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "suites.md").read_text(encoding="utf-8")
    example: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], example)
    (record, _) = measure(example["Colours"](), subject(planted.copying), {"samples": 3}).values()
    assert (record["task"], record["questions"], record["accuracy"]) == ("cars", 3, 100.0)


# ---- texts -----------------------------------------------------------------------------------------------------------


def test_pieces_are_those_of_the_whole_text_and_joins_belong_to_what_follows(subject, planted) -> None:
    model = subject(planted.noise)
    texts = ("one two three al", "pha 日本", "語 beta", "", " naï")
    cut = pieces(model, *texts)
    assert sum(cut, ()) == encode(model, ["".join(texts)])[0]
    alone = encode(model, ["one two three al"])[0]
    assert len(cut[0]) < len(alone), "`alpha` is one token, which begins in the first text"
    before, options = continuations(model, "one two three al", ("pha", "x"))
    assert before == cut[0]
    assert [decode(model, before + option) for option in options] == ["one two three alpha", "one two three alx"]
    assert continuations(model, "one two", (" three",))[0] == encode(model, ["one two"])[0]

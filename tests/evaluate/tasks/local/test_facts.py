"""Facts about every suite of local files: sample sets run, noise scores chance, long samples are refused."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import UserError
from cllm.evaluate.suites.choice import parse_choice
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.suite import TaskSuite

SAMPLES = Path(__file__).parent / "samples"
ROOT = Path(__file__).parents[4]
RUN = "runs/quickstart/mha"
LOCAL = {
    "blimp": f"path={SAMPLES}/blimp.jsonl",
    "piqa": f"path={SAMPLES}/piqa.jsonl,shots=1",
    "hellaswag": f"path={SAMPLES}/hellaswag.jsonl",
    "arc_easy": f"path={SAMPLES}/arc.jsonl",
    "arc_challenge": f"path={SAMPLES}/arc.jsonl,letters=true",
    "mmlu": f"path={SAMPLES}/kitchen_test.csv",
    "gsm8k": f"path={SAMPLES}/gsm8k.jsonl,generate=4",
    "lambada": f"path={SAMPLES}/lambada.jsonl",
    "wikitext": f"path={SAMPLES}/wikitext.txt",
    "longbench": f"path={SAMPLES}/longbench",
    "code": f"path={SAMPLES}/lcc.jsonl,generate=4",
}
"""Options of each suite for its sample set."""


def demonstrations() -> list[list[str]]:
    """The arguments of every evaluate.py of docs/suites.md on a run of the quickstart, as bash passes them."""
    page = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")
    blocks = [block for block in re.findall(r"^```bash\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if RUN in block]
    script = "python() { printf '%s\\0' \"$@\"; echo; }\n" + "".join(blocks)
    bash = shutil.which("bash")
    assert bash is not None
    printed = subprocess.run([bash, "-c", script], env={"PATH": ""}, capture_output=True, encoding="utf-8", check=True)
    commands = [line.rstrip("\0").split("\0") for line in printed.stdout.splitlines()]
    return [words[1:] for words in commands if words[0] == "evaluate.py" and RUN in words]


def test_every_suite_has_a_command_that_runs(evaluate, long_run, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    run = long_run(max_seq_len=512)
    demonstrated = set()
    for words in demonstrations():
        name = words[words.index("--suite") + 1].partition(":")[0]
        demonstrated.add(name)
        out = tmp_path / str(len(demonstrated))
        words = [word.replace("ruler:length=256", "ruler:length=512") for word in words]  # long with a small vocabulary
        options = [run if word == RUN else word for word in words]
        assert evaluate(*options, "--max-tokens", 300, "--device", "cpu", "--out", out) == 0
        if isinstance(suites()[name], TaskSuite):
            record = json.loads((out / name / f"{name}.json").read_text())
            assert record["questions"] > 0
            assert math.isfinite(record[suites()[name].compared_numbers()[0].key])
    assert demonstrated == {*suites()} - {"posthoc"}, "posthoc.md has those of posthoc"


WORDS = ["lid", "jar", "pot", "sun", "box", "key", "rope", "lamp", "soup", "door"]


def _questions(count: int) -> list[dict[str, Any]]:
    """Rows with random words, in the fields of four data sets; the right option is drawn."""
    draw = random.Random(1)

    def some() -> str:
        return " ".join(draw.sample(WORDS, 3))

    rows = []
    for n in range(count):
        options = [f"{some()} {n}" for _ in range(4)]
        row = {"goal": some(), "sol1": options[0], "sol2": options[1], "label": draw.randrange(2)}
        row |= {"sentence_good": options[0], "sentence_bad": options[1], "UID": "u", "linguistics_term": "t"}
        row |= {"activity_label": some(), "ctx_a": some(), "ctx_b": "it", "endings": options}
        row |= {"question": some(), "choices": options, "subject": "s", "text": f"{some()}. {some()} {n}"}
        rows.append(row | {"answer": f"{n}\n#### {n}"})
    return rows


@pytest.mark.parametrize(
    ("name", "chance"),
    [
        ("blimp", 50),
        ("piqa", 50),
        ("hellaswag", 25),
        ("arc_easy", 25),
        ("mmlu", 25),
        ("lambada", 0),
        ("gsm8k", 0),
        ("longbench", 0),
        ("code", 0),
    ],
)
def test_noise_scores_chance(name: str, chance: int, subject, measure, write_lines, tmp_path) -> None:
    """Of a model with random weights; MMLU, HellaSwag and PIQA by their texts."""
    draw, rows = random.Random(0), _questions(60)
    if name in ("hellaswag", "mmlu"):
        rows = [row | {"label": str(right), "answer": right} for row in rows for right in [draw.randrange(4)]]
    if name == "arc_easy":
        rows = [
            row | {"choices": {"text": row["choices"], "label": [*"ABCD"]}, "answerKey": draw.choice("ABCD")}
            for row in rows
        ]
    options: dict[str, Any] = {"path": str(write_lines(f"{name}.jsonl", rows))}
    more: dict[str, dict[str, Any]] = {"mmlu": {"letters": False}, "gsm8k": {"generate": 4, "samples": 8}}
    options |= more.get(name, {})
    if name in ("longbench", "code"):
        options["path"] = str(SAMPLES / {"longbench": "longbench", "code": "lcc.jsonl"}[name])
    suite = suites()[name]
    record = measure(suite, subject, options)["all", "as it is"]
    key = {"gsm8k": "exact_match", "longbench": "score", "code": "exact_match"}.get(name, "accuracy")
    spread = math.sqrt(chance * (100 - chance) / record["questions"])
    assert abs(record[key] - chance) <= max(4 * spread, 1)


@pytest.mark.parametrize("name", ["piqa", "hellaswag", "arc_easy", "lambada", "gsm8k", "blimp"])
def test_a_sample_beyond_the_context_is_refused_before_anything_runs(name: str, subject, measure, monkeypatch) -> None:
    suite = suites()[name]
    monkeypatch.setattr(subject, "context", 12)
    monkeypatch.setattr(subject, "engine", lambda: pytest.fail("something ran"))
    given = parse_choice(f"{name}:{LOCAL[name]}", suites()).given
    assert given is not None
    with pytest.raises(UserError, match=rf"--suite {name}: a sample of \w+ has \d+ tokens; allowed: up to the context"):
        measure(suite, subject, given.model_dump(exclude_unset=True))


def test_the_hub_is_not_waited_for_if_it_does_not_answer(monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    from huggingface_hub import constants

    from cllm.evaluate.tasks.harness.offline import offline_if_unreachable

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        with offline_if_unreachable() as offline:
            assert (offline, constants.HF_HUB_OFFLINE) == (False, False)
    with offline_if_unreachable() as offline:  # nobody listens there any more
        assert (offline, constants.HF_HUB_OFFLINE) == (True, True)
    assert not constants.HF_HUB_OFFLINE

"""The table of docs/posthoc.md about the study's designs under compression is what its command prints."""

from __future__ import annotations

import contextlib
import io
import subprocess

import pytest

from cllm.commands.compare import main
from cllm.study.summary import Summary
from tests.study.page import DOCS, cells_of, copying_in, row, said

PAGE = (DOCS / "posthoc.md").read_text(encoding="utf-8")
SECTION = PAGE.split("\n### After 490 M tokens\n")[1].split("\n### ")[0]
NAMES = {"mla, learning rate 0.00075": "mla", "mla, learning rate 0.0015": "mla, 1.5e-3"}
SCORES = ("ruler length=2048, accuracy %", "ruler length=4096, accuracy %", "copying, accuracy %", "mqar, loss")
OTHER_TEXT = "yoco"
"""Its perplexities are of a longer text than those of the others, with which the command does not compare them."""

Table = dict[tuple[str, str], list[str]]


@pytest.fixture(scope="module")
def printed() -> Table:
    command = SECTION.split("```bash\n")[1].split("```")[0]
    bash = ["bash", "-c", f"printf '%s\\n' {command}"]  # it expands the patterns
    program, name, *words = subprocess.run(
        bash, cwd=DOCS.parent, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert (program, name) == ("cllm", "compare")
    with contextlib.chdir(DOCS.parent), contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(words) == 0
    head, _, *rows = cells_of(output.getvalue())
    found: Table = {}
    for cells in rows:
        of = dict(zip(head, cells, strict=True))
        name, spec = NAMES.get(of["trained"], of["trained"]), of["compressed"]
        loss = cells[head.index("perplexity") + 1] if spec else of["perplexity"]
        found[name, spec] = [of["mha / x"], loss, *(of[score] for score in SCORES)]
    return found


def test_the_table(printed: Table) -> None:
    _, _, *rows = cells_of(SECTION)
    for name, spec, share, loss, *scores in rows:
        expected = ["" if cell == "–" else cell for cell in printed[name, spec]]
        if name == OTHER_TEXT:
            expected[1] = loss
        assert [share, loss, *(score.strip("*") for score in scores)] == expected, (name, spec)
    assert {name for name, *_ in rows} == {name for name, _ in printed}


def test_the_sentences_about_mla(printed: Table) -> None:
    four, eight = (printed["mla", f"`xkv:group=4,ratio={ratio}`"] for ratio in (4, 8))
    own, mha = printed["mla", ""], printed["mha", "`xkv:group=4,ratio=8`"]
    kept = float(four[4].split()[0]) / float(own[4].split()[0])
    assert kept == pytest.approx(1 / 5, abs=0.05), "four fifths are lost"
    assert float(eight[4].split()[0]) < 0.2, "all of the copying"
    costs = {name: cells[1] for (name, spec), cells in printed.items() if spec == "`xkv:group=4,ratio=8`"}
    percent = {name: float(cost.rstrip(" %")) for name, cost in costs.items() if cost}
    assert max(percent, key=percent.__getitem__) == "mla", "more than of any other design"
    assert {"mha", "cla-2", "fusedkv", "fusedkv_lite"} < percent.keys()
    said(
        f"costs {four[1].lstrip('+')} of perplexity and four fifths of the copying, at 8x {eight[1].lstrip('+')}",
        text=SECTION,
    )
    assert float(four[0]) > 8 < float(mha[0]), "an eighth of mha's cache"
    said(f"copying of {four[4].split()[0]} and {mha[4].split()[0]} %", text=SECTION)


def test_the_sentences_about_copying(printed: Table, summary: Summary) -> None:
    copied = {name: float(cells[4].split()[0]) for (name, spec), cells in printed.items() if not spec}
    percent = {name: f"{value:.0f} %" for name, value in copied.items()}
    said(
        f"fusedkv copies {percent['fusedkv']}, fusedkv_lite {percent['fusedkv_lite']} and swiftkv "
        f"{percent['swiftkv']}, mha {percent['mha']} and cla-2 {percent['cla-2']}.",
        text=SECTION,
    )
    after = printed["swiftkv", "`xkv:group=4,ratio=4`"]
    assert 1 - float(after[4].split()[0]) / copied["swiftkv"] == pytest.approx(2 / 3, abs=0.02), "two thirds"
    assert {spec.strip("`").partition(":")[0] for name, spec in printed if name == "swiftkv"} == {"", "xkv"}
    _, second = row(summary, "swiftkv").results
    (near,) = copying_in(second.content["evaluations"], "none", "distance=512")
    said(
        f"xKV at 4x costs swiftkv {after[1].lstrip('+')} and two thirds of its copying",
        f"swiftkv copied {near['accuracy']:.0f} % in its only one",
        text=SECTION,
    )

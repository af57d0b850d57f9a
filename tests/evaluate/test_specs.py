"""Specs of --posthoc: words, and files with a spec on each line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm.errors import UserError
from cllm.evaluate.pareto import expand
from cllm.evaluate.suites.posthoc import specs_of
from cllm.posthoc.registry import methods, parse

PICTURE = Path(__file__).resolve().parents[2] / "configs" / "posthoc" / "picture.txt"


def test_a_file_stands_for_its_lines(tmp_path):
    file = tmp_path / "specs.txt"
    text = "\ufeff# quantisers\r\nint8  # one scale for a channel\n\n  kivi:bits=4,residual=32  \nnone\n"
    file.write_text(text, encoding="utf-8")
    assert specs_of(["none", f"@{file}", "fp8", "int8"]) == ["none", "int8", "kivi:bits=4,residual=32", "fp8"]


def test_a_file_stands_for_the_templates_of_a_sweep(tmp_path):
    file = tmp_path / "specs.txt"
    file.write_text("svd:ratio={ratio}\nint8\n")
    assert expand([f"@{file}"], [4], [2, 8]) == ["svd:ratio=2", "svd:ratio=8", "int8"]
    with pytest.raises(UserError, match=r"^--spec @.*none\.txt: cannot be read"):
        expand([f"@{tmp_path / 'none.txt'}"], [4], [2])


@pytest.mark.parametrize("spec", ["svd:ratio=2 # of bytes", "svd:ratio=2,select=#", "kivi:bits=4 #,residual=0"])
def test_a_comment_in_a_spec_is_an_error(spec):
    with pytest.raises(UserError, match=f'^--posthoc "{spec}": .*: YAML reads "#.*" as a comment; leave it out'):
        parse(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("# nothing\n\n", "has no spec; needed: one on a line, such as xkv:group=4,ratio=4"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_file_without_specs_is_an_error(tmp_path, text, message):
    file = tmp_path / "specs.txt"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^--posthoc @{file}: {message}"):
        specs_of([f"@{file}"])


def test_the_list_of_the_picture_has_every_method_of_cllm_models():
    names = set()
    for spec in specs_of([f"@{PICTURE}"]):
        parse(spec)
        names |= {part.partition(":")[0] for part in spec.split("+")}
    assert methods().keys() - names == {"none", "minicache_xkv", "hf_quantized"}

"""Options behind a name: one rule for post-hoc methods, suites and designs."""

from __future__ import annotations

import pytest

from benchmarks.decode.designs import parse_design
from cllm.config.designs import parse_plan, parse_preset
from cllm.errors import UserError
from cllm.evaluate.suites.choice import parse_choice
from cllm.evaluate.suites.registry import suites
from cllm.key_values import read_options, split_options
from cllm.posthoc.registry import parse


def choose(text):
    return parse_choice(text, suites())


@pytest.mark.parametrize(
    ("reader", "text", "message"),
    [
        (parse, "xkv:ratio=4,ratio=8", '--posthoc "xkv:ratio=4,ratio=8": ratio is given twice, as 4 and as 8'),
        (parse, "snapkv:ratio=2+svd:ratio=2, ratio=3", "ratio is given twice, as 2 and as 3; give it once"),
        (
            choose,
            "copying:length=64,seed=1,length=8",
            "--suite .*: length is given twice, as 64 and as 8; give it once",
        ),
        (
            choose,
            "copying:distances=2,distances=4",
            r"distances is given twice, as 2 and as 4; give it once; a list is written distances=A\|B",
        ),
        (parse_plan, "gqa:n_kv_heads=4,n_kv_heads=2", "--designs gqa.*: n_kv_heads is given twice, as 4 and as 2"),
        (parse_preset, "gqa:n_kv_heads=4,n_kv_heads=2", "--designs gqa.*: n_kv_heads is given twice, as 4 and as 2"),
        (lambda word: parse_design(word, [], [], ()), "mha:window=4,window=4@32x1", "window is given twice"),
    ],
)
def test_a_key_that_is_given_twice_is_named_with_both_values(reader, text, message):
    with pytest.raises(UserError, match=message):
        reader(text)


@pytest.mark.parametrize(
    ("reader", "text"),
    [(parse, "xkv:ratio"), (choose, "copying:length"), (parse_plan, "gqa:=4"), (parse_preset, "gqa:")],
)
def test_an_option_of_another_form_is_named(reader, text):
    with pytest.raises(UserError, match=f'"{text.partition(":")[2]}" is not of the form KEY=VALUE'):
        reader(text)


def test_a_preset_is_not_given_again():
    with pytest.raises(UserError, match="--designs mha:preset=cla: preset=cla: the name of the design is its preset"):
        parse_preset("mha:preset=cla")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a=[1, 2],b='c, d'", ["a=[1, 2]", "b='c, d'"]),
        ("a=[[0, 5], [1]], b=2", ["a=[[0, 5], [1]]", "b=2"]),
        ("a=it's,b=c]", ["a=it's", "b=c]"]),
        ('a="x,y"|z,b=', ['a="x,y"|z', "b="]),
        ("", [""]),
    ],
)
def test_commas_of_lists_and_quotes_separate_nothing(text, options):
    assert split_options(text) == options


def test_a_design_may_have_a_list():
    assert parse_preset("fusedkv:sources=[0, 5],n_kv_heads=2") == {
        "preset": "fusedkv", "sources": [0, 5], "n_kv_heads": 2,
    }  # fmt: skip
    assert parse_plan("fusedkv:sources=[0, 5]")[1] == {"sources": "[0, 5]"}


def test_the_first_value_may_have_no_key():
    assert list(read_options("x|y, n=3", "-", first="tasks")) == [("tasks", "x|y"), ("n", "3")]
    with pytest.raises(UserError, match=r'-: "y" is not of the form KEY=VALUE; allowed: n$'):
        list(read_options("x, y", "-", first="tasks", allowed="n"))

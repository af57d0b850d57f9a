"""Methods of other packages: found through entry points, parsed, measured and swept like the built-in ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cllm.errors import UserError
from cllm.evaluate.posthoc import Measurement
from cllm.posthoc import registry
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import default_sweep, describe_methods, methods, parse, register

TRUNCATE = '''
"""Numbers without their low bits: as `ml_dtypes` would store them in `bits` of 16."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cllm.posthoc.code import Code, Codes
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@dataclass(frozen=True)
class Half(Code):
    data: Tensor
    dtype: torch.dtype

    def decode(self) -> Tensor:
        return self.data.to(self.dtype)


@register("truncate", summary="keys and values in 16 or 8 bits", sweep=("truncate", "truncate:bits=8"))
class Truncate(Compressor):
    bits: Literal[8, 16] = 16
    """Bits of a stored number."""

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        dtype = torch.bfloat16 if self.bits == 16 else torch.float8_e4m3fn
        k, v = ([Half(x.to(dtype), t.dtype) for x in t.data] if t else [None] * len(keys.slots) for t in (keys, values))
        return k, v
'''

CLASH = TRUNCATE.replace('"truncate", summary', '"xkv", summary')
ENTRY = {"cllm.posthoc": {"truncate": "outside_truncate:Truncate"}}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that a test registers are removed after it."""
    monkeypatch.setattr(registry, "_registered", dict(methods()))


@pytest.fixture
def truncate(install_package: Callable[..., Path]) -> None:
    """A method in a package outside of cllm."""
    install_package("truncate-kv", {"outside_truncate": TRUNCATE}, ENTRY)


@pytest.mark.usefixtures("truncate")
def test_a_plugin_is_parsed_and_listed_like_any_method() -> None:
    method = parse("truncate:bits=8,sinks=2")
    assert (method.name, method.sinks, method.bits) == ("truncate", 2, 8)  # type: ignore[attr-defined]
    assert "truncate" in methods()
    assert {"truncate", "truncate:bits=8", "kvsharer"} <= set(default_sweep())
    text = describe_methods()
    assert "truncate: keys and values in 16 or 8 bits" in text
    assert "    bits=16  Bits of a stored number." in text
    assert "    group=4  Neighbouring slots that share a basis" in text, "of xkv"
    assert "    no sinks: every token is stored exactly" in text
    assert text.count("    sinks=4  First tokens of every sequence") == 1
    for spec, message in (
        ("truncate:bits=4", "bits: Input should be 8 or 16 got 4"),
        ("truncate:bit=8", 'unknown option "bit" of truncate; allowed: bits, every, recompress, sinks'),
        ("trunkate", 'did you mean "truncate"?'),
    ):
        with pytest.raises(UserError, match="(?s).*" + message.replace("?", r"\?")):
            parse(spec)


@pytest.mark.usefixtures("truncate")
@pytest.mark.parametrize("kind", ["cllm", "transformers"])
def test_the_bytes_of_a_plugin_are_those_of_its_tensors(kind, decoder, llama, tokens, filled) -> None:
    engine, cache = filled(decoder() if kind == "cllm" else llama(), tokens(2, 20))
    exact = engine.nbytes(cache)  # fp32
    assert engine.compress(cache, parse("truncate:sinks=0")).nbytes() == exact // 2
    small = engine.compress(cache, parse("truncate:bits=8,sinks=4"))
    assert small.nbytes() == exact * 4 // 20 + exact * 16 // 20 // 4
    assert 0 < small.outcome.errors[0]["k"] < 0.1
    assert torch.isfinite(engine.logits(tokens(2, 3, seed=1), small)).all()


@pytest.mark.usefixtures("truncate")
def test_a_plugin_from_the_command_lines(evaluate, sweep, run, tmp_path, capsys) -> None:
    made, _ = run()
    words = ["--posthoc", "none", "--posthoc", "truncate:sinks=0"]
    assert evaluate("--run", made.path, "--device", "cpu", *words) == 0
    point = Measurement(set_name="validation", spec="truncate:sinks=0", prefix=24, window=48)
    record = json.loads(point.path(made.path / "evaluation").read_text())
    assert record["method"] == "truncate"
    assert record["ratio_to_own"] == 2
    assert 0 < abs(record["loss"] - record["uncompressed_loss"]) < 0.05
    capsys.readouterr()
    assert evaluate("--list-posthoc") == 0
    assert "\ntruncate: keys and values in 16 or 8 bits\n" in capsys.readouterr().out
    assert sweep(made.path, "--device", "cpu", "--spec", "truncate", "--out", tmp_path / "out") == 0
    rows = list(csv.DictReader((tmp_path / "out" / "posthoc.csv").open()))
    assert [row["spec"] for row in rows] == ["as trained", "truncate"]


@pytest.mark.parametrize(
    ("source", "entry", "reason"),
    [
        ("import nowhere_at_all", "outside_truncate:Truncate", "No module named 'nowhere_at_all'"),
        (TRUNCATE, "outside_truncate:Missing", "has no attribute 'Missing'"),
        (TRUNCATE, "outside_truncate:Half", "allowed: the class of a method that is registered as"),
        ("Truncate = 3", "outside_truncate:Truncate", "is 3; allowed: the class of a method"),
        (CLASH, "outside_truncate:Truncate", 'method "xkv" of outside_truncate.Truncate: the name is taken by cllm.'),
    ],
)
def test_a_plugin_that_cannot_be_used_is_one_line(
    install_package, evaluate, run, capsys, source: str, entry: str, reason: str
) -> None:
    install_package("truncate-kv", {"outside_truncate": source}, {"cllm.posthoc": {"truncate": entry}})
    made, _ = run()
    assert evaluate("--run", made.path, "--device", "cpu", "--posthoc", "none") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert f'plug-in cllm.posthoc "truncate" ({entry}, distribution truncate-kv 1.0)' in line


def test_plugins_are_loaded_only_for_compression(install_package, evaluate, run) -> None:
    install_package("truncate-kv", {"outside_truncate": "import nowhere_at_all"}, ENTRY)
    made, _ = run()
    assert evaluate("--run", made.path, "--device", "cpu") == 0


def test_a_method_of_a_script_is_registered_and_may_be_defined_again() -> None:
    for sinks in (4, 2):

        @register("mine", summary="a method that a notebook defines")
        class Mine(methods()["none"]):  # type: ignore[misc]
            no_sinks = None

        assert parse("mine").name == "mine"
        assert parse(f"mine:sinks={sinks}").sinks == sinks
        assert methods()["mine"] is Mine
    with pytest.raises(UserError, match=r'post-hoc method "kivi" of .*Mine: the name is taken by .*kivi.KIVI'):
        register("kivi", summary="")(Mine)
    with pytest.raises(UserError, match="allowed in a name: lower case letters, digits and _"):
        register("my:method", summary="")


def test_every_method_has_a_summary_and_sweeps_specs_that_parse() -> None:
    for name, method in methods().items():
        assert method.name == name
        assert method.summary
        assert issubclass(method, Compressor)
    for spec in default_sweep():
        assert parse(spec.format(group=4, ratio=2)).name in methods()

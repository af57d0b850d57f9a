"""Errors of configs name a key of the file, the value and all that is allowed, whatever pydantic calls the place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from cllm.config import Config
from cllm.config.load import schema_keys, validate
from cllm.data.prepare.recipe import Recipe
from cllm.errors import UserError
from cllm.study.schema import Study

CONFIG = {"model": {"d_model": 64, "n_layers": 8, "n_heads": 4}}
RATES = {"values": [0.001], "tokens": "1M"}
RECIPE = {
    "name": "x",
    "source": {"kind": "files", "paths": ["a"]},
    "tokenizer": {"load": "gpt2"},
    "validation": {"fraction": 0.1},
}
STUDY = {"name": "x", "base": ["a.yaml"], "designs": {"x": {}}, "tokens": ["1M"]}


def mistake(schema: type[BaseModel], data: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        validate(schema, data)
    return str(error.value)


MISTAKES = {
    "a design that is a number": (
        {"designs": {"x": ["a.yaml", 1]}},
        "designs.x.1: input should be a valid string or mapping, got 1",
    ),
    "several such designs": (
        {"designs": {"x": [1, None]}},
        "designs.x.0: input should be a valid string or mapping, got 1 (and 1 more)",
    ),
    "a design with the name of a type": (
        {"designs": {"str": [["a"]]}},
        "designs.str.0: input should be a valid string or mapping, got ['a']",
    ),
    "a design that is given alone": (
        {"designs": {"x": 1}},
        "designs.x: input should be a valid string or mapping, got 1",
    ),
    "a design whose key is a number": (
        {"designs": {"x": {1: 2}}},
        "designs.x.1: the key should be a valid string, got 1",
    ),
    "a number as the key of a setting": (
        {"overrides": {"model": {"kv": {1: 2}}}},
        "overrides.model.kv.1: the key should be a valid string, got 1",
    ),
    "a setting that JSON does not have": (
        {"settings": {"optim.betas": [[0.9, {"a": b""}]]}},
        "settings.optim.betas.0.1.a: input was not a valid JSON value, got b''",
    ),
    "a base that is given alone": ({"base": 1}, "base: input should be a valid string, got 1"),
    "a budget that is given alone": ({"tokens": "1 x"}, "tokens: is '1 x'; allowed: a number of tokens such as"),
    "seeds of a design": ({"seeds": {"x": [0, "a"]}}, "seeds.x.1: input should be a valid integer, got 'a'"),
    "a seed of a design": ({"seeds": {"x": 1}}, "seeds.x: input should be a valid list, got 1"),
    "seeds": ({"seeds": 1}, "seeds: input should be a valid list or mapping, got 1"),
    "no seeds": ({"seeds": {}}, "seeds: value should have at least 1 item after validation, not 0, got {}"),
    "the known rate of a design": (
        {"rates": {**RATES, "known": {"x": "a"}}},
        "rates.known.x: input should be a valid number, got 'a'",
    ),
    "a known rate": (
        {"rates": {**RATES, "known": -1}},
        "rates.known: input should be greater than 0, or a valid mapping, got -1",
    ),
    "a share": (
        {"match": {"cache_bytes": 3}},
        "match.cache_bytes: is 3; allowed: a share of mha's cache such as 1/2, above 0 and at most 1, or a valid "
        "mapping",
    ),
    "the share of a design": ({"match": {"cache_bytes": {"x": "2"}}}, "match.cache_bytes.x: is '2'; allowed: a share"),
    "a rule": (
        {"match": "bytes"},
        "match: is 'bytes', and no mapping of parameters, cache_bytes, flops; nearest: \"parameters\"; allowed: flops, "
        "parameters",
    ),
    "a word or true or false": (
        {"share_gpu": {"a": 1}},
        "share_gpu: input should be a valid boolean, 'trainings' or 'evaluations', got {'a': 1}",
    ),
    "a section": ({"slurm": 1}, "slurm: input should be a valid mapping, got 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_study_has_its_key_its_value_and_all_that_is_allowed(case: str) -> None:
    settings, message = MISTAKES[case]
    assert mistake(Study, {**STUDY, **settings}).startswith(message)


def test_a_mistake_in_a_config_has_its_key_its_value_and_all_that_is_allowed() -> None:
    assert (
        mistake(Config, {**CONFIG, "optim": {"options": {"float": [1]}}})
        == "optim.options.float: input should be a valid boolean, integer, number or string, got [1]"
    )
    assert (
        mistake(Config, {**CONFIG, "optim": {"options": {1: [1]}}})
        == "optim.options.1: the key should be a valid string, got 1 (and 1 more)"
    )
    assert (
        mistake(Config, {**CONFIG, "train": {"devices": 1.5}})
        == "train.devices: input should be a valid integer or 'auto', got 1.5"
    )


def resolves(data: Any, key: str) -> bool:
    """Whether `data` has the key, which may have dots, or indices."""
    if not key or not isinstance(data, (dict, list)):
        return not key
    entries = data.items() if isinstance(data, dict) else enumerate(data)
    return any(
        resolves(value, key[len(str(part)) + 1 :]) for part, value in entries if f"{key}.".startswith(f"{part}.")
    )


WRONG: list[Any] = [1.5, -1, "?", b"", [b""], [[b""]], [{"k": b""}], [{1: 2}], {"k": b""}, {"k": [b""]}, {1: {"k": []}}]
"""Values of other types, at several depths. No setting takes bytes."""


def mistakes(schema: type[BaseModel], data: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """`data` with each setting in turn replaced by a wrong value, and the key that the error names."""
    for key in schema_keys(schema):
        *sections, leaf = key.split(".")
        for wrong in WRONG:
            content = here = dict(data)
            for section in sections:
                here[section] = dict(here.get(section) or {})
                here = here[section]
            here[leaf] = wrong
            try:
                validate(schema, content)
            except UserError as error:
                named, _, message = str(error).partition(": ")
                if re.fullmatch(r"\S+", named) and not message.startswith("is required and missing"):
                    yield content, named


@pytest.mark.parametrize(
    ("schema", "data"), [(Config, CONFIG), (Study, {**STUDY, "rates": RATES, "match": {}}), (Recipe, RECIPE)]
)
def test_the_key_of_every_mistake_is_one_of_the_file(schema: type[BaseModel], data: dict[str, Any]) -> None:
    found = list(mistakes(schema, data))
    assert len(found) > 5 * len(schema_keys(schema))
    assert not [(content, key) for content, key in found if not resolves(content, key)]

"""The methods by name, and the spec strings that choose one: `xkv:group=4,ratio=4`, `xkv:group=4,ratio=2+kivi:bits=4`.

A spec is a name, then `:` and options, then perhaps `+` and a quantiser for what is stored. Values are YAML.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from cllm.config.load import parse_yaml
from cllm.errors import UserError, nearest
from cllm.posthoc.code import Codable, Compressor, Nothing, TensorCoder
from cllm.posthoc.commonkv import CommonKV
from cllm.posthoc.hf_quantized import HFQuantized
from cllm.posthoc.kvsharer import KVSharer
from cllm.posthoc.minicache import MiniCache, MiniCacheXKV
from cllm.posthoc.quantize import KIVI, XQuant
from cllm.posthoc.xkv import SVD, XKV

METHODS: dict[str, type[Compressor]] = {
    method.name: method
    for method in (Nothing, XKV, SVD, MiniCache, MiniCacheXKV, CommonKV, KIVI, XQuant, HFQuantized, KVSharer)
}


def parse(spec: str) -> Compressor:
    """The method that `spec` describes.

    Raises:
        UserError: naming `spec`, for an unknown method or option (and the allowed ones), a value of the wrong type or
            out of range, and a second method that is no quantiser, has an option that is none of one tensor, or has
            nothing to code.
    """
    first, *more = (_one(text, spec) for text in spec.split("+"))
    if not more:
        return first
    coder = more[0]
    if len(more) > 1 or not isinstance(first, Codable) or not isinstance(coder, TensorCoder):
        firsts, coders = (
            " or ".join(name for name, method in METHODS.items() if issubclass(method, kind))
            for kind in (Codable, TensorCoder)
        )
        raise UserError(f'--posthoc "{spec}": allowed with +: {firsts}, then {coders}')
    if wrong := sorted(coder.model_fields_set & coder.of_slots):
        allowed = ", ".join(sorted(set(type(coder).model_fields) - coder.of_slots))
        raise UserError(f'--posthoc "{spec}": {wrong[0]} is no option of {coder.name} after +; allowed: {allowed}')
    try:
        return first.coded_by(coder)
    except ValueError as error:
        raise UserError(f'--posthoc "{spec}": {error}') from None


def _one(text: str, spec: str) -> Compressor:
    name, colon, options = text.strip().partition(":")
    if name not in METHODS:
        raise UserError(f'--posthoc "{spec}": unknown method "{name}"; {nearest(name, METHODS)}')
    method = METHODS[name]
    given: dict[str, Any] = {}
    for option in options.split(",") if colon else []:
        key, equals, value = (piece.strip() for piece in option.partition("="))
        if not equals or key in given:
            raise UserError(f'--posthoc "{spec}": "{option}" is no new key=value; allowed: {_allowed(method)}')
        if key not in method.model_fields:
            raise UserError(f'--posthoc "{spec}": unknown option "{key}" of {name}; allowed: {_allowed(method)}')
        given[key] = parse_yaml(value, f'--posthoc "{spec}": {key}')
    try:
        return method.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"].removeprefix("Value error, ")
        seen = f" got {first['input']!r}" if key else ""
        raise UserError(f'--posthoc "{spec}": {key}{": " if key else ""}{message}{seen}') from None


def _allowed(method: type[Compressor]) -> str:
    return ", ".join(sorted(method.model_fields))

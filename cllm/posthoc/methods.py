"""The methods by name, and the spec strings that choose one: `xkv:group=4,ratio=4`, `xkv:group=4,ratio=2+kivi:bits=4`.

A spec is a name, then `:` and options, then perhaps `+` and a quantiser for the factors. Values are YAML.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from cllm.cli import parse_yaml
from cllm.errors import UserError, nearest
from cllm.posthoc.code import Compressor, Nothing, TensorCoder
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
            out of range, and a second method that is no quantiser or has no factors to code.
    """
    first, *more = (_one(text, spec) for text in spec.split("+"))
    if not more:
        return first
    if len(more) > 1 or not isinstance(first, XKV) or not isinstance(more[0], TensorCoder):
        coders = ", ".join(name for name, method in METHODS.items() if issubclass(method, TensorCoder))
        raise UserError(f'--posthoc "{spec}": allowed with +: xkv or svd, then one of {coders}')
    return first.on_factors(more[0])


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

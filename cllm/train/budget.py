"""The tokens of a run against its data and against the clock, for the dry run."""

from __future__ import annotations

from pathlib import Path

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.mixture import Mixture, check_same_tokenizer
from cllm.data.module import TRAIN, VALIDATION
from cllm.errors import DataError, UserError
from cllm.train.launch import Launch
from cllm.train.speed import Speed, earlier_speed

USEFUL_EPOCHS = 4
"""Up to 4 epochs, repeated tokens are worth nearly as much as new ones: Muennighoff et al. (arXiv 2305.16264)."""


def run_tokens(config: Config) -> int:
    """Training tokens of the entire run."""
    return config.train.steps * config.train.global_batch * config.data.seq_len


def budget_lines(config: Config, tokens_per_second: float | None = None, price: float | None = None) -> list[str]:
    """The lines `data`, `epochs` and, for a known rate, `time` and `cost`.

    Training data may not be prepared yet; other mistakes are errors, as in training.

    Args:
        config: of the run.
        tokens_per_second: training tokens on all devices together; None: the speed of an earlier run like this one.
        price: of a device for an hour, in any currency.

    Raises:
        UserError: for data that cannot be read, for validation sets that do not exist, and for folders of `data.mix`
            with different tokenizers, and for a price without a rate.
    """
    data = config.data
    manifests = {folder: Manifest.read(folder) if Path(folder).exists() else None for folder in data.weights}
    check_same_tokenizer([manifest for manifest in manifests.values() if manifest is not None])
    for name, folder in data.validation.items():
        _check_validation(f"data.validation.{name}", folder)
    for folder in data.mix if not data.validation else ():
        if manifests[folder] is not None:
            _check_validation("data.mix", folder)
    lines = [*_data_lines(config, manifests), _epochs_line(config, manifests)]
    speed = earlier_speed(config) if tokens_per_second is None else Speed(tokens_per_second=tokens_per_second)
    return lines + (_time_lines(config, speed, price) if speed is not None else _without_speed(price))


def _time_lines(config: Config, speed: Speed, price: float | None) -> list[str]:
    hours = run_tokens(config) / speed.tokens_per_second / 3600
    source = f" as in {speed.source}" if speed.source else ""
    lines = [f"time         {hours:,.3g} hours at {speed.tokens_per_second:,.0f} tokens/s{source}, without validation"]
    if price is not None:
        devices = Launch.planned(config).processes
        spent = hours * devices
        lines.append(f"cost         {spent * price:,.2f}: {spent:,.3g} device hours at {price:,.2f}")
    return lines


def _without_speed(price: float | None) -> list[str]:
    if price is not None:
        raise UserError(
            f"--price {price:g}: needs --tokens-per-second N, since no earlier run of this model has measured it here"
        )
    return []


def _check_validation(key: str, folder: str) -> None:
    try:
        Manifest.read(folder).split(VALIDATION)
    except DataError as error:
        raise UserError(f"{key}: {error}") from None


def _data_lines(config: Config, manifests: dict[str, Manifest | None]) -> list[str]:
    data = config.data
    names = data.validation_sets if data.mix else data.validation
    sets = f"; validation sets: {', '.join(names)}" if names else ""
    sizes = {folder: _size(manifest) for folder, manifest in manifests.items()}
    if not data.mix:
        return [f"data         data.path {data.path}: {sizes[data.main_folder]}{sets}"]
    lines = [f"data         data.mix of {len(data.mix)} folders{sets}"]
    shares = Mixture(data.mix).shares
    return lines + [f"             {100 * shares[folder]:.4g} % {folder}: {sizes[folder]}" for folder in data.mix]


def _size(manifest: Manifest | None) -> str:
    if manifest is None:
        return "not prepared yet"
    train = manifest.split(TRAIN)
    return f"{train.tokens:,} tokens in {train.documents:,} documents"


def _epochs_line(config: Config, manifests: dict[str, Manifest | None]) -> str:
    """Passes of the run over each training folder."""
    data = config.data
    taken = Mixture(data.weights).counts(config.train.steps * config.train.global_batch)
    found: dict[str, float] = {}
    texts = []
    for folder, manifest in manifests.items():
        if manifest is None:
            text = "unknown (not prepared yet)"
        elif (sequences := (manifest.split(TRAIN).tokens - 1) // data.seq_len) < 1:
            text = f"none (fewer tokens than data.seq_len {data.seq_len:,} and one)"
        else:
            found[folder] = taken[folder] / sequences
            text = f"{found[folder]:.3g} ({taken[folder] * data.seq_len:,} tokens)"
        texts.append(f"{folder} {text}" if data.mix else text)
    most = max(found.values(), default=0)
    warning = f"; after {USEFUL_EPOCHS}, repeated tokens are worth less than new ones" if most > USEFUL_EPOCHS else ""
    return f"epochs       {', '.join(texts)}{warning}"

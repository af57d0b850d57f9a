"""Errors a user can cause and mend.

`UserError` is raised for a mistake in a config, a path or a data set. Its message is one line that names the key or
file, the value seen and what is allowed. Command lines print that line to stderr and exit with status 2; everything
else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import functools
import re
import sys
from collections.abc import Callable, Iterable, Sequence

_IN_WORKER = re.compile(r"Caught \w+ in DataLoader worker process.*^[\w.]*Error: (.*)", re.DOTALL | re.MULTILINE)

EXIT_MISTAKE = 2
"""Exit status of a command that was given something it cannot use; its one line on stderr says what."""
EXIT_STOPPED = 3
"""Exit status of a command that was stopped (by a signal, or its time limit) and saved what it needs to go on."""


class UserError(ValueError):
    """A mistake of the user's, told in one line."""


class PlanError(UserError):
    """A KV plan that cannot be built; the message names the layer."""


class DataError(UserError):
    """Prepared data, a recipe or a corpus that cannot be used; the message names the file."""


_SYNONYMS = {
    "attention_heads": "n_heads",
    "batch": "global_batch",
    "batch_size": "global_batch",
    "block_size": "max_seq_len",
    "clip_grad_norm": "grad_clip",
    "context": "max_seq_len",
    "context_length": "max_seq_len",
    "dataset": "path",
    "depth": "n_layers",
    "dim": "d_model",
    "dtype": "precision",
    "embed_dim": "d_model",
    "epochs": "steps",
    "ffn_dim": "d_ff",
    "gpus": "devices",
    "hidden_dim": "d_model",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "iters": "steps",
    "kv_heads": "n_kv_heads",
    "learning_rate": "lr",
    "max_context": "max_seq_len",
    "max_grad_norm": "grad_clip",
    "max_iters": "steps",
    "max_position_embeddings": "max_seq_len",
    "max_steps": "steps",
    "method": "preset",
    "min_learning_rate": "min_lr",
    "mixed_precision": "precision",
    "n_embd": "d_model",
    "n_gpus": "devices",
    "n_head": "n_heads",
    "n_layer": "n_layers",
    "nodes": "num_nodes",
    "num_attention_heads": "n_heads",
    "num_epochs": "steps",
    "num_gpus": "devices",
    "num_heads": "n_heads",
    "num_hidden_layers": "n_layers",
    "num_key_value_heads": "n_kv_heads",
    "num_kv_heads": "n_kv_heads",
    "num_layers": "n_layers",
    "num_steps": "steps",
    "per_device_train_batch_size": "micro_batch",
    "random_seed": "seed",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "theta",
    "save_every": "checkpoint_every",
    "scheduler": "schedule",
    "seq_length": "seq_len",
    "sequence_length": "seq_len",
    "sliding_window": "window",
    "tie_word_embeddings": "tie_embeddings",
    "train_steps": "steps",
    "warmup": "warmup_steps",
    "wd": "weight_decay",
    "workers": "num_workers",
}
"""Names of other projects, and what the same is called here."""


def _plain(word: str) -> str:
    return word.casefold().replace("-", "_").replace(" ", "_")


def same_word(word: str, allowed: Iterable[str]) -> str | None:
    """The first of `allowed` whose last part (after a dot) differs from `word` in nothing but case and hyphens, or is
    what other projects call `word`; None where there is no such word."""
    allowed = list(allowed)
    for wanted in (_plain(word), _SYNONYMS.get(_plain(word))):
        for candidate in allowed:
            if wanted is not None and _plain(candidate).rpartition(".")[2] == wanted:
                return candidate
    return None


def _near(word: str, allowed: Sequence[str]) -> str | None:
    """One of `allowed` that `word` is a misspelling or an abbreviation of."""
    if same := same_word(word, allowed):
        return same
    plain = {_plain(candidate): candidate for candidate in reversed(allowed)}
    if close := difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.6):
        return plain[close[0]]

    def initials(text: str) -> str:
        return "".join(part[0] for part in text.split("_") if part)

    short = [
        candidate
        for text, candidate in plain.items()
        if len(word) > 1 and (initials(_plain(word)) == text or initials(text) == _plain(word))
    ]
    return short[0] if len(short) == 1 else None


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`did you mean "cla"?`, or the nearest and all of `allowed` where nothing is near. Ends an error message."""
    allowed = sorted(allowed)
    if close := _near(word, allowed):
        return f'did you mean "{close}"?'
    plain = {_plain(candidate): candidate for candidate in allowed}
    ranked = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.0)
    return f'nearest: "{plain[ranked[0]]}"; allowed: {", ".join(allowed)}' if ranked else "none is allowed here"


def _message(error: UserError) -> str:
    """The error's message; of one in a data loader's process, without the traceback that torch puts around it."""
    match = _IN_WORKER.match(str(error))
    return str(error) if match is None else match[1]


def one_line(command: Callable[..., int | None]) -> Callable[..., int]:
    """Make a command's main function print a `UserError` as one line on stderr and return 2."""

    @functools.wraps(command)
    def run(*args, **kwargs) -> int:
        try:
            return command(*args, **kwargs) or 0
        except UserError as error:
            print("error: " + " ".join(_message(error).split()), file=sys.stderr)
            return EXIT_MISTAKE

    return run

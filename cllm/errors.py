"""Errors that a user can cause and correct.

`UserError` is raised for a mistake in a config, a path or a data set. Its message is one line that names the key or
file, the value and what is allowed. Commands print that line on stderr and exit with status 2. They do the same for
faults of the machine such as a full disk (`cllm/faults.py`). Every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import functools
import io
import sys
from collections.abc import Callable, Iterable, Sequence

from cllm import faults

EXIT_MISTAKE = 2
"""Exit status of a command after a user's mistake, which one line on stderr describes."""
EXIT_STOPPED = 3
"""Exit status of a command that was stopped (by a signal, or its time limit) and can be resumed."""
EXIT_ELSEWHERE = 4
"""Exit status of a command that ended because other processes work on all that is left."""
EXIT_INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended: 128 + SIGINT, as in a shell."""
EXIT_BROKEN_PIPE = 141
"""Exit status of a command whose output is no longer read: 128 + SIGPIPE."""
LONGEST_LINE = 1000
"""Characters of an error's line; a longer one is shortened in the middle."""


class UserError(ValueError):
    """A mistake of the user, described in one line."""


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
    "layers": "n_layers",
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
"""Names in other projects, and the corresponding names here."""


def _plain(word: str) -> str:
    return word.casefold().replace("-", "_").replace(" ", "_")


def same_word(word: str, allowed: Iterable[str]) -> str | None:
    """The first of `allowed` that equals `word` except for case and hyphens, or is its name in other projects.

    The last part of a dotted key is compared. None if nothing matches.
    """
    allowed = list(allowed)
    for wanted in (_plain(word), _SYNONYMS.get(_plain(word))):
        for candidate in allowed:
            if wanted is not None and _plain(candidate).rpartition(".")[2] == wanted:
                return candidate
    return None


def _near(word: str, allowed: Sequence[str]) -> str | None:
    """The word in `allowed` that `word` misspells or abbreviates; else None."""
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
    """The end of an error message: `did you mean "cla"?`, or if nothing is similar, all of `allowed`."""
    allowed = sorted(allowed)
    if close := _near(word, allowed):
        return f'did you mean "{close}"?'
    plain = {_plain(candidate): candidate for candidate in allowed}
    ranked = difflib.get_close_matches(_plain(word), plain, n=1, cutoff=0.0)
    return f'nearest: "{plain[ranked[0]]}"; allowed: {", ".join(allowed)}' if ranked else "none is allowed here"


def one_line(command: Callable[..., int | None]) -> Callable[..., int]:
    """Decorate a command's main function to report mistakes and faults of the machine in one line on stderr.

    The decorated function returns the exit status: 2 for a `UserError` and for faults that `faults.explain` knows, 130
    for Ctrl-C, 128 plus its number for another signal that became an exception, and 141 without a line if the output is
    no longer read, as in `command | head`. Other exceptions pass through.
    """

    @functools.wraps(command)
    def run(*args, **kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may have characters that no terminal shows
        try:
            try:
                status = command(*args, **kwargs) or 0
            except SystemExit:  # of --help
                sys.stdout.flush()
                raise
            sys.stdout.flush()  # here a closed pipe raises; at the interpreter's exit it would print a traceback
            return status
        except UserError as error:
            return _report(faults.from_worker(error) or str(error))
        except KeyboardInterrupt as error:
            number = getattr(error, "number", None)  # of an `Interrupted` of cllm/signals.py
            said = (str(error) or "interrupted") if number is None else f"interrupted by {error}"
            print(said + following(error), file=sys.stderr)
            return EXIT_INTERRUPTED if number is None else 128 + number
        except Exception as error:
            if faults.is_broken_pipe(error):
                faults.silence_output()
                return EXIT_BROKEN_PIPE
            line = faults.explain(error)
            if line is None:
                raise
            return _report(line)

    return run


def _report(message: str) -> int:
    """Print `message` as one line on stderr."""
    print(f"error: {_in_one_line(message)}", file=sys.stderr)
    return EXIT_MISTAKE


def following(stop: KeyboardInterrupt) -> str:
    """The end of the line about a command that was stopped: the error that it ended with, its `__cause__`.

    It may be an error of cleaning up, such as a full disk. Empty without one, for an error that only quotes the stop,
    and for output that is no longer read.
    """
    error = stop.__cause__
    if error is None or isinstance(error, KeyboardInterrupt) or f"{type(stop).__name__}: {stop}" in str(error):
        return ""
    if faults.is_broken_pipe(error):
        faults.silence_output()
        return ""
    known = str(error) if isinstance(error, UserError) else faults.explain(error)
    return _in_one_line(f"; error that followed: {known or f'{type(error).__name__}: {error}'}")


def _in_one_line(message: str) -> str:
    """`message` without line breaks, shortened in the middle if it is longer than `LONGEST_LINE`."""
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 300]} [...] {line[-293:]}"

"""The tokenizer of a prepared folder: trained or loaded, then saved with the tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cllm.data.manifest import tokenizer_sha256
from cllm.data.prepare.recipe import TrainTokenizer
from cllm.errors import DataError, UserError
from cllm.faults import naming
from cllm.trust import load_tokenizer

log = logging.getLogger(__name__)

EOS = "<|endoftext|>"


class SavedTokenizer(NamedTuple):
    """The tokenizer in a prepared folder."""

    file: str
    """Path of its tokenizer.json."""
    vocab_size: int
    """One more than the largest token id."""
    eos_id: int
    sha256: str

    @property
    def dtype(self) -> Literal["uint16", "uint32"]:
        """The smallest integer type of token files that can store every id."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


def train(texts: Iterable[str], spec: TrainTokenizer, folder: Path) -> None:
    """Train a byte-level BPE and save it in `folder`. The same texts give the same file, byte for byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < spec.vocab_size:
        log.warning("tokenizer: the text yields only %d tokens of the %d asked for", found, spec.vocab_size)
    _save(tokenizer, folder)


def number_words(count: int, folder: Path) -> None:
    """Save a tokenizer of numbers between spaces in `folder`: EOS has the id 0, and n the id n, up to count - 1."""
    vocabulary = {EOS: 0} | {str(n): n for n in range(1, count)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS])
    _save(tokenizer, folder)


def _save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files of a tokenizer with EOS into a new folder."""
    folder.mkdir()
    file = folder / "tokenizer.json"
    with naming(str(file)):
        tokenizer.save(str(file))
    # AutoTokenizer reads this file too. It is written by hand because importing transformers takes seconds.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(name: str, folder: Path) -> None:
    """Save the Hugging Face tokenizer `name` (or a folder that holds one) in `folder`. Raises `DataError`."""
    try:
        tokenizer = load_tokenizer(name)
    except UserError as error:
        raise DataError(f"tokenizer.load: {error}") from None
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer.load {name}: has no tokenizer.json form (a `fast` tokenizer), which is needed")
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer.load {name}: has no EOS token (eos_token), which has to end every document; "
            "name one in its tokenizer_config.json"
        )
    tokenizer.save_pretrained(str(folder))


def inspect(folder: Path) -> SavedTokenizer:
    """Read a saved tokenizer's vocabulary, EOS and hash."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    eos = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"]
    eos_id = tokenizer.token_to_id(eos if isinstance(eos, str) else eos["content"])
    vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    assert eos_id is not None
    return SavedTokenizer(str(path), vocab_size, eos_id, tokenizer_sha256(folder))

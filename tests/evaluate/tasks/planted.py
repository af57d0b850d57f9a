"""Subjects whose behaviour is known: an oracle that looks tokens up, noise, and a decoder with planted weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cllm.config import ModelConfig
from cllm.data.manifest import Manifest
from cllm.evaluate.subjects import Subject
from cllm.model.decoder import Decoder
from cllm.posthoc.method import Compressor, Engine
from cllm.posthoc.slots import CompressibleSlots

NextToken = Callable[[Sequence[int]], int]
"""The token that follows a sequence of ids."""


def copying(ids: Sequence[int]) -> int:
    """The token after the longest earlier occurrence of the last tokens, the first if several are as long; else 0."""
    best, found = 0, 0
    for i in range(len(ids) - 1):
        n = 0
        while n <= i and ids[i - n] == ids[len(ids) - 1 - n]:
            n += 1
        if n > best:
            best, found = n, ids[i + 1]
    return found


def noise(ids: Sequence[int]) -> int:
    """A token that depends on everything before, like a hash."""
    return hash(tuple(ids)) % 1_000_003


class PlantedCache:
    """The tokens of each row."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []


class PlantedEngine(Engine):
    """An engine whose model is a Python function: the token that it names has nearly all of the probability.

    Compression by any method but `none` forgets the context.
    """

    def __init__(self, next_token: NextToken, vocab_size: int):
        self.next_token, self.vocab_size = next_token, vocab_size
        self.head = nn.Linear(vocab_size, vocab_size, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(20 * torch.eye(vocab_size))

    def new_cache(self, shares: dict[int, int] | None = None) -> PlantedCache:
        return PlantedCache()

    def hidden(self, ids: Tensor, cache: PlantedCache) -> Tensor:
        cache.rows = cache.rows or [[] for _ in ids]
        states = torch.zeros(*ids.shape, self.vocab_size)
        for i, row in enumerate(ids.tolist()):
            for j, token in enumerate(row):
                cache.rows[i].append(token)
                states[i, j, self.next_token(cache.rows[i]) % self.vocab_size] = 1.0
        return states

    def compressible(self, cache: PlantedCache) -> CompressibleSlots:
        raise NotImplementedError

    def compress(self, cache: PlantedCache, method: Compressor, *, measure: bool = True) -> PlantedCache:
        compressed = PlantedCache()
        compressed.rows = [list(row) if method.name == "none" else [0] for row in cache.rows]
        return compressed

    def nbytes(self, cache: PlantedCache) -> int:
        return sum(map(len, cache.rows))

    def fp32_numbers(self, cache: PlantedCache) -> int:
        return 0

    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        return tokens * batch

    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        raise NotImplementedError

    def key_norm(self, slot: int) -> None:
        raise NotImplementedError


class PlantedSubject(Subject):
    """A subject with the tokenizer of a prepared folder. Its model is a function, a decoder or a transformers model."""

    kind, name, checkpoint, step, latest, design = "run", "planted", "planted", None, True, "planted"
    precision, default_sets, digests = "fp32", {}, {}

    def __init__(self, prepared: Path, model: NextToken | nn.Module, *, context: int = 256, folder: Path = Path()):
        self._manifest, self._planted = Manifest.read(prepared), model
        self.vocab_size = self._manifest.vocab_size
        self.context = self.window = context
        self.path = self.folder = folder
        self.default_results = folder / "evaluation"
        self._tokenizer = self._manifest.tokenizer()

    @property
    def model(self) -> Any:
        return self._planted if isinstance(self._planted, nn.Module) else nn.Identity()

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def tokenizer_sha256(self) -> str:
        return self._manifest.tokenizer_sha256

    def tokenizes(self, data: Manifest) -> bool:
        return self._manifest.same_tokenizer(data)

    @property
    def start_id(self) -> int:
        return self._manifest.eos_id

    def logits(self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None, last: int) -> Tensor:
        engine = self.engine()
        return engine.logits(input_ids, engine.new_cache())[:, -last:]

    def engine(self) -> Engine:
        if isinstance(self._planted, nn.Module):
            return super().engine()
        return PlantedEngine(self._planted, self.vocab_size)


def induction_decoder(vocab_size: int, *, code: int = 64, max_seq_len: int = 256, **model: Any) -> Decoder:
    """A decoder of two layers that copies: the first layer finds the previous token, the second one an induction head.

    The residual stream has four parts: a code of the token, a code of the token before, the code of the token to
    predict, and a constant. Layer 0 attends to the previous position by the phases of RoPE and copies its token's code.
    Layer 1 looks for a position whose previous token is the current one, in the channels that RoPE hardly turns, and
    copies the code found there to the output.
    """
    dim = 4 * code
    config = ModelConfig(
        vocab_size=vocab_size, d_model=3 * code + 2, n_layers=2, n_heads=1, head_dim=dim, d_ff=2,
        max_seq_len=max_seq_len, rope={"theta": 1e8}, **model,
    )  # fmt: skip
    decoder = Decoder(config).eval()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(vocab_size, code, generator=generator).sign() / math.sqrt(code)
    slow = slice(dim // 2 - code, dim // 2)  # the pairs of RoPE that turn least
    turns = 1e8 ** (-torch.arange(0, dim, 2).float() / dim)
    fast = turns > 1e-3
    one = 3 * code
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
        for module in decoder.modules():
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
        decoder.embed.weight[:, :code] = codes
        decoder.embed.weight[:, one] = 1.0
        first, second = (block.attention for block in decoder.blocks)
        first.q_proj.weight[: dim // 2, one] = 40 * (turns.cos() * fast)
        first.q_proj.weight[dim // 2 :, one] = -40 * (turns.sin() * fast)
        first.owner.k_proj.weight[: dim // 2, one] = fast.float()
        first.owner.v_proj.weight[:code, :code] = torch.eye(code)
        first.o_proj.weight[code : 2 * code, :code] = torch.eye(code)
        second.q_proj.weight[slow, :code] = 400 * torch.eye(code)
        second.owner.k_proj.weight[slow, code : 2 * code] = torch.eye(code)
        second.owner.v_proj.weight[:code, :code] = torch.eye(code)
        second.o_proj.weight[2 * code : 3 * code, :code] = torch.eye(code)
        decoder.head.weight[:, 2 * code : 3 * code] = 20 * codes
    return decoder

"""Contenders of this project, and the random batches that all contenders train on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.train.contender import Batches, Contender
from cllm.config import Config
from cllm.model.sizes import build_decoder, training_flops_per_token
from cllm.train.launch import Launch
from cllm.train.optim import make_optimizer
from cllm.train.prepare import prepare_for_training


def device_of(config: Config) -> torch.device:
    """The device of `train.accelerator`."""
    return torch.device("cpu" if config.train.accelerator == "cpu" else "cuda")


def design(name: str, config: Config) -> Contender:
    """The model of `config`, built as train.py builds it."""
    torch.manual_seed(0)
    device = device_of(config)
    with device:
        model = build_decoder(config.model, backend=config.attention.backend)
    launch = Launch.on(config, "cpu" if device.type == "cpu" else "gpu", 1)
    prepare_for_training(model, config, dataclasses.replace(launch, compiled=bool(config.train.compile)))
    flops = training_flops_per_token(model, config.data.seq_len)
    return Contender(name, model, model.loss, make_optimizer(model, config.optim), flops)


def with_documents(plain: Contender, config: Config, mean: int) -> Contender:
    """The same model on packed documents of random lengths, `mean` tokens on average.

    Attention does not cross documents, and positions restart in each.
    """
    device, batch, seq_len = device_of(config), config.train.micro_batch, config.data.seq_len
    draw = torch.Generator(device).manual_seed(1)
    begins = torch.rand(batch, seq_len, device=device, generator=draw) < 1 / mean
    begins[:, 0] = True
    ids = begins.long().cumsum(1) - 1
    index = torch.arange(seq_len, device=device).expand(batch, -1)
    positions = index - torch.where(begins, index, 0).cummax(1).values

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return plain.loss(tokens, labels, positions, ids)

    return dataclasses.replace(plain, name=f"{plain.name}, documents", loss=loss, rounds=[])


def random_batches(config: Config, accumulate: int, steps: int = 4) -> Batches:
    """`steps` steps of `accumulate` micro-batches of random tokens."""
    device = device_of(config)
    draw = torch.Generator(device).manual_seed(0)
    vocab, size = config.model.vocab_size or 0, (accumulate, config.train.micro_batch, config.data.seq_len + 1)
    return [
        [
            (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            for ids in torch.randint(vocab, size, device=device, generator=draw).unbind()
        ]
        for _ in range(steps)
    ]

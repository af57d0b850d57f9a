"""Normalised effective ranks against numpy, and their correlation with errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cllm.posthoc.engine import engine_of
from cllm.posthoc.ranks import adjacent_cosines, correlation, layer_errors, normalised_rank, ranks


def planted(values: list[float], rows: int = 40) -> torch.Tensor:
    """(rows, len(values)) with these singular values."""
    generator = torch.Generator().manual_seed(0)
    n = len(values)
    u = torch.linalg.qr(torch.randn(rows, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("values", [[1.0] * 6, [8.0, 4, 2, 1], [5.0, 0, 0, 0]])
def test_planted_spectra(values):
    p = np.array(values) / np.sum(values)
    entropy = -sum(x * np.log(x) for x in p if x)
    assert normalised_rank(planted(values)) == pytest.approx(np.exp(entropy) / len(values))
    assert normalised_rank(planted(values).T) == pytest.approx(np.exp(entropy) / len(values))


def test_layers_and_heads():
    one, other = planted([1.0] * 4), planted([1.0, 0, 0, 0])
    found = ranks({3: torch.stack([one, other], dim=1)})
    assert found["head"] == [pytest.approx([1, 0.25])]
    both = np.linalg.svd(torch.cat([one, other], dim=1).numpy(), compute_uv=False)
    p = both[both > 1e-12] / both.sum()
    assert found["layer"] == [pytest.approx(np.exp(-(p * np.log(p)).sum()) / 8)]
    assert ranks({0: one})["head"] == [None], "latents have no heads"
    assert normalised_rank(torch.zeros(5, 3)) == 0


def test_correlation_and_errors(decoder, tokens):
    assert correlation([1, 2, 3], [2, 4, 6.0]) == pytest.approx(1)
    assert correlation([1, 2], [2, 4]) is None
    assert correlation([1, 1, 1], [2, 4, 5]) is None
    assert adjacent_cosines([[1, 0.5, 0], [0.5, 1, None], [0, None, 1]]) == [0.5, None]
    engine, ids = engine_of(decoder(n_layers=3)), [tokens(1, 24)]
    exact, coarse = (layer_errors(engine, ids, f"svd:ratio={ratio}") for ratio in (1, 4))
    assert exact.keys() == {"0", "1", "2"}
    assert all(coarse[slot]["k"] > exact[slot]["k"] for slot in exact)

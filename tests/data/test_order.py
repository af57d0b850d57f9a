"""The shuffle visits everything once, and looks like a shuffle."""

import numpy as np
import pytest

from cllm.data.order import shuffled

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 1000, 1023, 1025, 4097]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5])
def test_is_a_bijection(n, seed):
    for epoch in (0, 1, 12345):
        assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_seeds_and_epochs_give_unrelated_orders():
    n = 5000
    orders = {key: np.array([shuffled(i, n, *key) for i in range(n)]) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}
    orders["identity"] = np.arange(n)
    names = list(orders)
    for i, a in enumerate(names):
        for b in names[:i]:
            # Two random orders agree in about one place, and correlate by about 1/sqrt(n).
            assert (orders[a] == orders[b]).sum() < 10
            assert abs(np.corrcoef(orders[a], orders[b])[0, 1]) < 5 / np.sqrt(n)


def test_every_stretch_of_an_epoch_draws_from_everywhere():
    n, parts = 8000, 10
    order = np.array([shuffled(i, n, 3, 0) for i in range(n)])
    expected = n / parts**2
    table = np.histogram2d(np.arange(n), order, bins=parts)[0]
    chi_squared = ((table - expected) ** 2 / expected).sum()
    # 81 degrees of freedom: mean 81, standard deviation 12.7.
    assert chi_squared < 81 + 5 * 12.7
    neighbours = np.corrcoef(order[:-1], order[1:])[0, 1]
    assert abs(neighbours) < 5 / np.sqrt(n)


def test_large_orders_need_no_memory():
    n = 10**12 + 39
    assert len({shuffled(i, n, 0, 0) for i in range(1000)}) == 1000


def test_outside():
    with pytest.raises(IndexError):
        shuffled(5, 5, 0, 0)

"""A shuffle computed without a table.

`shuffled` is a Feistel network: a bijection on 2^(2h) numbers built from any function of h bits, here a 64-bit mixer.
If n is not such a power, results outside range(n) are put through again until one falls inside ("cycle walking"), so it
is still a bijection on range(n). It has no state to store, to send to workers or to restore, and every position of
every epoch costs the same.
"""

from __future__ import annotations

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def shuffled(index: int, n: int, seed: int, epoch: int) -> int:
    """The element at position `index` of an epoch's order: for fixed (n, seed, epoch), a bijection on range(n).

    Raises:
        IndexError: if `index` is not in range(n).
    """
    if not 0 <= index < n:
        raise IndexError(f"position {index} of an order of {n}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = _mix(_mix(seed & _MASK64) ^ (epoch & _MASK64))
    while True:
        left, right = index >> half, index & mask
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ _mix((round_ << 56) ^ right)) & mask)
        index = (left << half) | right
        if index < n:
            return index

"""Random orders and numbers that follow from a key and a counter alone, so that nothing is shuffled in memory."""

import hashlib

import numpy as np
from numpy.typing import NDArray

# Rounds after which the Feistel network below is as good as a random order.
ROUNDS = 6
Counters = NDArray[np.uint64]


def key_from(name: str) -> np.uint64:
    """64 bits that follow from a name."""
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))


def mixed(values: Counters) -> Counters:
    """Spreads 64-bit values over 64 bits, one to one: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permuted(values: Counters, count: int, keys: Counters) -> Counters:
    """Sends each of 0 .. count - 1 to another, one to one for equal keys: a Feistel network, walked until in range."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    values = values.copy()
    outside = np.ones(len(values), bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_number in range(ROUNDS):
            rounded = mixed(keys[outside] ^ mixed(right + (np.uint64(round_number) << np.uint64(32)))) & mask
            left, right = right, left ^ rounded
        values[outside] = (left << half) | right
        outside = values >= count
    return values

"""The order in which a run reads its sequences: a function of seed, epoch and place."""

import numpy as np

_ROUNDS = 6


def shuffled(places: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return which sequences stand at some places [n] int64 of an epoch's permutation.

    The permutation of range(count) is never held: a Feistel network permutes the numbers below a
    power of four, and what it takes beyond count goes through it again until it is below (cycle
    walking: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """
    half = np.uint64(max(1, (count - 1).bit_length() + 1 >> 1))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence([seed % 2**64, epoch]).generate_state(_ROUNDS, np.uint64)
    found = places.astype(np.uint64)
    beyond = np.ones(len(found), bool)
    while beyond.any():
        left, right = found[beyond] >> half, found[beyond] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        found[beyond] = left << half | right
        beyond = found >= count
    return found.astype(np.int64)


def _mixed(bits: np.ndarray) -> np.ndarray:
    """Return uint64 numbers whose every bit hangs on all of the given ones' (splitmix64)."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return bits ^ bits >> np.uint64(31)

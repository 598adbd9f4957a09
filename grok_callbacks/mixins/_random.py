"""Noise that depends on a seed and a count alone, and leaves the program's own generators as they are."""

from __future__ import annotations

import zlib

import torch

__all__ = ["generator"]

_MASK = (1 << 64) - 1


def generator(device: torch.device, seed: int, key: str, count: int, rank: int = 0) -> torch.Generator:
    """A generator for the ``count``-th draw of one mixin on one rank.

    Seeding anew at each draw makes a whole number all the state there is: it resumes on any device.
    """
    state = 0
    for part in (seed, zlib.crc32(key.encode()), rank, count):
        state = _mixed(state ^ (part & _MASK))
    return torch.Generator(device).manual_seed(state >> 1)


def _mixed(value: int) -> int:
    """The finaliser of splitmix64: neighbouring counts give unrelated seeds."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)

"""Randomness is derived, not carried.

Every draw of a training run is a function of integers and names that are known anyway: the run's seed, the sample's
index and epoch, the number of images before it, an image's name. A generator is made from such keys and thrown away
after use, so nothing random needs to be saved: a run resumes from its step number alone, and samples do not depend on
the number of workers or, for the same global batch, of devices.
"""

import hashlib
import json
import operator

import torch


def derive_seed(*keys: int | str) -> int:
    """Returns a seed in `[0, 2**63)` that is a function of `keys` alone: the same in every process and Python version.

    Keys differ by type and place: `1`, `"1"` and `(1, 1)` give three seeds.

    Raises:
        TypeError: a key is neither an integer nor a string; the text form of a float is not reliable enough.
    """
    exact = [key if isinstance(key, str) else operator.index(key) for key in keys]
    digest = hashlib.blake2b(json.dumps(exact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(device: torch.device | str, *keys: int | str) -> torch.Generator:
    """Returns a fresh generator on `device`, seeded with `derive_seed(*keys)`.

    CPU and CUDA generators draw different numbers from one seed. PyTorch's CPU generator reads the low 32 bits of its
    seed only, so about a hundred pairs among a million generators are equal, which does no harm to samples.
    """
    return torch.Generator(device).manual_seed(derive_seed(*keys))


def permutation(seed: int, epoch: int, length: int) -> torch.Tensor:
    """Returns the order of `length` samples in `epoch`: a permutation of `0..length-1`, int64 `(length,)`."""
    return torch.randperm(length, generator=generator("cpu", seed, "order", epoch))

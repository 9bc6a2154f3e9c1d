"""Randomness as a pure function of (seed, stream, step): nothing to save, nothing to skip on resume.

The habit is edm2's. Draws are of the whole batch, so that a sharded engine can slice them and see the same samples.
"""

import hashlib

import torch


def generator(seed: int, stream: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose state depends on the three values alone. `stream` names what is drawn ("score", "saliency", ...)."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)

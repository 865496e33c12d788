"""Small models whose backward pass is no chain, with at most 14 tensors: every subset can be looked at."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

import gtflops
from gtflops import Profile


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False)


class Branches(torch.nn.Module):
    """Two parallel branches of four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (torch.nn.Sequential(*(linear(16, 16) for _ in range(4))) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x)


class Attention(torch.nn.Module):
    """Queries, keys and values beside each other, twice, with biases on some."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {"q": linear(6, 4), "k": linear(6, 4), "v": torch.nn.Linear(6, 6), "o": torch.nn.Linear(6, 6)}
            )
            for _ in range(2)
        )
        self.head = linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            scores = torch.softmax(layer["q"](x) @ layer["k"](x).mT, dim=-1)
            x = x + layer["o"](scores @ layer["v"](x)).relu()
        return self.head(x)


class EncoderDecoder(torch.nn.Module):
    """The decoder's layers all read what the encoder made; the embedding is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(11, 5)
        self.encoder = torch.nn.ModuleList(linear(5, 5) for _ in range(2))
        self.own = torch.nn.ModuleList(linear(5, 5) for _ in range(3))
        self.cross = torch.nn.ModuleList(linear(5, 5) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        memory = self.embed(tokens)
        for encoding in self.encoder:
            memory = encoding(memory).tanh()
        x = self.embed(tokens.flip(1))
        for own, cross in zip(self.own, self.cross, strict=True):
            x = x + own(x).tanh() * cross(memory)
        return x @ self.embed.weight.T


class Shared(torch.nn.Module):
    """One block used three times, between two of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 7), torch.nn.Linear(7, 2)
        self.block = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.GELU(), torch.nn.Linear(9, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.last(x)


BATCHES: dict[Callable[[], torch.nn.Module], torch.Tensor] = {
    Branches: torch.ones(8, 16),
    Attention: torch.ones(2, 3, 6),
    EncoderDecoder: torch.ones(2, 4, dtype=torch.int64),
    Shared: torch.ones(5, 4),
}


@cache
def profile_of(model: Callable[[], torch.nn.Module]) -> Profile:
    return gtflops.profile(model(), BATCHES[model], lambda y, _: y.square().sum())


def every_mask(profile: Profile) -> npt.NDArray[np.bool_]:
    """Bool [2^tensors, tensors]."""
    return np.array(list(product([False, True], repeat=len(profile.names))), dtype=np.bool_)


def with_times(profile: Profile, seed: int = 0) -> Profile:
    """The same profile with an invented time for each operator, which is not proportional to its FLOPs."""
    nanoseconds = np.random.default_rng(seed).integers(100, 5000, len(profile.graph.nodes))
    return replace(profile, nanoseconds=nanoseconds.astype(np.int64))

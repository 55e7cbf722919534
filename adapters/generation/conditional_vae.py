"""Conditional variational autoencoders over vectors x (n, D) with a condition c (n, d).

    encode:  q(z | x, c) = N(mu, diag(exp(logvar))),  z (n, latent)          decode:  x = f(z, c)
    KL(q || N(0, I)) = 1/2 sum_j (mu_j^2 + exp(logvar_j) - 1 - logvar_j)

Two layouts: ``mlp`` for small D, and ``conv``, that of ICM-LoRA's authors (arXiv 2501.17635): x is padded with zeros to
a multiple of 2^12 and halved twelve times by convolutions. Batch normalisation needs at least two rows in training.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.generation.settings import Arch

CHANNELS = (8, 16, 32, 64, 128, 256, 256, 128, 64, 32, 16, 8)
"""Channels of the twelve convolutions of ``conv``."""

ENCODED = 256
"""Width of the features of x in ``conv``."""


class ConditionalVae(nn.Module):
    """Base of both layouts: features of x, then mu and logvar of z.

    Args:
        size: D.
        condition: d.
        latent: width of z.
        features: width of the features of x.
    """

    def __init__(self, size: int, condition: int, latent: int, features: int) -> None:
        super().__init__()
        self.size, self.latent = size, latent
        self.mu = nn.Linear(features + condition, latent)
        self.logvar = nn.Linear(features + condition, latent)

    def features(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, features)."""
        raise NotImplementedError

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """(n, latent), (n, d) -> (n, D)."""
        raise NotImplementedError

    def encode(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar, each (n, latent)."""
        h = torch.cat([self.features(x), c], 1)
        return self.mu(h), self.logvar(h)

    def forward(self, x: Tensor, c: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (n, D), mu and logvar, with z = mu + exp(logvar / 2) noise."""
        mu, logvar = self.encode(x, c)
        return self.decode(mu + (logvar / 2).exp() * noise, c), mu, logvar


class Mlp(ConditionalVae):
    """Two hidden layers of one width on each side."""

    def __init__(self, size: int, condition: int, latent: int, hidden: int) -> None:
        super().__init__(size, condition, latent, hidden)
        self.encoder = nn.Sequential(nn.Linear(size, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU())
        self.decoder = nn.Sequential(
            nn.Linear(latent + condition, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU(),
            nn.Linear(hidden, size),
        )  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        return self.decoder(torch.cat([z, c], 1))


class Conv(ConditionalVae):
    """The authors' layout; the padded tail is cut off again in ``decode``."""

    def __init__(self, size: int, condition: int, latent: int) -> None:
        super().__init__(size, condition, latent, ENCODED)
        step = 2 ** len(CHANNELS)
        self.length = -(-size // step)
        self.padded = self.length * step
        down: list[nn.Module] = []
        for before, after in zip((1, *CHANNELS), CHANNELS, strict=False):
            down += [nn.Conv1d(before, after, 7, 2, 3), nn.BatchNorm1d(after), nn.LeakyReLU()]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(CHANNELS[-1] * self.length, ENCODED))
        self.spread = nn.Linear(latent + condition, CHANNELS[-1] * self.length)
        up: list[nn.Module] = []
        back = CHANNELS[::-1]
        for before, after in zip(back, (*back[1:], back[-1]), strict=True):
            up += [nn.ConvTranspose1d(before, after, 7, 2, 3, 1), nn.BatchNorm1d(after), nn.ELU()]
        self.decoder = nn.Sequential(*up, nn.Conv1d(back[-1], 1, 7, 1, 3))

    def features(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, self.padded - self.size))
        return self.encoder(padded[:, None])

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        h = self.spread(torch.cat([z, c], 1)).unflatten(1, (CHANNELS[-1], self.length))
        decoded: Tensor = self.decoder(h)
        return decoded[:, 0, : self.size]


def build(arch: Arch, size: int, condition: int, latent: int, hidden: int) -> ConditionalVae:
    """The network; ``hidden`` is for ``mlp`` only."""
    return Mlp(size, condition, latent, hidden) if arch == "mlp" else Conv(size, condition, latent)


def parameters(arch: Arch, size: int, condition: int, latent: int, hidden: int) -> int:
    """Number of its parameters, without building it."""
    with torch.device("meta"):
        return sum(one.numel() for one in build(arch, size, condition, latent, hidden).parameters())


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of each entry."""
    return (mu.square() + logvar.exp() - 1 - logvar) / 2

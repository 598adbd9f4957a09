"""The networks of the matrix, as plain modules: small, and awkward in the ways in which real ones are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

NUM_FEATURES, NUM_CLASSES, TOKENS = 6, 3, 5


def features(count=24, seed=1):
    """Vectors and their classes."""
    x = torch.randn(count, NUM_FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :NUM_CLASSES].argmax(-1)


def tokens(count=24, seed=1):
    """Pairs of numbers and their sums."""
    pairs = torch.randint(TOKENS, (count, 2), generator=torch.Generator().manual_seed(seed))
    return pairs, pairs.sum(1) % TOKENS


class Mlp(nn.Module):
    """Widths that no two ranks share evenly."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, NUM_CLASSES))

    def forward(self, x):
        return self.net(x)


class Cnn(nn.Module):
    """With BatchNorm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 5, 2, padding=1),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(60, 7),
            nn.Tanh(),
            nn.Linear(7, NUM_CLASSES),
        )

    def forward(self, x):
        return self.net(x)


class Transformer(nn.Module):
    """Layer norm, dropout, attention; answers at the last position."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.position = nn.Parameter(0.1 * torch.randn(2, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, TOKENS)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x) + self.position)[:, -1])


class Lstm(nn.Module):
    """A recurrent network."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(1, 8, batch_first=True)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.lstm(x[..., None])[0][:, -1]))


class TiedTokens(nn.Module):
    """The matrix that reads the tokens also writes the answers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(F.relu(self.hidden(self.embedding(x).flatten(1))))


class Frozen(Mlp):
    """The first layer does not learn."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


class LowRank(nn.Module):
    """A linear layer that is frozen, with an adapter that starts at zero."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


class Adapted(Mlp):
    """Low-rank adapters on all layers but the last, all else frozen."""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)
        for place in (0, 2):
            self.net[place] = LowRank(self.net[place])
        self.net[4].requires_grad_(True)


class Checkpointed(Mlp):
    """The middle is computed again for the backward pass."""

    def forward(self, x):
        hidden = self.net[:2](x)
        if torch.is_grad_enabled():
            hidden = torch.utils.checkpoint.checkpoint(self.net[2:4], hidden, use_reentrant=False)
        else:
            hidden = self.net[2:4](hidden)
        return self.net[4](hidden)

"""What a measurement costs as the model and the probe grow, each monitor in a process of its own."""

from __future__ import annotations

import json
import math
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grok_callbacks import GrokkingForecast, Probe, Recorder
from grok_callbacks.callbacks.presets import preset_monitors

SEQUENCE = 16


class Shape(NamedTuple):
    """Of a decoder-only transformer."""

    width: int
    layers: int
    vocabulary: int


#: The last is GPT-2 small: 124 million parameters.
SHAPES = (Shape(64, 2, 512), Shape(128, 3, 2048), Shape(256, 4, 8192), Shape(512, 8, 16384), Shape(768, 12, 50257))
#: Sequences of 16 tokens, at the second shape.
PROBES = (16, 32, 64, 128, 256)


class Decoder(nn.Module):
    """GPT-2's shape: learned positions, normalisation before each branch, GELU, the embedding as the last layer's weight."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position = nn.Embedding(1024, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, C)`` after the last of the tokens ``(n, T)``."""
        stream = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream[:, -1]))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(stream)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        output: Tensor = stream + self.mlp(self.norm2(stream))
        return output


class Cost(NamedTuple):
    """CPU-seconds of a measurement, and bytes that the process came to hold beyond what it held before."""

    seconds: float
    memory: float


def measure(shape: Shape, size: int, limit: float) -> Iterator[tuple[int, str, Cost | str]]:
    """Parameters, monitor, and cost or why there is none, for each monitor of the full preset."""
    torch.manual_seed(0)
    model = Decoder(shape)
    tokens = torch.randint(shape.vocabulary, (2 * size, SEQUENCE))
    answers = torch.randint(shape.vocabulary, (2 * size,))
    probe = Probe(size=size, train=(tokens[:size], answers[:size]), validation=(tokens[size:], answers[size:]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    yield parameters, "(a forward pass of the probe)", _in_a_fork(partial(_of_pass, model, tokens[:size]), limit)
    for make in preset_monitors("full"):
        # It reads what the others have measured, at a cost that depends on no model.
        if make is not GrokkingForecast:
            cost = _in_a_fork(partial(_of_monitor, model, make(on_error="raise"), probe), limit)
            yield parameters, make.__name__, cost


def _of_pass(model: nn.Module, tokens: Tensor) -> Cost:
    def act() -> None:
        with torch.no_grad():
            model(tokens)

    return _cost(act)


def _of_monitor(model: nn.Module, monitor: Any, probe: Probe) -> Cost:
    recorder = Recorder(model, [monitor], probe)
    recorder.bind()
    steps = iter(range(1000))
    return _cost(lambda: recorder.record(next(steps)))


def _cost(act: Any) -> Cost:
    """The faster of two measurements, as the first warms up; of one that takes long, the first."""
    held = _held()
    seconds = []
    while not seconds or (sum(seconds) < 2 and len(seconds) < (2 if sum(seconds) > 0.3 else 10)):
        start = time.process_time()
        act()
        seconds.append(time.process_time() - start)
    return Cost(min(seconds), max(0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held))


def _held() -> float:
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _in_a_fork(act: Any, limit: float) -> Cost | str:
    """What ``act`` returns in a child process, which sees the model and leaves its memory behind."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        warnings.simplefilter("ignore")
        try:
            answer: Any = list(act())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        if not select.select([pipe], [], [], limit)[0]:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        return f"more than {limit:g} s"
    decoded = json.loads(answer)
    return decoded if isinstance(decoded, str) else Cost(*decoded)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of the straight line that fits best on logarithmic axes."""
    points = [(math.log(size), math.log(cost)) for size, cost in zip(sizes, costs, strict=True) if cost > 0]
    if len(points) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)

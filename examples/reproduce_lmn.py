"""Linear mapping number of three tasks while they grok, after Liu, Zhong, Tegmark (arXiv 2310.05918).

Trains the paper's network (embedding 32, three-layer SiLU MLP of width 100, AdamW 1e-3, weight decay 0.2, 20,000
full-batch steps, 80% of the table) on addition modulo 31, composition in S4 and bitwise XOR of 5 digits, and writes one
JSON line per measurement to ``OUTPUT/{task}-{seed}.jsonl``. A run is complete when its last line says ``"done": true``;
complete runs are skipped, others begin anew (a run takes minutes):

    python examples/reproduce_lmn.py --output runs/lmn
    python examples/reproduce_lmn.py --output runs/lmn --report docs/reproductions
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from grok_callbacks.functional import linear_connectivity, linear_mapping_number

STEPS = 20_000
PROBE = 200
LAYERS = {"embedding": 1, "hidden1": 3, "hidden2": 5}  # how many modules of the network lie before the interpolated point


def addition() -> tuple[Tensor, Tensor]:
    pairs = torch.cartesian_prod(torch.arange(31), torch.arange(31))
    return pairs, pairs.sum(1) % 31


def permutations() -> tuple[Tensor, Tensor]:
    elements = list(itertools.permutations(range(4)))
    number = {element: index for index, element in enumerate(elements)}
    pairs = torch.cartesian_prod(torch.arange(24), torch.arange(24))
    products = [number[tuple(elements[a][k] for k in elements[b])] for a, b in pairs.tolist()]
    return pairs, torch.tensor(products)


def xor() -> tuple[Tensor, Tensor]:
    pairs = torch.cartesian_prod(torch.arange(32), torch.arange(32))
    return pairs, pairs[:, 0] ^ pairs[:, 1]


TASKS = {"mod31": addition, "s4": permutations, "xor5": xor}


class Table(nn.Embedding):
    """One table for both operands, their embeddings concatenated."""

    def forward(self, pairs: Tensor) -> Tensor:
        """(n, 2) symbols to (n, 64)."""
        return super().forward(pairs).flatten(1)


def network(symbols: int) -> nn.Sequential:
    return nn.Sequential(
        Table(symbols, 32),
        nn.Linear(64, 100),
        nn.SiLU(),
        nn.Linear(100, 100),
        nn.SiLU(),
        nn.Linear(100, symbols),
    )


def schedule(steps: int) -> set[int]:
    """Twelve measurements a decade, and one every 500 steps."""
    logarithmic = {round(10 ** (k / 12)) for k in range(12 * 5)}
    return {step for step in logarithmic | set(range(0, steps + 1, 500)) if step <= steps}


@torch.no_grad()
def measure(model: nn.Sequential, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], everything: bool) -> dict:
    """Losses, accuracies, L2 norm and LMN; of all layers at all training inputs if ``everything``."""
    result = {"l2": torch.cat([p.flatten() for p in model.parameters()]).norm().item()}
    for split, (inputs, targets) in (("train", train), ("test", test)):
        logits = model(inputs)
        result[f"{split}_loss"] = nn.functional.cross_entropy(logits.double(), targets).item()
        result[f"{split}_accuracy"] = (logits.argmax(1) == targets).double().mean().item()
    for layer, depth in LAYERS.items():
        activations = model[:depth](train[0])
        if everything or layer == "hidden1":
            result[f"lmn/{layer}"] = linear_mapping_number(linear_connectivity(model[depth:], activations)).item()
        few = linear_connectivity(model[depth:], activations[:PROBE])  # the split is shuffled: a random subset
        result[f"lmn_{PROBE}/{layer}"] = linear_mapping_number(few).item()
    return result


def run(task: str, seed: int, steps: int, output: Path) -> None:
    inputs, targets = TASKS[task]()
    torch.manual_seed(seed)
    order = torch.randperm(len(inputs))
    cut = int(0.8 * len(inputs))
    train, test = ((inputs[part], targets[part]) for part in (order[:cut], order[cut:]))
    model = network(int(inputs.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.2)
    due, start = schedule(steps), time.perf_counter()
    with output.open("w") as file:
        for step in range(steps + 1):
            if step in due:
                record = {"task": task, "seed": seed, "step": step, "samples": len(train[0])}
                record |= measure(model, train, test, everything=step % 2000 == 0 or sum(d < step for d in due) % 4 == 0)
                file.write(json.dumps(record | {"seconds": time.perf_counter() - start}) + "\n")
                file.flush()
            if step == steps:
                break
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0]), train[1]).backward()
            optimizer.step()
        file.write(json.dumps({"task": task, "seed": seed, "done": True}) + "\n")


def is_complete(path: Path) -> bool:
    lines = path.read_text().splitlines() if path.exists() else []
    return bool(lines) and json.loads(lines[-1]).get("done", False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "grok_callbacks_lmn")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="write tables and figure of the complete runs here, and train nothing")
    arguments = parser.parse_args()
    if arguments.report is not None:
        from lmn_report import report

        report(arguments.output, arguments.report, f"{os.cpu_count()} cores, torch {torch.__version__}")
        return
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for task in arguments.tasks:
            path = arguments.output / f"{task}-{seed}.jsonl"
            if not is_complete(path):
                run(task, seed, arguments.steps, path)
            print(path, flush=True)


if __name__ == "__main__":
    main()

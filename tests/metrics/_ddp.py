"""Run a function on two real processes with a gloo process group, as DDP would."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchmetrics import Metric

from tests.metrics._common import as_arguments

WORLD_SIZE = 2
# A server that imports once and forks a rank in no time, where a spawned one would import for seconds each time. The server
# itself is spawned: no thread of the test process is forked.
START_METHOD = "forkserver"
PRELOAD = ["torch", "matplotlib.pyplot", "pytest", "grok_callbacks.metrics"]


def run_on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call ``function(rank, *args)`` on two ranks of one gloo group and return what each returned, rank 0 first.

    ``function`` and ``args`` are pickled: a module-level function, no lambda. An exception on a rank is raised here.
    The first call of a session takes seconds, the next ones do not.
    """
    multiprocessing.get_context(START_METHOD).set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _rank_main, (folder, function, args), nprocs=WORLD_SIZE, start_method=START_METHOD
        )
        return [torch.load(_result_file(folder, rank), weights_only=False) for rank in range(WORLD_SIZE)]


def metrics_on_two_ranks(cases: dict[str, tuple[Callable[[], Metric], list[Any], list[Any]]]) -> list[dict[str, Any]]:
    """Each rank's results of several metrics: ``{name: (metric_factory, batches of rank 0, batches of rank 1)}``.

    The factories must pickle: classes or ``functools.partial`` of them.
    """
    return run_on_two_ranks(_compute_on_rank, cases)


def _compute_on_rank(rank: int, cases: dict[str, tuple[Callable[[], Metric], list[Any], list[Any]]]) -> dict[str, Any]:
    return {name: _updated(factory(), shares[rank]).compute() for name, (factory, *shares) in cases.items()}


def _updated(metric: Metric, batches: Sequence[Any]) -> Metric:
    for batch in batches:
        metric.update(*as_arguments(batch))
    return metric


def _rank_main(rank: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    # A file as the meeting point: no port that a second test run on this machine could already hold.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    try:
        torch.save(function(rank, *args), _result_file(folder, rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _result_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"result_{rank}.pt"

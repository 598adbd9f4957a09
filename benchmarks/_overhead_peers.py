"""What a measurement of others' packages costs on the networks of the runs; started with a Python that has them.

Each is called as its documentation does, with its defaults.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks._overhead_tasks import TASKS


def weightwatcher(model: Any, _data: Any) -> Callable[[], object]:
    import weightwatcher as ww

    return lambda: ww.WeightWatcher(model=model).analyze()


def devinterp(model: Any, data: Any, **settings: Any) -> Callable[[], object]:
    from devinterp.slt.sampler import estimate_learning_coeff
    from devinterp.utils import default_nbeta, make_evaluate
    from torch.utils.data import DataLoader, TensorDataset

    batch = data.batch_size or len(data.train_set)
    loader = DataLoader(TensorDataset(data.train_set.inputs, data.train_set.targets), batch_size=batch, shuffle=True)
    settings["nbeta"] = default_nbeta(loader)
    evaluate = make_evaluate(model.compute_loss)
    return lambda: estimate_learning_coeff(model, loader, evaluate=evaluate, optimizer_kwargs=settings, verbose=False)


def cockpit(model: Any, data: Any) -> Callable[[], object]:
    from backpack import extend
    from cockpit import Cockpit
    from cockpit.utils.configuration import configuration

    extend(model)
    make = nn.MSELoss if model.loss == "mse" else nn.CrossEntropyLoss
    mean, each = extend(make()), make(reduction="none")
    inputs, targets = data.train_set.inputs, data.train_set.targets
    size = data.batch_size or len(inputs)
    inputs, targets = inputs[:size], targets[:size]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watch = Cockpit(model.parameters(), quantities=configuration("economy"))
    steps = iter(range(1000))

    def step(watched: bool) -> float:
        start = time.process_time()
        optimizer.zero_grad()
        logits = model(inputs)
        loss = mean(logits, targets)
        if watched:
            number = next(steps)
            losses = each(logits, targets)
            losses = losses.mean(1) if losses.ndim > 1 else losses
            info = {"batch_size": size, "individual_losses": losses, "loss": loss, "optimizer": optimizer}
            with watch(number, info=info):
                loss.backward(create_graph=watch.create_graph(number))
        else:
            loss.backward()
        optimizer.step()
        return time.process_time() - start

    # What it adds to a step, several times, since single steps are short.
    return lambda: sum(step(True) - step(False) for _ in range(3)) / 3


def _timed(act: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    answer = act()
    return time.process_time() - start, answer


PEERS = {"weightwatcher": weightwatcher, "devinterp": devinterp, "cockpit": cockpit}
_PACKAGES = {"cockpit": "cockpit-for-pytorch"}


def measure(peer: str, task: str, step_size: float | None = None) -> dict[str, Any]:
    """CPU-seconds of a call, or what it raised."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    model, data = TASKS[task].make()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            act = PEERS[peer](model, data, **({} if step_size is None else {"lr": step_size}))
            seconds, answer = _timed(act)
            if seconds < 5:
                seconds, answer = _timed(act)  # The first has warmed up.
            seconds = answer if peer == "cockpit" else seconds
            return {"seconds": seconds, "version": importlib.metadata.version(_PACKAGES.get(peer, peer))}
        except Exception as error:
            if peer == "devinterp" and step_size is None:
                smaller = measure(peer, task, 1e-5)
                note = f"with its default step size `{type(error).__name__}: {error}`, so with a step size of 1e-5"
                return {**smaller, **({"note": note} if "seconds" in smaller else {})}
            return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}


if __name__ == "__main__":
    result = measure(sys.argv[1], sys.argv[2])
    print("RESULT " + json.dumps(result))

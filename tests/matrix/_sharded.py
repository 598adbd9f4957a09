"""Sharded models (FSDP2) on two ranks, without a Trainer: what one rank does, for :mod:`tests.matrix.test_sharded`."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F

from grok_callbacks import (
    ComplexityMonitor,
    GradientCoherenceMonitor,
    LinearMappingNumberMonitor,
    Monitor,
    Probe,
    Recorder,
)
from tests.matrix._modules import Cnn, Mlp, TiedTokens, Transformer, features, tokens
from tests.matrix._monitors import all_monitors

#: How each network is made, its data, and which of its parts are sharded on their own, the rest with the whole.
NETS = {
    "mlp": (Mlp, features, ["net.0", "net.2"]),
    "transformer": (Transformer, tokens, ["encoder.layers.0", "encoder.layers.1"]),
    "tied weights": (TiedTokens, tokens, ["hidden"]),
    "cnn": (Cnn, features, ["net.1"]),
    "a part only": (Mlp, features, ["net.2"]),
    "replicated": (Mlp, features, ["net.0"]),
}

#: What takes a second on a busy machine, where ranks wait for each other.
MANY_PASSES = (ComplexityMonitor, LinearMappingNumberMonitor)


def make(name):
    torch.manual_seed(0)
    return NETS[name][0]()


def shard(name, model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    is_replicated = name == "replicated"
    mesh = init_device_mesh("cpu", (2, 1) if is_replicated else (2,), mesh_dim_names=("copies", "shards")[-1 - is_replicated :])
    for part in NETS[name][2]:
        fully_shard(model.get_submodule(part), mesh=mesh)
    return model if name == "a part only" else fully_shard(model, mesh=mesh)


def probe(name):
    batch = NETS[name][1]()
    return Probe(train=batch, validation=batch, size=16)


def shardable(on_tokens):
    """All monitors but the one that refuses sharded models."""
    monitors = all_monitors(on_tokens, on_error="raise")
    return [monitor for monitor in monitors if not isinstance(monitor, GradientCoherenceMonitor)]


def measure(name, model):
    """Everything that all monitors find."""
    monitors = shardable(NETS[name][1] is tokens)
    if name not in ("mlp", "transformer"):
        monitors = [monitor for monitor in monitors if not isinstance(monitor, MANY_PASSES)]
    for monitor in monitors:
        # Ranks then need different numbers of passes.
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1 and hasattr(monitor, "memory_limit"):
            monitor.memory_limit = 2**14
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Recorder(model, monitors, probe(name)).record(0)


def train(name, monitors=(), *, accumulate=False):
    """Losses and whole weights of a few steps on a sharded model, with or without monitors.

    Where gradients are accumulated the monitors look at a model that holds incomplete ones.
    """
    model = shard(name, make(name))
    recorder = Recorder(model, monitors, probe(name)) if monitors else None
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    inputs, targets = NETS[name][1]()
    losses = []
    for step in range(2):
        for last in (False, True) if accumulate else (True,):
            model.set_requires_gradient_sync(last)
            loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            losses.append(loss.item())
            if recorder is not None and last != accumulate:
                recorder.record(step)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {key: value.full_tensor() for key, value in model.state_dict().items()}, recorder


class Uneven(Monitor):
    """Has more passes to make on one rank than on another, with other collectives in between."""

    def measure(self, snapshot):
        rank = snapshot.ranks.rank
        total = torch.zeros(())
        for _ in range(1 + 2 * rank):
            total += snapshot.forward().logits.sum()
        total = snapshot.ranks.all_reduce(total)
        if rank == 0:
            weight = snapshot.weights["net.0.weight"]
            total = total + snapshot.forward(weights={"net.0.weight": torch.zeros_like(weight)}).logits.sum()
        else:
            assert snapshot.weights["net.0.weight"].shape == (9, 6)
        return {"uneven": snapshot.ranks.all_reduce(total)}


class Failing(Monitor):
    """Fails in the middle of a pass, or before it on one rank."""

    def __init__(self, how, **kwargs):
        super().__init__(**kwargs)
        self.how = how

    def bind(self, view):
        view.require_samples()

    def measure(self, snapshot):
        if self.how == "in a pass":
            snapshot.forward(replace={"net.1": torch.zeros(2, 2)}, weights={"net.2.weight": torch.zeros(7, 9)})
        if self.how == "on a rank" and snapshot.ranks.rank == 1:
            raise RuntimeError("on rank 1")
        if self.how == "gradient":
            snapshot.forward(grad=True)
        return {"x": snapshot.logits().sum()}


class Watching(Monitor):
    """How many bytes of whole weights there are at a time while a pass is under way."""

    def measure(self, snapshot):
        model, peak = snapshot.view.model, 0

        def count(*_):
            nonlocal peak
            peak = max(peak, sum(p.nbytes for p in model.parameters() if not hasattr(p, "full_tensor")))

        handles = [module.register_forward_pre_hook(count) for module in model.modules()]
        snapshot.forward()
        for handle in handles:
            handle.remove()
        left = sum(p.nbytes for p in model.parameters() if not hasattr(p, "full_tensor"))
        return {"peak": float(peak), "left": float(left)}


def everything(rank):
    """All that is asked of two ranks, in one start of them."""
    results = {f"measured {name}": measure(name, shard(name, make(name))) for name in NETS}
    results |= {f"alone {accumulate}": train("mlp", accumulate=accumulate)[:2] for accumulate in (False, True)}
    for accumulate in (False, True):
        monitors = [monitor for monitor in shardable(False) if not isinstance(monitor, MANY_PASSES)]
        monitors += [Uneven(on_error="raise")]
        *trained, recorder = train("mlp", monitors, accumulate=accumulate)
        results[f"watched {accumulate}"] = trained
        results[f"keys {accumulate}"] = sorted(recorder.history)
        results["uneven"] = recorder.history["grok/uneven"].values[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for how in ("in a pass", "on a rank", "gradient"):
            *trained, recorder = train("mlp", [Failing(how), Uneven()])
            results[how] = trained, recorder.switched_off, len(recorder.history["grok/uneven"])
    *_, recorder = train("transformer", [Watching(on_error="raise")])
    results["peak"] = recorder.latest
    return results

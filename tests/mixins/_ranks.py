"""A sharded run on two processes, as a script: ``python -m tests.mixins._ranks FILE``."""

from __future__ import annotations

import atexit
import sys
import warnings

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from grok_callbacks.mixins import (
    CommutativityMixin,
    InputNoiseMixin,
    NormPenaltyMixin,
    SpectralEntropyMixin,
    WeightNoiseMixin,
    mixins_of,
    with_mixins,
)
from tests.mixins._nets import Tokens, fit, token_loader


def mixins(embedding_noise):
    """All, with input noise or not: that differs from rank to rank, so that runs can't be compared with it."""
    noise = [InputNoiseMixin(0.5, 0.2, on="embedding")] if embedding_noise else []
    return [SpectralEntropyMixin(0.1), NormPenaltyMixin(0.01), WeightNoiseMixin(0.05), CommutativityMixin(1.0), *noise]


class Sharded(Tokens):
    """Sharded over the ranks."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self.head.weight, "full_tensor"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.hidden, mesh=mesh)
            fully_shard(self, mesh=mesh)


class Leaving(Tokens):
    """Leaves the process group when its process ends.

    Lightning does not, and gloo's threads may then abort a process that has done all of its work (pytorch issue 190489).
    """

    def on_fit_start(self):
        if torch.distributed.is_initialized():
            atexit.register(torch.distributed.destroy_process_group)


def run(cls=Tokens, strategy="auto", ranks=1, embedding_noise=False, **settings):
    """Full-batch training, the batch being split over the ranks."""
    torch.manual_seed(0)
    module = with_mixins(cls(), *mixins(embedding_noise))
    trainer = fit(
        module, token_loader(n=32, batch_size=32 // ranks), strategy=strategy, devices=ranks, max_epochs=4, **settings
    )
    return module, trainer


def whole(module):
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in module.state_dict().items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (file,) = sys.argv[1:]
    results = {}
    for embedding_noise in (False, True):
        module, trainer = run(Sharded, ModelParallelStrategy(2, 1), 2, embedding_noise)
        states = {key: mixin.state_dict(module) for key, mixin in mixins_of(module).items()}
        gathered = [None, None]
        torch.distributed.all_gather_object(gathered, states)
        logged = {key: value.item() for key, value in trainer.callback_metrics.items()}
        results[embedding_noise] = {"weights": whole(module), "states": gathered, "logged": logged}
    if trainer.global_rank == 0:
        torch.save(results, file)

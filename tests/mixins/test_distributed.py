"""Two processes: replicated (DDP), spawned, and sharded (FSDP2)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grok_callbacks._compat import MisconfigurationException
from grok_callbacks.mixins import MuonMixin, with_mixins
from tests.mixins._nets import assert_close, fit, token_loader
from tests.mixins._ranks import Leaving, Sharded, run, whole

ROOT = Path(__file__).parents[2]


def test_sharded_ranks_give_what_one_process_gives(tmp_path):
    file = tmp_path / "result.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.mixins._ranks", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    results = torch.load(file)
    module, trainer = run()
    plain, noisy = results[False], results[True]
    # Weight noise is the same on all ranks, whole or in shards; penalties are counted once.
    assert_close(plain["weights"], whole(module), rtol=1e-4, atol=1e-5)
    for key in ("spectral_entropy", "norm"):
        assert plain["logged"][f"grok/penalty/{key}"] == pytest.approx(trainer.callback_metrics[f"grok/penalty/{key}"].item())
    # Input noise differs; the accuracy is that of all ranks, so that rank 0 saves what all have.
    first, second = noisy["states"]
    assert first == second
    assert first["input_noise"]["draws"] == 4
    assert first["input_noise"]["accuracy"] * 32 == pytest.approx(round(first["input_noise"]["accuracy"] * 32))


def test_spawned_processes(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    spawned, _ = run(Leaving, strategy="ddp_spawn", ranks=2)
    module, _ = run()
    assert_close(whole(spawned), whole(module), rtol=1e-4, atol=1e-5)


def test_muon_refuses_shards():
    module = with_mixins(Sharded(), MuonMixin())
    mesh = torch.distributed.device_mesh
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        module._device_mesh = mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
        module.configure_model()
        with pytest.raises(MisconfigurationException, match=r"MuonMixin: .*FSDP2"):
            module.configure_optimizers()
    finally:
        torch.distributed.destroy_process_group()
    assert fit(with_mixins(Sharded.__base__(), MuonMixin()), token_loader()).global_step == 8

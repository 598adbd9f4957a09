"""A Hydra application: data, module, Trainer and callbacks all come from conf/, and the monitors are one line there.

pip install "../..[hydra]"
python train.py
python train.py callbacks=none
python train.py callbacks.norm.ord=1 trainer.max_epochs=200
"""

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Parity(LightningModule):
    """Says whether an odd number of the first three bits are set."""

    def __init__(self, width: int, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.net = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, bits: Tensor) -> Tensor:
        return self.net(bits)

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        bits, parity = batch
        logits = self(bits)
        self.log(f"{stage}/accuracy", (logits.argmax(1) == parity).float().mean(), on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, parity)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def samples(count: int, seed: int) -> TensorDataset:
    bits = torch.randint(2, (count, 12), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(bits.float() * 2 - 1, bits[:, :3].sum(1) % 2)


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    seed_everything(config.seed)
    callbacks = list(instantiate(config.callbacks or {}).values())
    trainer = instantiate(config.trainer, callbacks=callbacks)
    train, validation = DataLoader(samples(200, seed=0), 50, shuffle=True), DataLoader(samples(500, seed=1), 500)
    trainer.fit(instantiate(config.model), train, validation)


if __name__ == "__main__":
    main()

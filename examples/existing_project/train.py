"""A Lightning project as one finds them: its own data, module and Trainer, and no word of grok_callbacks.

Data are points of two noisy spirals, batches are dictionaries, and the training loop is Lightning's.
"""

import math

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Spirals(Dataset):
    """Points on one of three arms."""

    def __init__(self, num_points: int, seed: int, noise: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.arms = torch.randint(3, (num_points,), generator=generator)
        radius = torch.rand(num_points, generator=generator)
        angle = 4 * radius + self.arms * (2 * math.pi / 3)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        self.points = points + noise * torch.randn(points.shape, generator=generator)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"point": self.points[index], "label": self.arms[index]}


class SpiralData(LightningDataModule):
    """300 points to learn, 1,000 to validate."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Spirals(300, seed=0), batch_size=50, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Spirals(1000, seed=1), batch_size=500)


class SpiralNet(LightningModule):
    """Two hidden layers with dropout."""

    def __init__(self, width: int = 64, lr: float = 3e-3, weight_decay: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.weight_decay = weight_decay
        self.body = nn.Sequential(nn.Linear(2, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, width), nn.GELU())
        self.head = nn.Linear(width, 3)

    def forward(self, point: Tensor) -> Tensor:
        return self.head(self.body(point))

    def _step(self, batch: dict[str, Tensor], stage: str) -> Tensor:
        logits = self(batch["point"])
        loss = nn.functional.cross_entropy(logits, batch["label"])
        accuracy = (logits.argmax(1) == batch["label"]).float().mean()
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}, prog_bar=True, on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


if __name__ == "__main__":
    LightningCLI(SpiralNet, SpiralData, seed_everything_default=0)

"""A project that knows nothing of grok_callbacks, with batches, calls and losses that nobody could guess.

Each sample is a user, an item, a rating of it and how much that rating counts; the network takes both users and items.
"""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Ratings(Dataset):
    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.users = torch.randint(10, (count,), generator=generator)
        self.items = torch.randint(20, (count,), generator=generator)
        self.weights = torch.rand(count, generator=generator)

    def __len__(self):
        return len(self.users)

    def __getitem__(self, index):
        liked = (self.users[index] + self.items[index]) % 3 == 0
        return self.users[index], self.items[index], liked.float(), self.weights[index]


class Recommender(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(10, 8), nn.Embedding(20, 8)
        self.score = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, users, items):
        return self.score(torch.cat([self.users(users), self.items(items)], dim=1)).squeeze(1)

    def training_step(self, batch, batch_idx):
        users, items, liked, weights = batch
        return nn.functional.binary_cross_entropy_with_logits(self(users, items), liked, weights)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, enable_progress_bar=False, enable_checkpointing=False)
    trainer.fit(Recommender(), DataLoader(Ratings(60, 0), 12))

"""A project that knows nothing of grok_callbacks: a causal language model on ``input_ids`` and ``labels``."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

TOKENS, LENGTH = 12, 10


class Counting(Dataset):
    """Sentences that count up from a random token; the first is padding that is no target."""

    def __init__(self, count, seed):
        starts = torch.randint(TOKENS, (count, 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = (starts + torch.arange(LENGTH)) % TOKENS

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        labels = tokens.clone()
        labels[0] = -100
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


class Transformer(pl.LightningModule):
    def __init__(self, width=16):
        super().__init__()
        self.embed = nn.Embedding(TOKENS, width)
        self.place = nn.Embedding(LENGTH, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[1]
        hidden = self.embed(input_ids) + self.place(torch.arange(length, device=input_ids.device))
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=input_ids.device)
        return {"logits": self.head(self.block(hidden, src_mask=mask, is_causal=True))}

    def step(self, batch, name):
        logits = self(batch["input_ids"], batch["attention_mask"])["logits"]
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        self.log(name, loss, prog_bar=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train_loss")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val_loss")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 3e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(1)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=4, log_every_n_steps=1, enable_progress_bar=False)
    trainer.fit(Transformer(), DataLoader(Counting(24, 0), 6, shuffle=True), DataLoader(Counting(12, 1), 6))

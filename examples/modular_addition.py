"""Addition modulo 31 groks while the standard preset watches.

Run it with ``python examples/modular_addition.py``, then look at the curves with ``tensorboard --logdir lightning_logs``. The
same with weight decay 0 memorises and stays there: ``python examples/modular_addition.py --weight-decay 0``.
"""

import argparse

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from grok_callbacks import default_callbacks
from grok_callbacks.tasks import one_hot_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    recipe = one_hot_recipe("add", weight_decay=options.weight_decay, seed=options.seed)
    recipe.data.steps_per_epoch = 100  # Full batches: an epoch of a single step would be all overhead.
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        max_epochs=-1,
        val_check_interval=10,
        logger=TensorBoardLogger("lightning_logs", name="modular_addition"),
        callbacks=default_callbacks("standard"),
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(recipe.module, recipe.data)


if __name__ == "__main__":
    main()

"""Real images grok: scikit-learn's digits, a network whose initial weights are eight times too large.

Run it with ``python examples/digits.py`` (about half a minute on one core), then look at the curves with
``tensorboard --logdir lightning_logs``, or draw them with ``grok-callbacks report lightning_logs/digits/version_0``.
"""

import argparse

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from grok_callbacks import default_callbacks
from grok_callbacks.tasks import digits_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    recipe = digits_recipe(weight_decay=options.weight_decay, seed=options.seed)
    recipe.data.steps_per_epoch = 100
    trainer = Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        max_epochs=-1,
        val_check_interval=50,
        logger=TensorBoardLogger("lightning_logs", name="digits"),
        callbacks=default_callbacks("standard"),
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(recipe.module, recipe.data)


if __name__ == "__main__":
    main()

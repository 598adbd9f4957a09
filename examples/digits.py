"""Real images grok: scikit-learn's digits, or MNIST, and a network whose initial weights are eight times too large.

Run it with ``python examples/digits.py`` (about half a minute on one core), then look at the curves with
``tensorboard --logdir lightning_logs``, or draw them with ``grok-callbacks report lightning_logs/digits/version_0``.

The experiment is that of Golechha (arXiv 2405.12755). The paper's text has cross-entropy, its table a squared error on one-hot
targets, which is the default here; ``--loss cross_entropy`` is the other. With a folder that holds MNIST's four IDX files
(``train-images-idx3-ubyte`` and so on, plain or with ``.gz`` at their ends) it is the paper's own size; that takes hours:

    python examples/digits.py --data MNIST_FOLDER --train-size 1000 --weight-decay 0.01 --steps 100000

With ``--norm-penalty -1e-7`` the norm is rewarded: it grows all along, and validation accuracy rises nonetheless.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from grok_callbacks import NormPenaltyMixin, default_callbacks, with_mixins
from grok_callbacks.tasks import DigitsDataModule, MLPClassifier, MNISTDataModule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with MNIST's IDX files; scikit-learn's digits without it")
    parser.add_argument("--train-size", type=int, default=300, help="images to train on")
    parser.add_argument("--loss", choices=["mse", "cross_entropy"], default="mse")
    parser.add_argument("--alpha", type=float, default=8.0, help="factor on all initial weights")
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument(
        "--norm-penalty", type=float, default=0.0, help="weight of the squared norm in the loss, of either sign"
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    one_hot = options.loss == "mse"
    if options.data is None:
        data = DigitsDataModule(options.train_size, one_hot=one_hot, seed=options.seed)
    else:
        data = MNISTDataModule(options.data, options.train_size, one_hot=one_hot, seed=options.seed)
    data.steps_per_epoch = 100
    seed_everything(options.seed, verbose=False)
    module = MLPClassifier(
        data.train_set.inputs[0].numel(), init_scale=options.alpha, weight_decay=options.weight_decay, loss=options.loss
    )
    if options.norm_penalty:
        with_mixins(module, NormPenaltyMixin(options.norm_penalty))
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
    trainer.fit(module, data)


if __name__ == "__main__":
    main()

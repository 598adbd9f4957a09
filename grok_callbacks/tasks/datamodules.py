"""Lightning data modules of the tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from grok_callbacks.tasks.data import load_digits, make_task
from grok_callbacks.tasks.idx import load_mnist

Sample = tuple[Tensor, Tensor]


class ArrayDataset(Dataset[Sample]):
    """Inputs and targets in memory; ``dataset[i]`` is one sample, a whole batch is a single indexing operation.

    A full batch of thousands of pairs is then as cheap to load as one pair, and a run takes thousands of them. Its
    loader needs ``collate_fn=collate``, which knows a ready batch from a list of samples.

    Args:
        inputs: Inputs ``(n, ...)``.
        targets: Targets ``(n, ...)``.

    Raises:
        ValueError: If there isn't one target for each input.

    Example:
        >>> dataset = ArrayDataset(torch.arange(6).view(3, 2), torch.tensor([0, 1, 2]))
        >>> inputs, target = dataset[1]
        >>> inputs.tolist(), target.item(), len(dataset)
        ([2, 3], 1, 3)
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"`targets` must be one for each of {len(inputs)} inputs, got {len(targets)}.")
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Sample:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """The samples at ``indices`` as a batch; :class:`~torch.utils.data.DataLoader` looks for this name."""
        index = torch.as_tensor(indices)
        return self.inputs[index], self.targets[index]


def collate(samples: Sample | list[Sample]) -> Sample:
    """A batch as it is, or a list of samples stacked to one."""
    if isinstance(samples, tuple):
        return samples
    inputs, targets = default_collate(samples)
    return inputs, targets


class _RepeatedFullBatch(Sampler[list[int]]):
    """All samples in each of several batches, so that an epoch, and its progress bar, is more than a step."""

    def __init__(self, size: int, repeats: int) -> None:
        self.batch = list(range(size))
        self.repeats = repeats

    def __len__(self) -> int:
        return self.repeats

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.repeats):
            yield self.batch


class _SplitDataModule(pl.LightningDataModule):
    """A seeded split of one data set into train and validation part, in full batches or shuffled smaller ones."""

    #: Full batches that make an epoch; a longer epoch has a progress bar worth looking at.
    steps_per_epoch: int = 1

    def __init__(self, seed: int, batch_size: int | None) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"`batch_size` must be positive, or None for full batches, got {batch_size}.")
        self.seed = seed
        self.batch_size = batch_size
        self.train_set: ArrayDataset
        self.val_set: ArrayDataset

    def _split(self, inputs: Tensor, targets: Tensor, train_size: int) -> None:
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(self.seed))
        train, val = order[:train_size], order[train_size:]
        self.train_set = ArrayDataset(inputs[train], targets[train])
        self.val_set = ArrayDataset(inputs[val], targets[val])

    def train_dataloader(self) -> DataLoader[Sample]:
        """The training part; shuffled unless it is one full batch, where order says nothing."""
        if self.batch_size is None:
            batches = _RepeatedFullBatch(len(self.train_set), self.steps_per_epoch)
            return DataLoader(self.train_set, batch_sampler=batches, collate_fn=collate)
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self) -> DataLoader[Sample]:
        """All that isn't trained on."""
        size = len(self.val_set) if self.batch_size is None else self.batch_size
        return DataLoader(self.val_set, batch_size=size, collate_fn=collate)


class PairTaskDataModule(_SplitDataModule):
    """Pairs of tokens and their answers: a share to train on, the rest to validate.

    Args:
        task: Name of the task, one of :data:`~grok_callbacks.tasks.data.TASKS`.
        size: Modulus, degree of the permutations, number of bits, or number of tokens, as the task has it.
        train_fraction: Share of all pairs that is trained on.
        seed: Which split, and for random labels which labels.
        batch_size: Samples a step, ``None`` for full batches.

    Raises:
        ValueError: If an argument is out of range, or a part of the split would be empty.

    Example:
        >>> data = PairTaskDataModule("add", 31, train_fraction=0.7)
        >>> len(data.train_set), len(data.val_set), data.task.num_classes
        (673, 288, 31)
    """

    def __init__(
        self,
        task: str = "add",
        size: int = 31,
        train_fraction: float = 0.7,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(seed, batch_size)
        self.task = make_task(task, size, seed)
        train_size = round(train_fraction * len(self.task)) if 0 < train_fraction < 1 else 0
        if not 0 < train_size < len(self.task):
            raise ValueError(
                f"`train_fraction` must leave samples to train on and to validate on, got {train_fraction} "
                f"of {len(self.task)} samples."
            )
        self._split(self.task.inputs, self.task.targets, train_size)


class DigitsDataModule(_SplitDataModule):
    """Scikit-learn's 1,797 digits ``(1, 8, 8)``: a few to train on, the rest to validate.

    Needs scikit-learn: ``pip install scikit-learn``.

    Args:
        train_size: Number of images that are trained on.
        one_hot: Give targets as float vectors, for a mean squared error, instead of class numbers.
        seed: Which split.
        batch_size: Samples a step, ``None`` for full batches.

    Raises:
        ValueError: If an argument is out of range.
        ModuleNotFoundError: If scikit-learn isn't installed.

    Example:
        >>> data = DigitsDataModule(train_size=300)
        >>> images, targets = next(iter(data.val_dataloader()))
        >>> images.shape, targets.shape
        (torch.Size([1497, 1, 8, 8]), torch.Size([1497, 10]))
    """

    num_classes = 10

    def __init__(self, train_size: int = 300, one_hot: bool = True, seed: int = 0, batch_size: int | None = None) -> None:
        super().__init__(seed, batch_size)
        images, labels = load_digits()
        if not 0 < train_size < len(images):
            raise ValueError(f"`train_size` must be from 1 to {len(images) - 1}, got {train_size}.")
        targets = F.one_hot(labels, self.num_classes).float() if one_hot else labels
        self._split(images, targets, train_size)


class MNISTDataModule(_SplitDataModule):
    """MNIST from files that are on disk: a few of the training images to train on, all test images to validate.

    Args:
        folder: Where the four IDX files are, see :func:`~grok_callbacks.tasks.idx.load_mnist`.
        train_size: Number of images that are trained on.
        one_hot: Give targets as float vectors, for a mean squared error, instead of class numbers.
        seed: Which training images.
        batch_size: Samples a step, ``None`` for full batches.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If a file is damaged, or an argument is out of range.
    """

    num_classes = 10

    def __init__(
        self, folder: str | Path, train_size: int = 1000, one_hot: bool = True, seed: int = 0, batch_size: int | None = None
    ) -> None:
        super().__init__(seed, batch_size)
        (images, labels), (test_images, test_labels) = load_mnist(folder)
        if not 0 < train_size <= len(images):
            raise ValueError(f"`train_size` must be from 1 to {len(images)}, got {train_size}.")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:train_size]

        def targets(classes: Tensor) -> Tensor:
            return F.one_hot(classes, self.num_classes).float() if one_hot else classes

        self.train_set = ArrayDataset(images[chosen], targets(labels[chosen]))
        self.val_set = ArrayDataset(test_images, targets(test_labels))

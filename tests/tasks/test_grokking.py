"""The quickest recipe groks, and does not without weight decay or with random labels."""

from __future__ import annotations

import torch

from grok_callbacks.tasks import one_hot_recipe


def train(recipe, steps):
    """Train and validation accuracy every 25 steps of a bare loop."""
    module, data, _ = recipe
    optimizer = module.configure_optimizers()
    history = []
    for step in range(steps + 1):
        if step % 25 == 0:
            with torch.no_grad():
                accuracies = [
                    (module(split.inputs).argmax(1) == split.targets).float().mean().item()
                    for split in (data.train_set, data.val_set)
                ]
            history.append((step, *accuracies))
        optimizer.zero_grad()
        module.compute_loss(module(data.train_set.inputs), data.train_set.targets).backward()
        optimizer.step()
    return history


def first_step(history, column, threshold):
    return next((row[0] for row in history if row[column] >= threshold), None)


def test_groks():
    history = train(one_hot_recipe(), steps=600)
    memorized, generalized = first_step(history, 1, 0.99), first_step(history, 2, 0.9)
    assert memorized is not None
    assert generalized is not None
    assert generalized >= 2 * memorized
    assert {step: val for step, _, val in history}[memorized] < 0.2


def test_memorizes_without_weight_decay():
    history = train(one_hot_recipe(weight_decay=0.0), steps=600)
    assert history[-1][1] == 1.0
    assert max(val for _, _, val in history) < 0.2


def test_random_labels_never_generalize():
    history = train(one_hot_recipe("random"), steps=300)
    assert max(val for _, _, val in history) < 0.2

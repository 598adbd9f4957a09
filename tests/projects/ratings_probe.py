"""How to look at ``ratings.py``: all that GROK_CALLBACKS needs to be told about it."""

import torch.nn.functional as F


def unpack(batch):
    """Inputs and targets; how much a rating counts is neither."""
    users, items, liked, _ = batch
    return (users, items), liked


def forward(model, inputs):
    """One logit for each pair."""
    return model(*inputs)


def loss(logits, targets):
    """Of a user who liked something or not."""
    return F.binary_cross_entropy_with_logits(logits.double().reshape(targets.shape), targets.double())

"""Whether a network's answers obey the symmetries of its task: commutativity, and the laws of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from grok_callbacks.functional._common import to_double


def commutativity(logits: Tensor, mirrored_logits: Tensor) -> Tensor:
    r"""Share of samples whose prediction does not change under a mirroring of the input, such as swapping the operands.

    .. math:: \frac{1}{n} \sum_i \mathbb{1}\big[\arg\max f(a_i, b_i) = \arg\max f(b_i, a_i)\big]

    Over pairs of which a share is in the training set this has a floor: where both orders are memorised, they agree.
    The headline version takes pairs with :math:`a \ne b` whose mirror image is not in the training set.

    Args:
        logits: ``(n, C)``.
        mirrored_logits: ``(n, C)`` for the mirrored inputs, in the same order.

    Returns:
        Scalar in [0, 1]. NaN if a logit is NaN or plus infinity, for then there is no prediction.

    Raises:
        ValueError: If the shapes are not one non-empty ``(n, C)``, or the logits are no real numbers.

    Cost: one pass over the logits.

    Source: Tan & Huang 2023, "Understanding Grokking Through A Robustness Viewpoint", arXiv 2311.06597.

    Example:
        >>> import torch
        >>> commutativity(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 1.0]]))
        tensor(0.5000, dtype=torch.float64)
    """
    return agreements(logits, mirrored_logits).mean()


def logit_distance(logits: Tensor, mirrored_logits: Tensor) -> Tensor:
    r"""Mean squared difference of the logits under a mirroring of the input.

    .. math:: \frac{1}{nC} \sum_{i=1}^{n} \sum_{k=1}^{C} \big(f_k(a_i, b_i) - f_k(b_i, a_i)\big)^2

    The quantity that training with the commutativity penalty adds to the loss. It depends on the scale of the logits.

    Args:
        logits: ``(n, C)``.
        mirrored_logits: ``(n, C)`` for the mirrored inputs, in the same order.

    Returns:
        Scalar, at least 0, in squared logits. NaN or infinite if a logit is.

    Raises:
        ValueError: If the shapes are not one non-empty ``(n, C)``, or the logits are no real numbers.

    Cost: one pass over the logits.

    Source: Tan & Huang 2023, arXiv 2311.06597.

    Example:
        >>> import torch
        >>> logit_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor(2., dtype=torch.float64)
    """
    _check_logits(logits, mirrored_logits)
    return (to_double(logits) - to_double(mirrored_logits)).square().mean()


def identity_agreement(predictions: Tensor, table: Tensor, pairs: Tensor | None = None) -> Tensor:
    r"""Share of elements a with :math:`f(a, e) = a` for the identity e of the group.

    Transpose ``predictions`` and ``pairs`` for the law with e on the left.

    Args:
        predictions: ``(n, n)`` integers: the answer f(a, b) in row a, column b. Answers outside 0 .. n - 1 are wrong
            ones.
        table: ``(n, n)`` multiplication table of the group, with elements 0 .. n - 1.
        pairs: Boolean ``(n, n)``, for instance the pairs seen in training: only these are looked at. All by default.

    Returns:
        Scalar in [0, 1]; NaN if none of the pairs (a, e) is in ``pairs``.

    Raises:
        ValueError: If the shapes or types are wrong, or ``table`` has no identity.

    Source: the laws are those that Tan & Huang 2023, arXiv 2311.06597, call basic; the measure is ours.

    Example:
        >>> import torch
        >>> n = torch.arange(3)
        >>> table = (n[:, None] + n) % 3
        >>> identity_agreement((2 * n[:, None] + n) % 3, table)
        tensor(0.3333, dtype=torch.float64)
    """
    _check_answers(predictions, pairs)
    identity = _identity(table, predictions)
    elements = torch.arange(len(predictions), device=predictions.device)
    return _share(predictions[:, identity] == elements, None if pairs is None else pairs[:, identity])


def inverse_agreement(predictions: Tensor, table: Tensor, pairs: Tensor | None = None) -> Tensor:
    r"""Share of elements a with :math:`f(a, a^{-1}) = e`, where e and the inverses are the group's.

    Args:
        predictions: ``(n, n)`` integers: the answer f(a, b) in row a, column b. Answers outside 0 .. n - 1 are wrong
            ones.
        table: ``(n, n)`` multiplication table of the group, with elements 0 .. n - 1.
        pairs: Boolean ``(n, n)``, for instance the pairs seen in training: only these are looked at. All by default.

    Returns:
        Scalar in [0, 1]; NaN if none of the pairs (a, inverse of a) is in ``pairs``.

    Raises:
        ValueError: If the shapes or types are wrong, or ``table`` has no identity or lacks an inverse.

    Source: see :func:`identity_agreement`.

    Example:
        >>> import torch
        >>> n = torch.arange(3)
        >>> table = (n[:, None] + n) % 3
        >>> inverse_agreement(torch.zeros(3, 3, dtype=torch.long), table)
        tensor(1., dtype=torch.float64)
    """
    _check_answers(predictions, pairs)
    identity = _identity(table, predictions)
    is_identity = table == identity
    if not bool((is_identity.sum(1) == 1).all() & (is_identity == is_identity.T).all()):
        raise ValueError("table must hold one inverse for every element.")
    elements = torch.arange(len(predictions), device=predictions.device)
    inverses = is_identity.long().argmax(1)
    return _share(predictions[elements, inverses] == identity, None if pairs is None else pairs[elements, inverses])


def associativity_agreement(predictions: Tensor, pairs: Tensor | None = None) -> Tensor:
    r"""Share of triples with :math:`f(f(a, b), c) = f(a, f(b, c))`, all four answers being the network's own.

    A triple whose f(a, b) or f(b, c) is no element (outside 0 .. n - 1) breaks the law. Constant answers obey it: read
    it beside the accuracy.

    Args:
        predictions: ``(n, n)`` integers: the answer f(a, b) in row a, column b.
        pairs: Boolean ``(n, n)``, for instance the pairs seen in training: only triples all of whose four questions are
            among these are looked at. All by default.

    Returns:
        Scalar in [0, 1]; NaN if no triple is left.

    Raises:
        ValueError: If the shapes or types are wrong.

    Cost: :math:`O(n^3)` table look-ups, in :math:`O(n^2)` memory.

    Source: see :func:`identity_agreement`.

    Example:
        >>> import torch
        >>> n = torch.arange(5)
        >>> associativity_agreement((n[:, None] + n) % 5), associativity_agreement((n[:, None] - n) % 5)
        (tensor(1., dtype=torch.float64), tensor(0.2000, dtype=torch.float64))
    """
    _check_answers(predictions, pairs)
    size = len(predictions)
    is_element = (predictions >= 0) & (predictions < size)
    answers = predictions.long().clamp(0, size - 1)
    agreeing, looked_at = 0, 0
    for a in range(size):
        left = predictions[answers[a]]  # f(f(a, b), c) at (b, c)
        right = predictions[a][answers]  # f(a, f(b, c))
        agree = (left == right) & is_element[a][:, None] & is_element
        if pairs is None:
            chosen = torch.ones_like(agree)
        else:
            # A question that can't be put, f(no element, c), is not what keeps a triple out: it breaks the law.
            second_left = pairs[answers[a]] | ~is_element[a][:, None]
            second_right = pairs[a][answers] | ~is_element
            chosen = pairs[a][:, None] & pairs & second_left & second_right
        agreeing += int((agree & chosen).sum())
        looked_at += int(chosen.sum())
    share = agreeing / looked_at if looked_at else torch.nan
    # A tensor made of a Python float would be rounded to float32.
    return to_double(torch.zeros((), device=predictions.device)) + share


def agreements(logits: Tensor, mirrored_logits: Tensor) -> Tensor:
    """1 for each sample whose two predictions agree, 0 for the others, NaN where there is none: ``(n,)`` in float64."""
    _check_logits(logits, mirrored_logits)
    agree = to_double(logits.argmax(-1) == mirrored_logits.argmax(-1))
    spoilt = (torch.isnan(both) | torch.isposinf(both) for both in (logits, mirrored_logits))
    for bad in spoilt:
        agree = agree.masked_fill(bad.any(-1), torch.nan)
    return agree


def _check_logits(logits: Tensor, mirrored_logits: Tensor) -> None:
    if logits.ndim != 2 or logits.numel() == 0:
        raise ValueError(f"logits must have the shape (n, C) and not be empty, got {tuple(logits.shape)}.")
    if mirrored_logits.shape != logits.shape:
        raise ValueError(f"mirrored_logits must have the shape {tuple(logits.shape)}, got {tuple(mirrored_logits.shape)}.")
    for name, tensor in (("logits", logits), ("mirrored_logits", mirrored_logits)):
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} must be real numbers, got {tensor.dtype}.")


def _check_answers(predictions: Tensor, pairs: Tensor | None) -> None:
    shape = tuple(predictions.shape)
    if predictions.ndim != 2 or shape[0] != shape[1] or predictions.numel() == 0 or not _is_integer(predictions):
        raise ValueError(f"predictions must be integers of the shape (n, n), got {predictions.dtype} {shape}.")
    if pairs is not None and (pairs.dtype != torch.bool or pairs.shape != predictions.shape):
        raise ValueError(f"pairs must be boolean of the shape {shape}, got {pairs.dtype} {tuple(pairs.shape)}.")


def _identity(table: Tensor, predictions: Tensor) -> int:
    """Index of the group's identity."""
    if table.shape != predictions.shape or not _is_integer(table):
        raise ValueError(
            f"table must be integers of the shape {tuple(predictions.shape)}, got {table.dtype} {tuple(table.shape)}."
        )
    elements = torch.arange(len(table), device=table.device)
    leaves_alone = [products.eq(elements).all(1) for products in (table, table.T)]
    candidates = leaves_alone[0] & leaves_alone[1]
    if int(candidates.sum()) != 1:
        raise ValueError("table must have an identity: an element that leaves every other as it is, from both sides.")
    return int(candidates.long().argmax())


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _share(agree: Tensor, chosen: Tensor | None) -> Tensor:
    """Mean of ``agree`` over the chosen entries: NaN if there are none."""
    return to_double(agree if chosen is None else agree[chosen]).mean()

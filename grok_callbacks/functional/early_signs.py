"""Signs of generalisation to come that need no label of unseen data: of cut weights, of gradients, of answers as a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grok_callbacks.functional._common import entropy, to_double
from grok_callbacks.functional.spectral import flatten_matrix

__all__ = ["answer_entropy", "gradient_coherence", "truncate_spectrum"]


def truncate_spectrum(weight: Tensor, shares: Sequence[float]) -> list[Tensor]:
    r"""A weight cut to its leading singular directions: the fewest that hold a share of its squared norm.

    With :math:`W = U S V^\top`, largest singular values first, :math:`W_q = \sum_{i \le r} s_i u_i v_i^\top` for the smallest
    r with :math:`\sum_{i \le r} s_i^2 \ge q \sum_i s_i^2`. A network that has memorised needs most of its directions; one on
    its way to a general solution keeps it in few of them.

    Args:
        weight: At least two dimensions, the first of which counts the outputs; a convolution is taken as (out, in k).
        shares: The shares q, each more than 0 and at most 1.

    Returns:
        The cut weight for each share, of the shape and dtype of ``weight``; NaN where ``weight`` is not finite.

    Raises:
        ValueError: If ``weight`` has fewer than two dimensions, is complex or empty, or a share is out of range.

    Cost:
        The eigenvectors of the smaller side's Gram matrix, in float64, and a product for each share.

    Source:
        Our own.

    Example:
        >>> import torch
        >>> half, most = truncate_spectrum(torch.diag(torch.tensor([3.0, 2.0, 1.0])), [0.5, 0.9])
        >>> half.diag().round(decimals=4) + 0, most.diag().round(decimals=4) + 0
        (tensor([3., 0., 0.]), tensor([3., 2., 0.]))
    """
    check_shares(shares)
    directions = leading_directions(weight)
    return [cut_to_share(weight, directions, share) for share in shares]


class Directions(NamedTuple):
    """The singular directions of a matrix on its smaller side, most important first: what :func:`cut_to_share` needs.

    Attributes:
        vectors: (k, k), k the smaller side; a column for each direction. NaN if the matrix isn't finite.
        held: (k,), the squared norm that the first directions hold together, relative to any.
    """

    vectors: Tensor
    held: Tensor


def leading_directions(weight: Tensor) -> Directions:
    """Prepare :func:`truncate_spectrum` for several shares of a weight, to be cut one at a time.

    Raises:
        ValueError: If ``weight`` has fewer than two dimensions, is complex or empty.
    """
    matrix = to_double(flatten_matrix(weight))
    if not matrix.numel():
        raise ValueError(f"weight is empty: shape {tuple(weight.shape)}")
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    largest = matrix.abs().amax()
    if not torch.isfinite(largest):
        unknown = matrix.new_full((tall.shape[1], tall.shape[1]), math.nan)
        return Directions(unknown, unknown[0])
    # Scaled, so that no square overflows or vanishes; all zeros stay so.
    tall = tall / largest.clamp(min=torch.finfo(matrix.dtype).tiny)
    # The Gram matrix of the smaller side: its eigenvectors are the directions, at a third of an SVD's price.
    squares, vectors = (each.flip(-1) for each in torch.linalg.eigh(tall.T @ tall))
    return Directions(vectors, squares.clamp(min=0).cumsum(0))


def cut_to_share(weight: Tensor, directions: Directions, share: float) -> Tensor:
    """A weight without all but the fewest leading directions that hold a share of its squared norm."""
    vectors, held = directions
    if share == 1 and not torch.isnan(held[-1]):
        return weight.clone()
    kept = vectors[:, : int((held < share * held[-1]).sum()) + 1]
    # As precise as the network that the weight goes into, which is quicker for a large one than float64.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    projection = (kept @ kept.T).to(dtype)
    matrix = flatten_matrix(weight).to(dtype)
    cut = matrix @ projection if matrix.shape[0] >= matrix.shape[1] else projection @ matrix
    return cut.reshape(weight.shape).to(weight.dtype)


def check_shares(shares: Sequence[float]) -> None:
    """Refuse shares that no spectrum can hold.

    Raises:
        ValueError: If there is none, or one is not more than 0 and at most 1.
    """
    if not len(shares) or not all(0 < share <= 1 for share in shares):
        raise ValueError(f"shares must be numbers of more than 0 and at most 1, at least one of them, got {list(shares)}")


def gradient_coherence(first: Tensor, second: Tensor) -> Tensor:
    r"""How far two gradients agree: :math:`\langle g_1, g_2 \rangle / (\lVert g_1 \rVert \lVert g_2 \rVert)`.

    With :math:`g_1` and :math:`g_2` the gradients of the loss on two halves of the training data: where it is high, a step
    that fits the one half fits the other, too.

    Args:
        first: Any shape.
        second: Of the same shape.

    Returns:
        Scalar in [-1, 1], float64; NaN where a gradient is zero or not finite.

    Raises:
        ValueError: If the shapes differ, or the gradients are empty or complex.

    Cost:
        A pass over each.

    Source:
        Our use of a customary quantity (Fort et al. 2019, arXiv 1901.09491, call it stiffness).

    Example:
        >>> import torch
        >>> gradient_coherence(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
        tensor(0.7071, dtype=torch.float64)
    """
    check_gradients(first, second)
    # Gradients of a loss of nearly zero are so small that their squares would vanish.
    one, other = (_of_unit_length(to_double(each).flatten()) for each in (first, second))
    return (one * other).sum().clamp(-1.0, 1.0)


def check_gradients(first: Tensor, second: Tensor) -> None:
    """Refuse gradients that are not of the same parameters.

    Raises:
        ValueError: If the shapes differ, or the gradients are empty or complex.
    """
    if first.shape != second.shape:
        raise ValueError(f"second must have the shape of first, {tuple(first.shape)}, got {tuple(second.shape)}")
    if first.is_complex() or second.is_complex():
        raise ValueError("first and second must be real, got complex gradients")
    if not first.numel():
        raise ValueError("first is empty")


def _of_unit_length(vector: Tensor) -> Tensor:
    scaled: Tensor = vector / vector.abs().amax()
    length: Tensor = torch.linalg.vector_norm(scaled)
    return scaled / length


def answer_entropy(logits: Tensor) -> Tensor:
    r"""Entropy of a network's answers as a whole, as a share of its maximum: :math:`H(\bar p) / \ln C`.

    :math:`\bar p` is the mean over samples of the softmaxes over C classes. 1 where all answers are given alike, as they are
    to inputs of a balanced task by a network that has found its rule; less where a network without a rule prefers some.

    Args:
        logits: (n, C).

    Returns:
        Scalar in [0, 1], float64; NaN for one class or logits that are not a number.

    Raises:
        ValueError: If ``logits`` isn't a matrix or is empty.

    Cost:
        A softmax.

    Source:
        Our own use; it is the first term of the mutual information of inputs and answers.

    Example:
        >>> import torch
        >>> answer_entropy(torch.tensor([[100.0, 0.0], [0.0, 100.0]])), answer_entropy(torch.tensor([[2.0, 0.0]]))
        (tensor(1., dtype=torch.float64), tensor(0.5271, dtype=torch.float64))
    """
    check_logits(logits)
    return entropy_of_answers(to_double(logits).softmax(-1).mean(0))


def check_logits(logits: Tensor) -> None:
    """Refuse what is no table of answers.

    Raises:
        ValueError: If ``logits`` isn't a matrix or is empty.
    """
    if logits.ndim != 2 or not logits.numel() or logits.is_complex():
        raise ValueError(f"logits must be a real matrix that is not empty, got {logits.dtype} of shape {tuple(logits.shape)}")


def entropy_of_answers(probabilities: Tensor) -> Tensor:
    """:func:`answer_entropy` of probabilities that are already averaged over samples, (C,)."""
    if len(probabilities) < 2:
        return probabilities.new_tensor(math.nan)
    return (entropy(probabilities) / math.log(len(probabilities))).clamp(0.0, 1.0)

"""Full data sets of small tasks that grok: every pair of tokens, and what it maps to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_MAX_ELEMENTS = 5040
"""Largest number of tokens whose pairs are built: S_7's, 25 million pairs, 600 MB."""


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group on the elements ``0 .. n - 1``.

    Args:
        table: Cayley table ``(n, n)``, integer: ``table[a, b]`` is the product ``a b``.

    Raises:
        ValueError: If ``table`` isn't square, isn't a Latin square of ``0 .. n - 1`` (each element once in every row and
            column), or has no identity. Associativity is taken on trust: checking it costs ``n ** 3``.

    Example:
        >>> group = Group(torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1]]))
        >>> group.identity, group.inverse.tolist()
        (0, [0, 2, 1])
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[0] != self.table.shape[1] or not len(self.table):
            raise ValueError(f"`table` must be a square matrix with at least one row, got shape {tuple(self.table.shape)}.")
        if self.table.is_floating_point() or self.table.is_complex():
            raise ValueError(f"`table` must hold integers, got {self.table.dtype}.")
        elements = torch.arange(self.order, device=self.table.device)
        for dim in (0, 1):
            if not (self.table.sort(dim=dim).values == elements.unsqueeze(1 - dim)).all():
                raise ValueError("`table` must hold each of 0 .. n - 1 once in every row and every column.")
        if not self._is_identity.any():
            raise ValueError("`table` must have an identity: an element e with e a = a e = a for all a.")

    @property
    def order(self) -> int:
        """Number of elements."""
        return len(self.table)

    @property
    def _is_identity(self) -> Tensor:
        elements = torch.arange(self.order, device=self.table.device)
        return ((self.table == elements) & (elements == self.table.T)).all(1)

    @cached_property
    def identity(self) -> int:
        """The element ``e`` with ``e a = a e = a``."""
        return int(self._is_identity.nonzero().item())

    @cached_property
    def inverse(self) -> Tensor:
        """Each element's right inverse ``(n,)``: ``table[a, inverse[a]] == identity``."""
        return (self.table == self.identity).int().argmax(1)

    @property
    def is_abelian(self) -> bool:
        """Whether ``a b = b a`` for all pairs."""
        return bool((self.table == self.table.T).all())


@dataclass(frozen=True, eq=False)
class Task:
    """Every input of a two-operand task, with its answer.

    Args:
        name: What the task is called.
        inputs: Pairs of tokens, int64 ``(n, 2)``, ordered by first, then second operand.
        targets: Their classes, int64 ``(n,)``.
        num_tokens: Size of the operands' alphabet.
        num_classes: Number of possible answers.
        group: The group whose product the task is, if it is one.

    Raises:
        ValueError: If shapes, types or ranges don't fit together.
    """

    name: str
    inputs: Tensor
    targets: Tensor
    num_tokens: int
    num_classes: int
    group: Group | None = None

    def __post_init__(self) -> None:
        for label, tensor, bound in (
            ("inputs", self.inputs, self.num_tokens),
            ("targets", self.targets, self.num_classes),
        ):
            if tensor.dtype != torch.int64:
                raise ValueError(f"`{label}` must be int64, got {tensor.dtype}.")
            if tensor.numel() and not 0 <= int(tensor.min()) <= int(tensor.max()) < bound:
                raise ValueError(f"`{label}` must lie in 0 .. {bound - 1}.")
        if self.inputs.ndim != 2 or self.inputs.shape[1] != 2:
            raise ValueError(f"`inputs` must have shape (n, 2), got {tuple(self.inputs.shape)}.")
        if self.targets.shape != self.inputs.shape[:1]:
            raise ValueError(f"`targets` must have shape ({len(self.inputs)},), got {tuple(self.targets.shape)}.")

    def __len__(self) -> int:
        return len(self.inputs)


_POLYNOMIALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "x2y2": lambda x, y: x * x + y * y,
    "x2xyy2": lambda x, y: x * x + x * y + y * y,
}

MODULAR_OPERATIONS = (*_POLYNOMIALS, "div")
"""Names :func:`modular_arithmetic` knows."""


def modular_arithmetic(operation: str, modulus: int) -> Task:
    """All pairs of residues and their sum, difference, product, quotient or quadratic form, modulo ``modulus``.

    Args:
        operation: ``"add"``, ``"sub"``, ``"mul"``, ``"div"``, ``"x2y2"`` (``x^2 + y^2``) or ``"x2xyy2"``
            (``x^2 + x y + y^2``).
        modulus: Number of residues. For ``"div"`` a prime; pairs that divide by zero are left out.

    Returns:
        The task; addition comes with its cyclic group.

    Raises:
        ValueError: If ``operation`` is unknown, ``modulus`` is out of range, or not prime where it must be.

    Example:
        >>> task = modular_arithmetic("div", 5)
        >>> len(task), task.inputs[0].tolist(), task.targets[task.inputs.tolist().index([1, 2])].item()
        (20, [0, 1], 3)
    """
    if operation not in MODULAR_OPERATIONS:
        raise ValueError(f"`operation` must be one of {', '.join(MODULAR_OPERATIONS)}, got {operation!r}.")
    _check_size("modulus", modulus, 1, _MAX_ELEMENTS)
    pairs = _all_pairs(modulus)
    if operation == "div":
        if not _is_prime(modulus):
            raise ValueError(f"`modulus` must be prime for division, got {modulus}.")
        pairs = pairs[pairs[:, 1] != 0]
        inverse = torch.tensor([0] + [pow(y, -1, modulus) for y in range(1, modulus)])
        answers = pairs[:, 0] * inverse[pairs[:, 1]]
    else:
        answers = _POLYNOMIALS[operation](pairs[:, 0], pairs[:, 1])
    targets = answers % modulus
    group = Group(targets.view(modulus, modulus)) if operation == "add" else None
    return Task(f"{operation} mod {modulus}", pairs, targets, modulus, modulus, group)


def permutation_group(degree: int) -> Task:
    """All pairs of permutations of ``degree`` things and their product: ``a b`` applies ``b`` first, then ``a``.

    Permutations are numbered in lexicographic order, so 0 is the identity.

    Args:
        degree: ``n`` of the symmetric group ``S_n``, 1 to 7; it has ``n!`` elements.

    Raises:
        ValueError: If ``degree`` is out of range.

    Example:
        >>> task = permutation_group(3)
        >>> task.num_tokens, len(task), task.group.is_abelian
        (6, 36, False)
    """
    _check_size("degree", degree, 1, 7)
    order = math.factorial(degree)
    permutations = torch.tensor(list(itertools.permutations(range(degree))))
    # Read as a number in base `degree`, a permutation sorts as its index does.
    place_values = degree ** torch.arange(degree - 1, -1, -1)
    codes = (permutations * place_values).sum(1)
    rows = [torch.searchsorted(codes, (a[permutations] * place_values).sum(1)) for a in permutations]
    group = Group(torch.stack(rows))
    return Task(f"S_{degree}", _all_pairs(order), group.table.flatten(), order, order, group)


def bitwise_xor(bits: int) -> Task:
    """All pairs of ``bits``-bit numbers and their bitwise exclusive or.

    Args:
        bits: Number of binary digits of each operand, 1 to 12.

    Raises:
        ValueError: If ``bits`` is out of range.

    Example:
        >>> task = bitwise_xor(5)
        >>> task.num_tokens, len(task), task.targets[task.inputs.tolist().index([6, 3])].item()
        (32, 1024, 5)
    """
    _check_size("bits", bits, 1, int(math.log2(_MAX_ELEMENTS)))
    order = 2**bits
    pairs = _all_pairs(order)
    targets = pairs[:, 0] ^ pairs[:, 1]
    return Task(f"{bits}-bit xor", pairs, targets, order, order, Group(targets.view(order, order)))


def random_labels(num_tokens: int, seed: int = 0) -> Task:
    """All pairs of tokens with uniformly drawn answers: a control that can be memorised and never generalised.

    Args:
        num_tokens: Number of tokens, and of classes.
        seed: Which labels are drawn.

    Raises:
        ValueError: If ``num_tokens`` is out of range.

    Example:
        >>> len(random_labels(7, seed=1))
        49
    """
    _check_size("num_tokens", num_tokens, 1, _MAX_ELEMENTS)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(num_tokens, (num_tokens**2,), generator=generator)
    return Task(f"random labels {num_tokens}", _all_pairs(num_tokens), targets, num_tokens, num_tokens)


TASKS = (*MODULAR_OPERATIONS, "permutation", "xor", "random")
"""Names :func:`make_task` knows."""


def make_task(name: str, size: int, seed: int = 0) -> Task:
    """Build a task by name.

    Args:
        name: A modular operation, ``"permutation"``, ``"xor"`` or ``"random"``.
        size: The modulus, the degree of the permutations, the number of bits, or the number of tokens.
        seed: Which labels ``"random"`` draws; the other tasks have nothing random.

    Raises:
        ValueError: If ``name`` is unknown or the task doesn't come in this ``size``.

    Example:
        >>> make_task("add", 7).name, make_task("permutation", 4).name, make_task("xor", 5).name
        ('add mod 7', 'S_4', '5-bit xor')
    """
    if name == "permutation":
        return permutation_group(size)
    if name == "xor":
        return bitwise_xor(size)
    if name == "random":
        return random_labels(size, seed)
    if name in MODULAR_OPERATIONS:
        return modular_arithmetic(name, size)
    raise ValueError(f"`name` must be one of {', '.join(TASKS)}, got {name!r}.")


def group_table(name: str, size: int) -> Tensor:
    """The table of a task's group, for configurations that can only call functions.

    Args:
        name: A task of :func:`make_task` that is a group's product.
        size: Its size.

    Returns:
        The group's product ``(n, n)``, integer.

    Raises:
        ValueError: If the task is not a group's product.

    Example:
        >>> group_table("add", 3)
        tensor([[0, 1, 2],
                [1, 2, 0],
                [2, 0, 1]])
    """
    group = make_task(name, size).group
    if group is None:
        raise ValueError(f"`name`: {name!r} of size {size} is not the product of a group.")
    return group.table


def load_digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits: 1,797 real images.

    Returns:
        Images ``(1797, 1, 8, 8)``, float32 in [0, 1], and their classes ``(1797,)``, int64.

    Raises:
        ModuleNotFoundError: If scikit-learn isn't installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The digits data set comes with scikit-learn: pip install scikit-learn") from error
    digits = datasets.load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.as_tensor(digits.target, dtype=torch.int64)


def _all_pairs(num_tokens: int) -> Tensor:
    tokens = torch.arange(num_tokens)
    return torch.cartesian_prod(tokens, tokens)


def _check_size(argument: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"`{argument}` must be an integer from {low} to {high}, got {value!r}.")


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))

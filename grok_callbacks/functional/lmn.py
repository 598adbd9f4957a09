"""Linear mapping number: how many linear maps a network amounts to on a set of samples.

Source: Liu, Zhong, Tegmark, "Grokking as Compression: A Nonlinear Complexity Perspective", arXiv 2310.05918.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grok_callbacks.functional._common import entropy, to_double

# Errors of this many epsilons of an output's scale are expected of sums in float32 or float64, beside the rounding to the
# coarsest format in use (kernels for half precision sum in float32), which moves a constant by half an epsilon.
_SUM_NOISE = 4.0
_ROUNDING_NOISE = 0.5
# Bytes of activations per CPU thread that stay in its cache, where larger chunks are slower as well as bigger.
_CACHE = 6 * 2**20
# Rows from which on a product by oneDNN is worth having it loaded.
_MANY_ROWS = 4096
# Chunks whose indices are worked out, and whose results are written, at a time.
_BLOCK = 16
# Squares of float32 values within these bounds, and of their rounding errors, neither overflow nor vanish.
_FLOAT32_RANGE = (1e-12, 1e15)
_AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Flatten, nn.Identity)
_IN_PLACE: dict[type, Callable[[Tensor], Tensor]] = {
    nn.ReLU: torch.relu_,
    nn.Sigmoid: torch.sigmoid_,
    nn.SiLU: partial(nn.functional.silu, inplace=True),
    nn.Tanh: torch.tanh_,
}


def linear_connectivity(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    num_interpolation: int = 21,
    *,
    quadrature: int | None = None,
    memory_limit: int = 256 * 2**20,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    r"""How linear ``function`` is along the segment between each two of ``points``.

    .. math::
        L_{ij} = \operatorname{mean}_k r^2\bigl(y_k(t), t\bigr), \qquad
        y(t) = f\bigl(x_i + t (x_j - x_i)\bigr), \qquad t \in \{0, .05, \ldots, 1\}

    with :math:`r` the Pearson correlation over the ``num_interpolation`` values of t, and :math:`L_{ii} = 1`.

    An output that is constant along a segment has no correlation. The paper is silent; a constant is linear, so here it
    counts as 1. So does any output whose deviations from a straight line are within the rounding errors (standard
    deviation against the largest :math:`|y_k|` over ``points``) of the coarsest number format that ``function`` computes
    in: noise is not counted as a nonlinearity. That is 5e-7 of the scale in float32, and 0.4% in bfloat16: a network
    that answers in bfloat16 is better measured as a float32 copy.

    ``function`` must treat each sample alone (a network in eval mode). A network between two layers is measured from the
    activations of the first: ``points`` are those activations, ``function`` the rest of the network. Where that is a
    ``torch.nn.Sequential`` its structure is used: layers that begin it and are affine are applied to the N points only
    (an affine map commutes with interpolation), and a linear layer that ends it loses its bias.

    Args:
        function: Maps (n, ...) to (n, ...); output dimensions after the first are flattened to C outputs.
        points: (N, ...) floating point, in the format in which ``function`` is to be called.
        num_interpolation: Uniform values of t, both ends included; 3 or more.
        quadrature: Evaluate ``function`` at this many inner points of each segment, fewer than those between its ends, which
            with their weights stand for the sums over all ``num_interpolation`` values of t: the Gauss-Lobatto rule of those,
            exact for polynomials of a degree up to twice this number and one. ``None``: at every one. With 5 the linear
            mapping numbers of small trained networks came within 1.7% of those of all 19, with 3 within 5.1%, with 2
            within 13.1% (benchmarks/results/precision.md).
        memory_limit: Bytes that a chunk of segments may take, the activations inside ``function`` included; one segment
            at a time if even that takes more. The result and :math:`f(x)` of the N points come on top.
        rank: Which share of the pairs to measure.
        world_size: Number of shares. The results of all ranks sum to the whole matrix.

    Returns:
        (N, N) float64, symmetric, entries in [0, 1]. A row is NaN where the function is not finite.

    Raises:
        ValueError: If an argument is not as described.

    Cost:
        N (N - 1) / 2 segments x (``num_interpolation`` - 2, or ``quadrature``) evaluations of ``function`` (or of what lies
        after its leading affine layers), divided by ``world_size``; about 2 us a segment on one core for 100 hidden units
        and 30 outputs.

    Source:
        Liu, Zhong, Tegmark 2023, section 2, arXiv 2310.05918.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import linear_connectivity
        >>> linear_connectivity(torch.relu, torch.tensor([[-1.0], [-0.5], [1.0]]))
        tensor([[1.0000, 1.0000, 0.7989],
                [1.0000, 1.0000, 0.9220],
                [0.7989, 0.9220, 1.0000]], dtype=torch.float64)
    """
    check_points(points)
    if num_interpolation < 3:
        raise ValueError(f"`num_interpolation` must be 3 or more (two points are always on a line), got {num_interpolation}")
    if quadrature is not None and quadrature < 1:
        raise ValueError(f"`quadrature` must be 1 or more, or None, got {quadrature}")
    if memory_limit <= 0:
        raise ValueError(f"`memory_limit` must be a positive number of bytes, got {memory_limit}")
    _check_share(rank, world_size)
    with torch.no_grad():
        segments = _Segments(function, points, num_interpolation, quadrature, memory_limit)
        num_points = len(points)
        connectivity = to_double(torch.zeros(num_points, num_points, device=points.device))
        if rank == 0:
            connectivity.fill_diagonal_(1.0)
            connectivity.diagonal()[~segments.values.isfinite().all(-1)] = torch.nan
        for first, second in _pairs(num_points, _BLOCK * segments.chunk, rank, world_size, points.device):
            linearity = segments.linearity(first, second)
            connectivity[first, second] = linearity
            connectivity[second, first] = linearity
    return connectivity


def linear_mapping_number(connectivity: Tensor) -> Tensor:
    r"""Linear mapping number of a connectivity matrix: the exponential of its spectrum's entropy.

    .. math::
        \text{LMN} = 2^S, \qquad S = -\sum_i p_i \log_2 p_i, \qquad p_i = |e_i| / \sum_j |e_j|

    with :math:`e` the eigenvalues of the symmetric matrix. It is 1 if all segments are linear, c if the points fall into c
    equal groups with linear segments within and none between, N if no segment is linear at all. The matrix is not
    positive semi-definite (up to a third of its eigenvalues are slightly negative), hence the absolute values.

    It depends on the number of samples (many weak links make a bulk of small eigenvalues): compare values at one N only.

    Args:
        connectivity: (..., N, N) symmetric, from :func:`linear_connectivity`.

    Returns:
        (...) float64, in [1, N]; NaN where the matrix holds a value that is not finite.

    Raises:
        ValueError: If the matrix is not square, has no entry or is complex.

    Cost:
        Eigenvalues of an N x N matrix, 0.1 s at N = 800.

    Source:
        Liu, Zhong, Tegmark 2023, section 2, arXiv 2310.05918.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import linear_mapping_number
        >>> linear_mapping_number(torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)))
        tensor(2.0000, dtype=torch.float64)
    """
    if connectivity.ndim < 2 or connectivity.shape[-1] != connectivity.shape[-2] or connectivity.shape[-1] == 0:
        raise ValueError(f"`connectivity` must be a square matrix with an entry, got shape {tuple(connectivity.shape)}")
    if connectivity.is_complex():
        raise ValueError(f"`connectivity` must be real, got {connectivity.dtype}")
    matrix = to_double(connectivity)
    finite = matrix.isfinite().all(-1).all(-1)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], matrix, 0.0)).abs()
    return entropy(eigenvalues / eigenvalues.sum(-1, keepdim=True)).exp()


@dataclass(frozen=True)
class LinearMappingEstimate:
    """Linear mapping numbers of random subsets of the points, and what they say together.

    Attributes:
        samples: (R,) float64, one linear mapping number per subset.
    """

    samples: Tensor

    @property
    def value(self) -> Tensor:
        """Mean over the subsets."""
        return self.samples.mean()

    @property
    def standard_error(self) -> Tensor:
        """Standard error of :attr:`value`; NaN for a single subset."""
        if len(self.samples) == 1:
            return torch.full_like(self.samples[0], torch.nan)
        return self.samples.std() / math.sqrt(len(self.samples))


def linear_mapping_number_estimate(
    function: Callable[[Tensor], Tensor],
    points: Tensor,
    num_samples: int = 200,
    repeats: int = 8,
    *,
    seed: int = 0,
    num_interpolation: int = 21,
    memory_limit: int = 256 * 2**20,
    rank: int = 0,
    world_size: int = 1,
) -> LinearMappingEstimate:
    r"""Linear mapping number at ``num_samples`` samples, from random subsets of many points, with its standard error.

    The linear mapping number of n samples is a number about the network and n: it grows with n, by a bulk of small
    eigenvalues that never converges. So the estimate is of

    .. math::
        \mathbb{E}_{S \subset \{1..N\}, |S| = n} \text{LMN}(L_{SS})

    the mean over all subsets of n points, of which it is an unbiased estimate for any n, N and number of subsets. It is
    *not* an estimate of the number of all N points, which is larger; but unlike that it may be compared between data
    sets of different size, and it takes about :math:`R (n / N)^2` of the time.

    Subsets are cut from random permutations of the points, so they are disjoint as long as :math:`R n \le N`. The standard
    error is exact for what fresh points of the same distribution would give, and (disjoint subsets being slightly
    anticorrelated) on the safe side for the mean over subsets of these very points.

    Args:
        function: As in :func:`linear_connectivity`.
        points: (N, ...) as in :func:`linear_connectivity`.
        num_samples: n, the size of a subset.
        repeats: R, the number of subsets.
        seed: Which subsets; the global random state is neither read nor changed.
        num_interpolation: As in :func:`linear_connectivity`.
        memory_limit: As in :func:`linear_connectivity`.
        rank: Which share of the subsets to measure; the other entries of ``samples`` are 0.
        world_size: Number of shares. The ``samples`` of all ranks sum to the whole.

    Returns:
        The linear mapping number of each subset; ``value`` and ``standard_error`` of the mean are its properties.

    Raises:
        ValueError: If an argument is not as described.

    Cost:
        R n (n - 1) / 2 segments.

    Source:
        Our choice; the paper measures all training inputs.

    Example:
        >>> import torch
        >>> from grok_callbacks.functional import linear_mapping_number_estimate
        >>> points = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> estimate = linear_mapping_number_estimate(torch.relu, points, num_samples=50, repeats=4)
        >>> print(f"{estimate.value:.2f} +- {estimate.standard_error:.2f}")
        2.42 +- 0.12
    """
    check_points(points)
    _check_share(rank, world_size)
    if not 1 <= num_samples <= len(points):
        raise ValueError(f"`num_samples` must be from 1 to the number of points ({len(points)}), got {num_samples}")
    if repeats < 1:
        raise ValueError(f"`repeats` must be 1 or more, got {repeats}")
    samples = to_double(torch.zeros(repeats, device=points.device))
    for index, subset in enumerate(_subsets(len(points), num_samples, repeats, seed)):
        if index % world_size == rank:
            chosen = points[subset.to(points.device)]
            connectivity = linear_connectivity(function, chosen, num_interpolation, memory_limit=memory_limit)
            samples[index] = linear_mapping_number(connectivity)
    return LinearMappingEstimate(samples)


def check_points(points: Tensor) -> None:
    """Raise ValueError unless ``points`` are (N, ...) floating point with at least one entry."""
    if points.ndim == 0 or points.numel() == 0:
        raise ValueError(f"`points` must be (N, ...) with an entry, got shape {tuple(points.shape)}")
    if not points.is_floating_point():
        raise ValueError(f"`points` must be floating point to lie on a segment, got {points.dtype}: pass embeddings")


class _Segments:
    """``function`` along the segments between points: what is common to all pairs is computed here, once."""

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        points: Tensor,
        num_interpolation: int,
        quadrature: int | None,
        limit: int,
    ) -> None:
        times, weights = _rule(num_interpolation, quadrature)
        num_pairs = len(points) * (len(points) - 1) // 2
        # oneDNN takes some 7 MB when it is first used, for what a few rows win by it.
        self.multiply = _linear if num_pairs * (len(times) - 2) >= _MANY_ROWS else nn.functional.linear
        head, self.body, self.readout = _split(function, self.multiply)
        ends = head(points.clone())  # the first layers may work in place
        self.format = ends.dtype
        # Half precision has too few digits to interpolate in; the function still gets its own format.
        self.ends = ends.to(torch.promote_types(ends.dtype, torch.float32))

        tilt = (times - 0.5) / (weights @ (times - 0.5).square()).sqrt()
        self.times = times[1:-1].to(self.ends).reshape(-1, *[1] * self.ends.ndim)

        footprint = _Footprint()
        few = min(len(points), 16)
        with footprint:
            probe = self._evaluate(ends[None, :few].clone())
        # Beside what the body holds: the path and its copy in the body's format, the outputs widened and less the chord.
        row = footprint.peak // few + 2 * self.ends[0].nbytes + 2 * to_double(probe[0, 0]).nbytes
        target = min(limit, _CACHE * torch.get_num_threads()) if points.device.type == "cpu" else limit
        rows = target // max(row, 1)
        self.chunk = max(1, min(rows // (len(times) - 2), num_pairs))

        values = torch.cat([self._evaluate(part[None].clone())[0] for part in torch.split(ends, max(1, rows))])
        scale = values.abs().where(values.isfinite(), 0.0).amax(0)
        self.precise = values.dtype == torch.float64 or _leaves_float32(scale)
        self.values = self._widen(values)
        sums = torch.finfo(torch.promote_types(values.dtype, torch.float32)).eps
        noise = _ROUNDING_NOISE * footprint.epsilon + _SUM_NOISE * sums
        self.floor = num_interpolation * (noise * self._widen(scale)).square()
        self.value_times = times[1:-1].to(self.values)[:, None, None]
        # Orthonormal under the weights: the mean, and the slope in t.
        level = torch.full_like(times, num_interpolation**-0.5)
        self.contrasts = (weights * torch.stack([level, tilt]))[:, 1:-1].to(self.values)
        self.weights = weights[1:-1].to(self.values)
        self.rise = float((weights * tilt) @ times)
        self.path = self.ends.new_empty(len(times) - 2, self.chunk, *ends.shape[1:])
        self.bend = self.values.new_empty(len(times) - 2, self.chunk, values.shape[-1])

    def linearity(self, first: Tensor, second: Tensor) -> Tensor:
        """(P,) mean over outputs of r^2 along the segments from points ``first`` (P,) to points ``second`` (P,)."""
        chunks = zip(torch.split(first, self.chunk), torch.split(second, self.chunk), strict=True)
        return torch.cat([self._chunk_linearity(start, end) for start, end in chunks])

    def _chunk_linearity(self, first: Tensor, second: Tensor) -> Tensor:
        path = _part(self.path, first)
        torch.lerp(self.ends.index_select(0, first), self.ends.index_select(0, second), self.times, out=path)
        inner = self._widen(self._evaluate(path.to(self.format)))
        start, end = self.values.index_select(0, first), self.values.index_select(0, second)
        # r^2 = 1 - residual / total. Measured from the chord, which has no residual and which the outputs leave and meet
        # at the ends of the segment, sums of squares lose no digits to an offset of y, nor 1 - r^2 to a slope.
        bend = torch.lerp(start, end, self.value_times, out=_part(self.bend, first))
        torch.sub(inner, bend, out=bend)
        level, tilt = (self.contrasts @ bend.flatten(1)).view(2, *start.shape)
        squares = (self.weights @ bend.square_().flatten(1)).view(start.shape)
        residual = (squares - level.square() - tilt.square()).clamp(min=0.0)
        total = residual + (tilt + self.rise * (end - start)).square()
        share = torch.where(residual <= self.floor, 0.0, residual / total)
        return 1.0 - to_double(share).mean(-1)

    def _evaluate(self, path: Tensor) -> Tensor:
        """(T, P, ...) inputs of the body to (T, P, C) outputs."""
        lead = path.shape[:2]
        rows = self.body(path.flatten(0, 1))
        if not isinstance(rows, Tensor) or rows.ndim == 0 or len(rows) != lead.numel() or rows.numel() == 0:
            shape = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"`function` must map ({lead.numel()}, ...) to ({lead.numel()}, ...), got {shape}")
        if rows.is_complex():
            raise ValueError("`function` must have real outputs")
        if not rows.is_floating_point():
            rows = to_double(rows)
        if self.readout is None:
            return rows.reshape(*lead, -1)
        return self.multiply(rows, self.readout).reshape(*lead, -1)

    def _widen(self, values: Tensor) -> Tensor:
        return to_double(values) if self.precise else values.float()


def _split(
    function: Callable[[Tensor], Tensor], multiply: Callable[..., Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor | None]:
    """Affine layers that begin a Sequential, what follows, and the weight of a linear layer that ends it."""
    layers = _layers(function)
    if layers is None:
        return nn.Identity(), function, None
    count = 0
    while count < len(layers) and _is_plain(layers[count], _AFFINE):
        count += 1
    head, body = layers[:count], layers[count:]
    readout = None
    if body and _is_plain(body[-1], (nn.Linear,)):
        readout = body.pop().weight
    return _Chain(head), _Chain(_quickened(body, multiply)), readout


def _layers(function: Any) -> list[Any] | None:
    """The layers of a (nested) plain Sequential in order; None for anything else."""
    if not _is_plain(function, (nn.Sequential,)):
        return None
    layers = []
    for layer in function:
        layers += _layers(layer) or [layer]
    return layers


def _is_plain(module: Any, types: Iterable[type]) -> bool:
    """Whether ``module`` computes just what its exact type does: subclasses and hooks may do anything."""
    return type(module) in types and not (module._forward_hooks or module._forward_pre_hooks)


def _quickened(layers: list[Any], multiply: Callable[..., Tensor]) -> list[Callable[[Tensor], Tensor]]:
    """The same layers, with activations in place where nobody else sees their input, which saves a fresh chunk each."""
    result: list[Callable[[Tensor], Tensor]] = []
    private = True  # the first layer gets a path that is written anew for each chunk
    for layer in layers:
        linear = _is_plain(layer, (nn.Linear,))
        if linear:
            result.append(partial(multiply, weight=layer.weight, bias=layer.bias))
        elif private and _is_plain(layer, _IN_PLACE):
            result.append(_IN_PLACE[type(layer)])
        else:
            result.append(layer)
        private = linear
    return result


class _Chain:
    """Calls layers one after another."""

    def __init__(self, layers: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self.layers = layers

    def __call__(self, rows: Tensor) -> Tensor:
        for layer in self.layers:
            rows = layer(rows)
        return rows


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(n, ..., K) times (C, K) plus (C,) to (n, ..., C)."""
    if rows.ndim == 2 and rows.device.type == "cpu" and rows.dtype == weight.dtype == torch.float32:
        # The same product, as a 1x1 convolution over channels-last images: oneDNN's is two to four times faster than a
        # matrix product of MKL where the number of outputs is no multiple of a vector, or the processor not Intel's. It
        # is chosen for 16 images or more, so the rows are dealt out to that many.
        images = next((count for count in range(16, 64) if len(rows) % count == 0), 1)
        image = rows.view(images, -1, 1, rows.shape[1]).permute(0, 3, 1, 2)
        return nn.functional.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1).reshape(len(rows), -1)
    return nn.functional.linear(rows, weight, bias)


class _Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Measures the most bytes of new tensors alive at one time, and the coarsest rounding of any number format."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.epsilon = 0.0
        self._alive = 0
        self._users: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, given)
        return result

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        if tensor.is_floating_point():
            self.epsilon = max(self.epsilon, torch.finfo(tensor.dtype).eps)
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in given and not self._users[key]:
            return  # a view of what was there before, such as a transposed weight
        self._users[key] += 1
        if self._users[key] == 1:
            self._alive += size
            self.peak = max(self.peak, self._alive)
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            self._alive -= size


def _part(buffer: Tensor, pairs: Tensor) -> Tensor:
    """As many contiguous columns of a (T, P, ...) buffer as there are pairs."""
    shape = (len(buffer), len(pairs), *buffer.shape[2:])
    return buffer.view(-1)[: math.prod(shape)].view(shape)


def _leaves_float32(scale: Tensor) -> bool:
    """Whether squares of values of these scales leave the range of float32."""
    nonzero = scale[scale > 0]
    return bool(((nonzero < _FLOAT32_RANGE[0]) | (nonzero > _FLOAT32_RANGE[1])).any())


def _pairs(count: int, chunk: int, rank: int, world_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Index pairs i < j of this rank's share, in chunks, without listing them all."""
    total = count * (count - 1) // 2
    start, stop = total * rank // world_size, total * (rank + 1) // world_size
    rows = torch.arange(count, device=device)
    before = rows * (2 * count - rows - 1) // 2  # pairs whose first index is smaller
    for low in range(start, stop, chunk):
        flat = torch.arange(low, min(low + chunk, stop), device=device)
        first = torch.searchsorted(before, flat, right=True) - 1
        # The last index has no pair of its own, so `before` ends in two equal entries that no pair reaches.
        yield first, flat - before[first] + first + 1


def _subsets(count: int, size: int, repeats: int, seed: int) -> Iterator[Tensor]:
    """``repeats`` index sets of ``size``, cut from successive random permutations."""
    generator = torch.Generator().manual_seed(seed)
    while repeats > 0:
        permutation = torch.randperm(count, generator=generator)
        blocks = min(repeats, count // size)
        yield from torch.split(permutation[: blocks * size], size)
        repeats -= blocks


def _rule(num_interpolation: int, quadrature: int | None) -> tuple[Tensor, Tensor]:
    """Values of t, 0 and 1 among them, and how often each counts in a sum over ``num_interpolation`` uniform ones."""
    times = torch.linspace(0, 1, num_interpolation, dtype=torch.float64)
    if quadrature is None or quadrature >= num_interpolation - 2:
        return times, torch.ones_like(times)
    # Gauss and Lobatto: the inner nodes are the zeros of the polynomial that is orthogonal to all lower ones under
    # t (1 - t), which are the eigenvalues of multiplication by t on these; Lanczos makes an orthonormal basis of them.
    basis = [(times * (1 - times)).sqrt()]
    for _ in range(quadrature - 1):
        basis.append((times - 0.5) * (basis[-1] / basis[-1].norm()))
        for earlier in basis[:-1]:
            basis[-1] = basis[-1] - earlier * (earlier @ basis[-1]) / (earlier @ earlier)
    vectors = torch.stack([vector / vector.norm() for vector in basis])
    inner = torch.linalg.eigvalsh((vectors * (times - 0.5)) @ vectors.T)
    nodes = torch.cat([inner.new_tensor([-0.5]), inner, inner.new_tensor([0.5])])
    powers = torch.arange(len(nodes))[:, None]
    weights = torch.linalg.solve(nodes**powers, ((times - 0.5) ** powers).sum(1))
    return nodes + 0.5, weights


def _check_share(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"`rank` must be from 0 to `world_size` - 1, got rank {rank} of {world_size}")

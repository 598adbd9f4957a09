"""Linear mapping number over many batches or ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from grok_callbacks.functional.lmn import check_points, linear_connectivity, linear_mapping_number


class LinearMappingNumber(Metric):
    """Number of linear maps that a function amounts to on a set of points.

    :func:`~grok_callbacks.functional.linear_mapping_number` of
    :func:`~grok_callbacks.functional.linear_connectivity`. Over k updates or ranks it is the number at all their points
    together: the state holds the points as they come, and the function is evaluated between all of them in
    :meth:`compute`. It is therefore the function as it is *then* that is measured: points that are activations of a
    network belong with the rest of that network at one step of its training; ``reset`` in between.

    The function is not part of the state, and no submodule: moving, resetting or saving the metric leaves it alone.
    Copies of the metric (``clone``, pickling) carry a copy of it.

    Under DDP: sharded. Each rank gives it other points (or the same: the number does not change when every point is
    repeated, though it takes longer). In ``compute`` every rank measures its share of all pairs.

    Args:
        function: Maps (n, ...) to (n, ...), as in :func:`~grok_callbacks.functional.linear_connectivity`; none for a metric
            that is given one for the time of a measurement by :meth:`measuring`.
        num_interpolation: Uniform values of t along each segment.
        memory_limit: Bytes that a chunk of segments may take.
        quadrature: Inner points of a rule for the sums over t, as in :func:`~grok_callbacks.functional.linear_connectivity`.
        kwargs: Of :class:`torchmetrics.Metric`.

    Attributes:
        connectivity: (N, N) matrix of the last ``compute``, None before.

    Cost:
        N (N - 1) / 2 segments, divided by the number of ranks.

    Example:
        >>> import torch
        >>> metric = LinearMappingNumber(torch.relu)
        >>> metric.update(torch.tensor([[-1.0], [-0.5]]))
        >>> metric.update(torch.tensor([[1.0]]))
        >>> metric.compute()
        tensor(1.3472, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    distribution: ClassVar[str] = "sharded"

    points: list[Tensor] | Tensor
    connectivity: Tensor | None

    def __init__(
        self,
        function: Callable[[Tensor], Tensor] | None = None,
        num_interpolation: int = 21,
        memory_limit: int = 256 * 2**20,
        quadrature: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._function = (
            None if function is None else (function,)
        )  # in a tuple, or a network would become a submodule of the metric
        self.num_interpolation = num_interpolation
        self.quadrature = quadrature
        self.memory_limit = memory_limit
        self.connectivity = None
        self.add_state("points", [], dist_reduce_fx="cat")

    def update(self, points: Tensor) -> None:
        """Add points.

        Args:
            points: (n, ...) floating point, in the format in which the function is to be called.

        Raises:
            ValueError: If they are not floating point, or none.
        """
        check_points(points)
        assert isinstance(self.points, list)
        self.points.append(points.detach())

    def compute(self) -> Tensor:
        """Linear mapping number at all points seen.

        Raises:
            RuntimeError: If the metric has no function.
        """
        if not (self._is_synced and dist.is_available() and dist.is_initialized()):
            return self.compute_share(0, 1, lambda matrix: matrix)

        def all_reduce(matrix: Tensor) -> Tensor:
            dist.all_reduce(matrix, group=self.process_group)
            return matrix

        return self.compute_share(dist.get_rank(self.process_group), dist.get_world_size(self.process_group), all_reduce)

    def compute_share(self, rank: int, world_size: int, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """:meth:`compute` where all ranks hold the same points: each measures its share of the pairs.

        Args:
            rank: Which share to measure.
            world_size: Number of shares.
            all_reduce: Sums a matrix over ranks and returns the sum.
        """
        if self._function is None:
            raise RuntimeError("The metric has no function: give it one, or compute within `measuring`.")
        share = linear_connectivity(
            self._function[0],
            dim_zero_cat(self.points),
            self.num_interpolation,
            quadrature=self.quadrature,
            memory_limit=self.memory_limit,
            rank=rank,
            world_size=world_size,
        )
        self.connectivity = all_reduce(share)
        return linear_mapping_number(self.connectivity)

    @contextmanager
    def measuring(self, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Measure this function for as long as the context lasts, such as a network that is training."""
        before, self._function = self._function, (function,)
        try:
            yield
        finally:
            self._function = before

    def reset(self) -> None:
        """Forget all points and the last matrix."""
        super().reset()
        self.connectivity = None

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one value or several: see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

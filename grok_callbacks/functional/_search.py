"""The search for the shortest description: along rays of one threshold each, on which the bin size grows.

The size of a description is known without asking the network, from the entropy of its codes; the loss costs a pass over
the data. So the search asks for losses only where they decide something: it follows one ray to the bin size where the
loss leaves its allowance, then looks on other rays at the bin size that would give a shorter description than that,
and follows those on which the loss allows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grok_callbacks.functional._coarse import MAX_CODE, Network, Plan, round_to_float32

# Bin sizes are 2^(i/64), thresholds t/40.
_PER_OCTAVE = 64
_THRESHOLDS = 40
# Exponents of single tensors are in quarters of an octave.
_PER_QUARTER = _PER_OCTAVE // 4
# Steps between thresholds: of the way to the region of short descriptions, and within it.
_COARSE_STEP = 4
_STEPS = (2, 1)
# Steps of the bin size between predicted sizes, where none is known yet; sizes this close to the one sought will do.
_STRIDE = 48
_CLOSE = 0.98
# Bits for each number where a search begins.
_FIRST_BITS = 3.5
# A loss is taken to grow like this power of the bin size until two points on a ray say otherwise.
_LOSS_POWER = 2.5
_POWER_RANGE = (1.0, 8.0)
# The next guess aims at this share of the allowance; distortions below the floor, a share as well, say no more than that.
_AIM = 0.85
_FLOOR = 1e-3
# A ray on which the loss falls more slowly than this power of the bin size, far from the allowance, is given up.
_FLAT_POWER = 0.5
# Furthest that a guess goes from what is known, in octaves down and up.
_REACH = (4, 2)
# Steps of the bin size that end a first and a final approach to the allowance; losses that a first one may take.
_TOLERANCE, _FINAL_TOLERANCE = 16, 3
_FIRST_LOSSES = 2
# How far beyond the boundary to look once more, as long as the distortion is within this multiple of the allowance.
_JUMPS = (6,)
_NEARLY = 1.2
# How much shorter a ray must promise to be to be followed.
_GAIN = 0.98
# Where the distortion is beyond this multiple of the allowance at equal size, nothing shorter is sought.
_HOPELESS = 20.0
# What bzip2 gains at most where codes differ in the highest byte.
_ALIGNED_GAIN = 1.06
# Tensors below this share of all numbers are measured together when bin sizes are shared out; distortions below this
# part of a tensor's share are taken for that.
_SMALL = 0.02
_LEAST_SHARE = 0.02
# Smaller peaks count as zero: bin sizes must be float32.
_LEAST_PEAK = 2.0**-100
# Furthest that the first and the second measurement move a bin size, in quarters of an octave.
_FAR, _NEAR = 24, 4


class Oracle:
    """Losses of coarse networks, remembered, and split over ranks.

    With several ranks each evaluates its part of a batch, and the results are summed over ranks, the others
    contributing zero. A batch is what is needed now, filled up with what may be needed next; so every rank, and a single
    process, takes the same decisions from the same losses.
    """

    def __init__(
        self,
        network: Network,
        loss: Callable[[dict[str, Tensor]], Tensor | float],
        rank: int,
        world_size: int,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.network = network
        self.loss = loss
        self.rank = rank
        self.world_size = world_size
        self.reduce = reduce
        self.known: dict[Plan | None, float] = {}
        self.evaluations = 0

    def __call__(self, needed: Sequence[Plan | None], spare: Sequence[Plan] = ()) -> list[float]:
        """Losses of ``needed`` plans, ``None`` being the network as it is; ranks without work take those of ``spare``."""
        batch = [plan for plan in dict.fromkeys(needed) if plan not in self.known]
        if batch:
            room = -len(batch) % self.world_size
            batch += [plan for plan in dict.fromkeys(spare) if plan not in self.known and plan not in batch][:room]
            self.known.update(zip(batch, self._share(batch), strict=True))
        return [self.known[plan] for plan in needed]

    def _evaluate(self, plan: Plan | None) -> float:
        weights = dict(self.network.weights) if plan is None else self.network.restore(self.network.code(plan))
        self.evaluations += 1
        with torch.no_grad():
            value = self.loss(weights)
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"loss must return one number, got a tensor of shape {tuple(value.shape)}")
        return float(value)

    def _share(self, batch: Sequence[Plan | None]) -> list[float]:
        if self.reduce is None:
            return [self._evaluate(plan) for plan in batch]
        results = torch.zeros(len(batch) + 1, dtype=torch.float64)
        failure: Exception | None = None
        for place in range(self.rank, len(batch), self.world_size):
            try:
                results[place] = self._evaluate(batch[place])
            except Exception as error:  # the others wait in the reduction: fail after it, together
                failure, results[-1] = error, 1.0
                break
        results = self.reduce(results)
        if failure is not None:
            raise failure
        if results[-1] != 0:
            raise RuntimeError("the loss failed on another rank")
        return [float(value) for value in results[:-1]]


@dataclass
class Ray:
    """Coarse networks of one threshold: predicted bits and distortions by the index of the bin size."""

    threshold: float
    sizes: dict[int, float] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A place of the search: ray, index of the bin size, predicted bits."""

    ray: int
    index: int
    bits: float


class Search:
    """Finds, for one allowance after another, plans of few bits whose distortion stays below it.

    Args:
        network: What is coarse-grained.
        oracle: Gives losses.
        excess: Turns a loss into its distortion.
        exponents: By tensor, see :class:`Plan`.
    """

    def __init__(self, network: Network, oracle: Oracle, excess: Callable[[float], float], exponents: tuple[int, ...]) -> None:
        self.network = network
        self.oracle = oracle
        self.excess = excess
        self.exponents = exponents
        self.rays: dict[int, Ray] = {}
        self._canonical: dict[tuple[int | None, ...], int] = {}
        self._squares = {index: float(matrix.values.square().sum()) for index, matrix in network.matrices.items()}
        # From the top on, a power of two, everything rounds to zero; at the bottom codes are as large as they may be.
        peaks = [
            _PER_OCTAVE * math.log2(max(matrix.peak, _LEAST_PEAK)) - _PER_QUARTER * (exponents[index] if exponents else 0)
            for index, matrix in network.matrices.items()
        ]
        self.top = math.ceil((max(peaks, default=0.0) + 1) / _PER_OCTAVE + 1) * _PER_OCTAVE
        self.bottom = math.ceil(max(peaks, default=0.0) - _PER_OCTAVE * math.log2(MAX_CODE))
        self._hint = self.top
        self._last: int | None = None
        self._full = self.ray(_THRESHOLDS)

    # --- places ---

    def ray(self, step: int) -> int:
        """The ray of a threshold, in fortieths: thresholds that keep the same ranks are one ray."""
        signature = self.network.signature(step / _THRESHOLDS)
        if all(rank is None for rank in signature):
            step = _THRESHOLDS
        step = self._canonical.setdefault(signature, step)
        self.rays.setdefault(step, Ray(round_to_float32(step / _THRESHOLDS)))
        return step

    def _neighbours(self, ray: int, step: int) -> list[int]:
        """The next rays below and above, at least ``step`` away."""
        found = []
        for direction in (-step, step):
            place = ray + direction
            while 0 <= place <= _THRESHOLDS and self.ray(place) == ray:
                place += direction
            if 0 <= place <= _THRESHOLDS:
                found.append(self.ray(place))
        return found

    def plan(self, ray: int, index: int) -> Plan:
        """The plan at a place."""
        return Plan(round_to_float32(2 ** (index / _PER_OCTAVE)), self.rays[ray].threshold, self.exponents)

    def size(self, ray: int, index: int) -> float:
        """Predicted bits at a place."""
        sizes = self.rays[ray].sizes
        if index not in sizes:
            sizes[index] = self.network.bits(self.plan(ray, index))
        return sizes[index]

    def error(self, ray: int, index: int) -> float:
        """Sum over tensors of the relative squared error."""
        plan = self.plan(ray, index)
        return sum(self.network.error(plan, tensor) / square for tensor, square in self._squares.items() if square > 0)

    def shorter(self, ray: int, bits: float) -> int:
        """About the finest bin size on a ray whose size is predicted below ``bits``, interpolating the log sizes."""
        sizes, target = self.rays[ray].sizes, math.log1p(bits)
        known = min(sizes, key=lambda index: abs(math.log1p(sizes[index]) - target), default=self._hint)
        low = high = min(max(known, self.bottom), self.top)
        while low > self.bottom and self.size(ray, low) < bits:
            low, high = max(low - _STRIDE, self.bottom), low
        while high < self.top and self.size(ray, high) >= bits:
            low, high = high, min(high + _STRIDE, self.top)
        while high - low > 1 and self.size(ray, high) < _CLOSE * bits and self.size(ray, low) >= bits:
            finer, coarser = math.log1p(self.size(ray, low)), math.log1p(self.size(ray, high))
            share = (finer - target) / (finer - coarser)
            middle = min(max(low + math.ceil(share * (high - low)), low + 1), high - 1)
            low, high = (low, middle) if self.size(ray, middle) < bits else (middle, high)
        self._hint = high
        return high

    def loss(self, ray: int, index: int, spare: Sequence[tuple[int, int]] = ()) -> float:
        """Distortion at a place; ``spare`` are places that may be asked for next."""
        losses = self.rays[ray].losses
        if index not in losses:
            others = [self.plan(*place) for place in spare if self.bottom <= place[1] <= self.top]
            distortion = self.excess(self.oracle([self.plan(ray, index)], others)[0])
            losses[index] = math.inf if math.isnan(distortion) else distortion
        return losses[index]

    # --- one ray ---

    def _bracket(self, ray: int, allowance: float) -> tuple[int | None, int | None]:
        """The coarsest bin size known to be allowed, and the finest beyond it known not to be."""
        losses = self.rays[ray].losses
        inside = max((index for index, loss in losses.items() if loss < allowance), default=None)
        outside = [index for index in losses if losses[index] >= allowance and (inside is None or index > inside)]
        return inside, min(outside, default=None)

    def _log_ratio(self, ray: int, index: int, allowance: float) -> float:
        """Logarithm of the distortion over what a guess aims at."""
        loss = min(max(self.rays[ray].losses[index], _FLOOR * allowance), 1e6 * allowance)
        return math.log2(loss / (_AIM * allowance))

    def _power(self, ray: int, allowance: float) -> float:
        """Slope of the log distortion against the log bin size, from the two known points about the allowance."""
        inside, outside = self._bracket(ray, allowance)
        if inside is None or outside is None:
            losses = self.rays[ray].losses
            points = sorted(losses, key=lambda index: abs(self._log_ratio(ray, index, allowance)))[:2]
        else:
            points = [inside, outside]
        if len(points) < 2:
            return _LOSS_POWER
        first, second = (self._log_ratio(ray, index, allowance) for index in points)
        power = (second - first) / ((points[1] - points[0]) / _PER_OCTAVE)
        # Far outside the loss saturates, and says less about the way down than experience does.
        return min(max(power, _LOSS_POWER if inside is None else _POWER_RANGE[0]), _POWER_RANGE[1])

    def _is_flat(self, ray: int, allowance: float) -> bool:
        """Whether finer bin sizes hardly help any more on a ray that nothing is allowed on: its rank is too low."""
        finest = sorted(self.rays[ray].losses.items())[:2]
        if len(finest) < 2 or ray == self._full:
            return False
        (finer, low), (coarser, high) = finest
        fall = math.log2(max(high, allowance) / max(low, allowance)) / ((coarser - finer) / _PER_OCTAVE)
        return fall < _FLAT_POWER

    def _guess(self, ray: int, allowance: float, tolerance: int) -> int | None:
        """The next bin size to try on a ray, or ``None`` where the boundary is known well enough."""
        inside, outside = self._bracket(ray, allowance)
        if inside is None:
            if outside is None or outside <= self.bottom or self._is_flat(ray, allowance):
                return None
        elif inside >= self.top or (outside is not None and outside - inside <= tolerance):
            return None
        elif outside is None and self.rays[ray].losses[inside] <= _FLOOR * allowance:
            return self.top
        if inside is not None and outside is not None and outside - inside <= _TOLERANCE:
            return (inside + outside) // 2
        # That everything rounds to zero at the top says nothing of where the boundary is.
        known = [index for index in (inside, outside) if index is not None and (index < self.top or inside is None)]
        nearest = min(known, key=lambda index: abs(self._log_ratio(ray, index, allowance)))
        shift = -self._log_ratio(ray, nearest, allowance) / self._power(ray, allowance)
        guess = nearest + round(min(max(shift, -_REACH[0]), _REACH[1]) * _PER_OCTAVE)
        margin = max(1, tolerance // 2)
        if inside is not None and outside is not None:
            margin = min(max(margin, (outside - inside) // 6), (outside - inside) // 2)
        low = self.bottom if inside is None else min(inside + margin, self.top)
        high = self.top if outside is None else max(outside - margin, self.bottom)
        return min(max(guess, low), high)

    def follow(self, ray: int, allowance: float, tolerance: int, limit: float = math.inf) -> Found | None:
        """Go along a ray, from the places known on it, to the coarsest bin size that is allowed.

        With a limit on the losses, some more are spent as long as all of them are allowed.
        """
        while (guess := self._guess(ray, allowance, tolerance)) is not None:
            inside, outside = self._bracket(ray, allowance)
            if limit <= (0 if outside is not None else -_FIRST_LOSSES):
                break
            limit -= 1
            low = guess - _PER_OCTAVE if inside is None else inside
            high = guess + _PER_OCTAVE if outside is None else outside
            self.loss(ray, guess, [(ray, (low + guess) // 2), (ray, (guess + high + 1) // 2)])
        inside, _ = self._bracket(ray, allowance)
        return None if inside is None else Found(ray, inside, self.size(ray, inside))

    def _jump(self, ray: int, allowance: float) -> None:
        """Look a little beyond the boundary: the loss is not quite monotone, and may come back below the allowance."""
        _, outside = self._bracket(ray, allowance)
        for jump in (0, *_JUMPS):
            if outside is None or outside + jump > self.top:
                return
            distortion = self.loss(ray, outside + jump, [(ray, outside + other) for other in _JUMPS])
            if distortion < allowance:
                self.follow(ray, allowance, _FINAL_TOLERANCE)
                return
            if distortion > _NEARLY * allowance:
                return

    # --- all rays ---

    def _probe(self, ray: int, bits: float, spare: Sequence[int] = ()) -> float:
        """Distortion on a ray where its description is just shorter than ``bits``."""
        places = [(other, self.shorter(other, bits)) for other in spare] if self.oracle.world_size > 1 else []
        return self.loss(ray, self.shorter(ray, bits), places)

    def _concentrated(self, best: Found) -> int:
        """The ray of least squared error at a size just below the best's."""
        bits = _GAIN * best.bits
        errors: dict[int, float] = {}

        def error(step: int) -> float:
            ray = self.ray(step)
            if ray not in errors:
                errors[ray] = math.inf if ray == self._full else self.error(ray, self.shorter(ray, bits))
            return errors[ray]

        place = _THRESHOLDS - 2 * _COARSE_STEP
        while place > 0 and error(place - 2 * _COARSE_STEP) < error(place):
            place -= 2 * _COARSE_STEP
        return self.ray(min((place, place - _COARSE_STEP, place + _COARSE_STEP), key=error))

    def _approach(self, start: int, best: Found, allowance: float) -> Found:
        """Downhill in distortion at the best's size from one ray to the next, until one allows a shorter description."""
        if start == best.ray:
            return best
        bits = _GAIN * best.bits
        here, value = start, self._probe(start, bits, self._neighbours(start, _COARSE_STEP))
        seen = {here, best.ray}
        while allowance <= value < _HOPELESS * allowance:
            fresh = [ray for ray in self._neighbours(here, _COARSE_STEP) if ray not in seen]
            seen.update(fresh)
            options = []
            for ray in fresh:
                options.append((self._probe(ray, bits, fresh), ray))
                if options[-1][0] < value:
                    break
            if not options or min(options)[0] >= value:
                return best
            value, here = min(options)
        return self._shorten(here, best, allowance) if value < allowance else best

    def _shorten(self, ray: int, best: Found, allowance: float) -> Found:
        """The better of the best and what a few losses on the ray find."""
        found = self.follow(ray, allowance, _TOLERANCE, _FIRST_LOSSES)
        return found if found is not None and found.bits < best.bits else best

    def _descend(self, best: Found, step: int, allowance: float) -> Found:
        """From ray to neighbouring ray as long as descriptions get shorter."""
        seen: set[int] = {best.ray, self._full}
        fresh = [ray for ray in self._neighbours(best.ray, step) if ray not in seen]
        while fresh:
            ray = fresh.pop(0)
            seen.add(ray)
            if self._probe(ray, _GAIN * best.bits, fresh) < allowance:
                best = self._shorten(ray, best, allowance)
                if best.ray == ray:
                    fresh = [other for other in self._neighbours(ray, step) if other not in seen]
        return best

    def _start(self) -> int:
        """Where to begin: a bin size at which a number takes some bits, or the one that was shared out."""
        if self.exponents:
            return min(max(0, self.bottom), self.top)
        count = sum(matrix.values.numel() for matrix in self.network.matrices.values())
        return self.shorter(self._full, _FIRST_BITS * count)

    def _first(self, allowance: float) -> Found | None:
        """A place to improve on: on the ray that was the best for the last allowance, or on the full one."""
        if self._last not in (None, self._full):
            best = self.follow(self._last, allowance, _TOLERANCE, _FIRST_LOSSES + 1)
            if best is not None:
                hopeful = self._probe(self._full, _GAIN * best.bits) < allowance
                return self._shorten(self._full, best, allowance) if hopeful else best
        if not self.rays[self._full].losses:
            self.loss(self._full, self._start())
        best = self.follow(self._full, allowance, _TOLERANCE)
        if best is None:
            return None
        if best.index >= self.top:  # zeros do: on the ray of rank zero not even they are stored
            self.loss(self.ray(0), self.top)
            return best
        start = self._concentrated(best) if self._last in (None, self._full) else self._last
        return self._approach(start, best, allowance)

    def run(self, allowance: float) -> list[Found]:
        """Allowed places of few predicted bits, at most one a ray and the best first; empty if there is none."""
        best = self._first(allowance)
        if best is None:
            return []
        if best.index < self.top:
            known = self._finalists(allowance)[0]  # what an earlier allowance came across may be better
            best = best if known.ray == best.ray else self._shorten(known.ray, known, allowance)
            for step in _STEPS:
                best = self._descend(best, step, allowance) if best.ray != self._full else best
            self.follow(best.ray, allowance, _FINAL_TOLERANCE)
            self._jump(best.ray, allowance)
        finalists = self._finalists(allowance)
        self._last = finalists[0].ray
        return finalists

    def _finalists(self, allowance: float) -> list[Found]:
        best: dict[int, Found] = {}
        for step, ray in self.rays.items():
            for index, loss in ray.losses.items():
                place = Found(step, index, self.size(step, index))
                if loss < allowance and (step not in best or place.bits < best[step].bits):
                    best[step] = place
        return sorted(best.values(), key=lambda place: place.bits)

    def aligned(self, best: Found, allowance: float) -> Found | None:
        """The next finer bin size at which codes 1 and 2 differ in the highest byte of a float32, if near and allowed.

        The lowest bit of a float32's exponent is in its second byte. Where the bin size lies between an even and an odd
        power of two, its double has another first byte, and bzip2 takes some percent less for the same codes.
        """
        octave = best.index // _PER_OCTAVE
        index = octave * _PER_OCTAVE - 1
        if octave % 2 == 0 or index < self.bottom or self.size(best.ray, index) > _ALIGNED_GAIN * best.bits:
            return None
        return Found(best.ray, index, self.size(best.ray, index)) if self.loss(best.ray, index) < allowance else None


def allocate(network: Network, oracle: Oracle, excess: Callable[[float], float], allowance: float) -> tuple[int, ...]:
    """Bin sizes by tensor that share the allowance so that a bit more buys the same everywhere.

    A tensor's distortion grows about with the square of its bin size, and an octave of it saves ``N_t`` bits, known from
    the entropy of the codes. The least bits for a given sum of distortions are where each tensor has its part of the
    allowance in proportion to ``N_t``. Each is made coarse on its own, at half its root mean square, to see how far from
    that it is, and once more nearer to it if it was far. Tensors too small to matter are measured together.

    Returns:
        For each tensor the exponent of its bin size, in quarters of an octave above 1; empty if all are zero.
    """
    matrices = {index: matrix for index, matrix in network.matrices.items() if matrix.values.any()}
    if not matrices:
        return ()
    total = sum(matrix.values.numel() for matrix in matrices.values())
    small = frozenset(index for index, matrix in matrices.items() if matrix.values.numel() < _SMALL * total)
    groups = [frozenset([index]) for index in matrices if index not in small] + ([small] if small else [])
    exponents = [0] * len(network.entries)
    for index, matrix in matrices.items():
        exponents[index] = round(4 * math.log2(float(matrix.values.square().mean().sqrt()) / 2))
    pending = groups
    for reach, far in ((_FAR, _NEAR), (_NEAR, math.inf)):
        losses = oracle([Plan(1.0, 1.0, tuple(exponents), only=group) for group in pending])
        saved = {group: _saved(network, group, exponents) for group in groups}
        everything = sum(saved.values())
        moved = []
        for group, loss in zip(pending, losses, strict=True):
            share = allowance * saved[group] / everything
            distortion = excess(loss)
            shift = -reach
            if math.isfinite(distortion):
                ideal = round(2 * math.log2(share / max(distortion, _LEAST_SHARE * share)))
                shift = min(max(ideal, -reach), reach)
            for index in group:
                exponents[index] += shift
            moved += [group] if abs(shift) > far else []
        pending = moved
    return tuple(exponents)


def _saved(network: Network, group: frozenset[int], exponents: Sequence[int]) -> float:
    """Bits that an octave of the bin size saves, about where it is."""
    finer, coarser = (network.bits(Plan(1.0, 1.0, tuple(exponent + move for exponent in exponents)), group) for move in (-2, 2))
    return max(finer - coarser, 1.0)

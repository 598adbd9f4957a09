"""Max pooling of the probe's passes beside torch's own, on the CPU.

``python -m benchmarks.pooling --output benchmarks/results/pooling.md``

Both give the same values, which is checked. Layers are those of small and of common convolutional networks; torch's own is as
quick where channels come last, and such images are left to it.
"""

from __future__ import annotations

import statistics

import torch
from torch import nn

from benchmarks._common import markdown, median_ratio, paired, parser, publish
from grok_callbacks._pooling import quick_pooling

_CASES = [
    ((256, 16, 8, 8), nn.MaxPool2d(2)),
    ((256, 32, 4, 4), nn.MaxPool2d(2)),
    ((64, 64, 32, 32), nn.MaxPool2d(2)),
    ((16, 64, 112, 112), nn.MaxPool2d(3, 2, 1)),
    ((64, 192, 27, 27), nn.MaxPool2d(3, 2)),
    ((64, 64, 16, 16), nn.MaxPool2d(16)),
    ((1, 1, 4, 4), nn.MaxPool2d(2)),
]


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(repeats=21)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    rows = [_row(shape, layer, arguments.repeats) for shape, layer in _CASES]
    header = ["images", "kernel, stride, padding", "torch ms", "ours ms", "times faster"]
    publish(markdown(header, rows), arguments.output, "python -m benchmarks.pooling")


@torch.no_grad()
def _row(shape: tuple[int, ...], layer: nn.MaxPool2d, repeats: int) -> list[object]:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def quick() -> torch.Tensor:
        with quick_pooling([layer]):
            return layer(images)  # type: ignore[no-any-return]

    if not torch.equal(layer(images), quick()):
        raise RuntimeError(f"{layer} came to other values.")
    own, ours = paired([lambda: layer(images), quick], repeats)
    times = [f"{1000 * statistics.median(seconds):.3f}" for seconds in (own, ours)]
    settings = f"{layer.kernel_size}, {layer.stride}, {layer.padding}"
    return [" x ".join(map(str, shape)), settings, *times, f"{median_ratio(own, ours):.2f}"]


if __name__ == "__main__":
    main()

"""Matrix entropy and mutual information in the smaller dimension against the direct n x n form."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks._common import markdown, median_ratio, paired, parser, publish
from grok_callbacks.functional import (
    feature_entropy,
    feature_mutual_information,
    gram_matrix,
    matrix_entropy,
    matrix_mutual_information,
)

ENTROPY_SHAPES = ((256, 128), (512, 128), (1024, 128), (2048, 128), (1024, 10), (1024, 113), (512, 2048))
INFORMATION_SHAPES = ((512, 16, 10), (1024, 16, 10), (2048, 16, 10), (2048, 32, 10), (1024, 128, 113))


def compared(direct: Callable[[], Tensor], ours: Callable[[], Tensor], repeats: int) -> list[str]:
    """Milliseconds of both, their ratio, and how far apart their results are."""
    difference = abs(direct().item() - ours().item())
    slow, fast = paired([direct, ours], repeats)
    times = [f"{1e3 * statistics.median(seconds):.2f}" for seconds in (slow, fast)]
    return [*times, f"{median_ratio(slow, fast):.1f}", f"{difference:.0e}"]


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    entropies = []
    for n, d in ENTROPY_SHAPES:
        features = torch.randn(n, d)
        times = compared(
            lambda z=features: matrix_entropy(gram_matrix(z)), lambda z=features: feature_entropy(z), options.repeats
        )
        entropies.append([n, d, *times])

    informations = []
    for n, d1, d2 in INFORMATION_SHAPES:
        first, second = torch.randn(n, d1), torch.randn(n, d2)
        times = compared(
            lambda a=first, b=second: matrix_mutual_information(gram_matrix(a), gram_matrix(b)),
            lambda a=first, b=second: feature_mutual_information(a, b),
            options.repeats,
        )
        informations.append([n, d1, d2, *times])

    measured = ["n x n, ms", "smaller dimension, ms", "times faster", "difference"]
    text = "\n\n".join(
        [
            "Entropy of n samples of d features:",
            markdown(["n", "d", *measured], entropies),
            "Mutual information of features of dimension d1 and d2; its joint term has min(n, d1 d2) dimensions:",
            markdown(["n", "d1", "d2", *measured], informations),
        ]
    )
    publish(text, options.output, f"python -m benchmarks.information --repeats {options.repeats}")


if __name__ == "__main__":
    main()

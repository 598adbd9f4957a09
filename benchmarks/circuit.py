"""All pruning masks in one batched pass against one forward pass per mask, and what the memory limit costs."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks._common import markdown, median_ratio, paired, parser, publish
from grok_callbacks.functional import pruned_logits, pruning_masks

LIMITS_MIB = (16, 256)


class Transformer(nn.Module):
    """One block on two operands and an equals sign, as trained on modular addition."""

    def __init__(self, modulus: int = 113, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(modulus + 1, width)
        self.heads = heads
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, modulus)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits at the last position."""
        stream = self.embedding(tokens)
        parts = self.attention_in(stream).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        stream = stream + self.attention_out((weights @ value).transpose(1, 2).flatten(2))
        stream = stream + self.down(self.up(stream).relu())
        return self.head(stream[:, -1])


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))


def cases() -> list[tuple[str, nn.Module, Tensor, list[str]]]:
    generator = torch.Generator().manual_seed(0)
    small, digits, images = (torch.rand(*shape, generator=generator) for shape in ((64, 64), (256, 784), (256, 1, 8, 8)))
    tokens = torch.randint(113, (256, 3), generator=generator)
    return [
        ("MLP 64-64-64-10, n = 64", perceptron(64, 64, 64, 10), small, ["0", "2", "4"]),
        ("MLP 784-200-200-10, n = 256", perceptron(784, 200, 200, 10), digits, ["0", "2", "4"]),
        ("Transformer, d 128, n = 256", Transformer(), tokens, ["attention_in", "up", "head"]),
        ("CNN 16-32, n = 256", convolutional(), images, ["0", "3", "7"]),
    ]


def one_by_one(call: Callable[[dict[str, Tensor]], Tensor], name: str, weight: Tensor, masks: Tensor) -> Tensor:
    """One forward pass per mask."""
    with torch.no_grad():
        return torch.stack([call({name: weight.masked_fill(mask, 0)}) for mask in masks])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--masks", type=int, nargs="+", default=[5, 20], help="numbers of masks, R")
    options = arguments.parse_args()
    torch.set_num_threads(1)

    rows = []
    for title, model, inputs, layers in cases():
        model.eval()

        def call(weights: dict[str, Tensor], model: nn.Module = model, inputs: Tensor = inputs) -> Tensor:
            return functional_call(model, weights, (inputs,))

        for layer in layers:
            name = f"{layer}.weight"
            weight = model.get_parameter(name).detach()
            for repeats in options.masks:
                masks = pruning_masks(weight.shape, repeats=repeats)
                baseline = one_by_one(call, name, weight, masks)
                functions: list[Callable[[], object]] = [lambda m=masks, n=name, w=weight: one_by_one(call, n, w, m)]
                for limit in LIMITS_MIB:
                    torch.testing.assert_close(pruned_logits(call, name, weight, masks, limit * 2**20), baseline)
                    functions.append(lambda m=masks, n=name, w=weight, b=limit * 2**20: pruned_logits(call, n, w, m, b))
                loop, *batched = paired(functions, options.repeats)
                ratios = [f"{median_ratio(loop, seconds):.2f}" for seconds in batched]
                rows.append([title, name, repeats, f"{1e3 * statistics.median(loop):.2f}", *ratios])

    header = ["model", "pruned", "R", "one pass per mask, ms", *(f"times faster, {limit} MiB" for limit in LIMITS_MIB)]
    note = (
        "Layers are listed from first to last. What comes before the pruned layer is shared by all masks of a batch,\n"
        "what comes after it is computed for each: the gain grows with depth, and pruning the first layer saves the\n"
        "overhead of calls at most. The first mask runs alone, to learn how much memory a pass takes. With few masks of a\n"
        "small network batching costs more than it saves: ratios below 1, of well under a millisecond."
    )
    flags = f" --repeats {options.repeats} --masks {' '.join(map(str, options.masks))}"
    publish(f"{markdown(header, rows)}\n\n{note}", options.output, f"python -m benchmarks.circuit{flags}")


if __name__ == "__main__":
    main()

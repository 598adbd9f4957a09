"""Every function of ``grok_callbacks.functional`` on random tensors, well chosen or not: a number where its documentation
promises one, otherwise NaN, or a ``ValueError`` that names an argument; never another error, never a warning."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grok_callbacks import functional
from grok_callbacks.functional import Li2Stage

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=70, report_multiple_bugs=False)
MODERATE = 2.0**60  # Larger entries may overflow where the documentation does not promise otherwise; smaller ones vanish.

# --- random tensors ------------------------------------------------------------------------------------------------


def one(value):
    def put(x):
        if x.numel():
            x.view(-1)[x.numel() // 2] = value
        return x

    return put


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "zeros": torch.zeros_like,
    "equal": lambda x: torch.full_like(x, 3.7),
    "rank one": lambda x: x if x.ndim < 2 else x[..., :1] * x[:1].clone(),
    "low contrast": lambda x: 1000 + 1e-9 * x,
    "one large": one(1e6),
    "large": lambda x: x * 1e15,
    "small": lambda x: x * 1e-15,
    "huge": lambda x: x * 1e200,
    "tiny": lambda x: x * 1e-200,
    "subnormal": lambda x: x * 5e-323,
    "one NaN": one(math.nan),
    "one Inf": one(math.inf),
    "one -Inf": one(-math.inf),
    "all NaN": lambda x: x * math.nan,
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


#: One example in four is what the functions are for in every respect.
ordinary = st.shared(st.integers(0, 3), key="ordinary").map(lambda number: number == 3)


def one_in(count):
    """Whether to draw something that does not fit, now and then."""
    return st.tuples(ordinary, st.integers(0, count - 1)).map(lambda drawn: not drawn[0] and drawn[1] == 0)


@st.composite
def tensors(draw, *shape, kinds=tuple(KINDS), dtypes=tuple(DTYPES)):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    kind = "normal" if draw(ordinary) else draw(st.sampled_from(kinds))
    made = KINDS[kind](torch.randn(shape, generator=generator, dtype=torch.float64))
    dtype = draw(st.sampled_from(dtypes)) if draw(one_in(4)) else dtypes[0]
    if not (dtype.is_floating_point or dtype.is_complex):
        made = made.nan_to_num(0.0, 3.0, -3.0).clamp(-(2.0**40), 2.0**40)
    made = made.to(dtype)
    return made.mT.contiguous().mT if made.ndim > 1 and draw(st.booleans()) else made


sizes = st.sampled_from([2, 3, 5, 8, 1])
any_shape = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def shaped(draw, *shape, **kwargs):
    """Of this shape, but now and then of another."""
    shape = draw(any_shape) if draw(one_in(10)) else shape
    return draw(tensors(*shape, **kwargs))


@st.composite
def integers(draw, *shape, low=-1, high=5, dtypes=(torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32)):
    shape = draw(any_shape) if draw(one_in(10)) else shape
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    made = torch.randint(low, high, shape, generator=generator)
    return made.to(draw(st.sampled_from(dtypes)) if draw(one_in(6)) else dtypes[0])


def rarely(usual, wrong):
    """One of the first, now and then one of the second."""
    return one_in(10).flatmap(lambda is_wrong: st.sampled_from(wrong if is_wrong else usual))


def numbers(*usual: float) -> st.SearchStrategy[float]:
    return rarely(usual, [0.0, -1.0, math.nan, math.inf, 1e300, 1e-300])


# --- what each takes and gives --------------------------------------------------------------------------------------


@dataclass
class Case:
    """One function.

    Args:
        arguments: Draws them by name; most fit, some don't.
        bounds: What a result lies in.
        undefined: Whether the documentation says NaN, or leaves it open, for finite arguments.
        strict: Whether what is not finite in any argument makes the result NaN throughout.
    """

    arguments: Callable[[Any], dict[str, Any]]
    bounds: Callable[[Mapping[str, Any]], tuple[float, float]] = lambda a: (-math.inf, math.inf)
    undefined: Callable[[Mapping[str, Any]], bool] = lambda a: False
    strict: bool = True
    infinite: Callable[[Mapping[str, Any]], bool] = lambda a: False


NOT_NEGATIVE = (0.0, math.inf)
SHARE = (0.0, 1.0)


def with_size(make, size=sizes):
    """Arguments that share one size."""
    return lambda draw: make(draw, draw(size))


def matrix(name):
    return lambda draw: {name: draw(shaped(draw(sizes), draw(sizes)))}


def two(first, second, **kwargs):
    def arguments(draw):
        shape = draw(sizes), draw(sizes)
        return {first: draw(shaped(*shape, **kwargs)), second: draw(shaped(*shape, **kwargs))}

    return arguments


def li2(*names):
    def arguments(draw):
        n, units, classes = draw(sizes), draw(sizes), draw(sizes)
        shapes = {
            "features": (n, units), "gradient": (n, units), "targets": (n, classes), "residual": (n, classes),
            "weight": (units, classes),
        }  # fmt: skip
        drawn = {name: draw(shaped(*shapes[name])) for name in names if name in shapes}
        return drawn | ({"strength": draw(numbers(0.1, 10.0))} if "strength" in names else {})

    return arguments


def immoderate(arguments):
    """Squares and products overflow or vanish; columns that vary by rounding alone are the caller's."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and not value.is_complex() and value.numel():
            magnitudes = value.double().abs()
            if bool((magnitudes > MODERATE).any() | ((magnitudes > 0) & (magnitudes < 1 / MODERATE)).any()):
                return True
    return False


def constant(*names):
    """Whether one of these does not vary beyond rounding over its rows."""

    def check(arguments):
        for name in names:
            value = arguments[name].double()
            if len(value) == 1 or bool((value.std(0) <= 1e-9 * value.abs().amax(0)).all()):
                return True
        return immoderate(arguments)

    return check


def varies(rows):
    """Whether its rows differ, beyond rounding."""
    rows = rows.double()
    return len(rows) > 1 and bool(((rows - rows[0]).abs() > 1e-13 * rows.abs().amax(0)).any())


def in_pairs(arguments):
    """The features of each class that has at least two samples."""
    classes = [arguments["features"][arguments["labels"] == label] for label in arguments["labels"].unique()]
    return [features for features in classes if len(features) > 1]


def no_outputs(arguments):
    """Whether a function of points is not finite there, or squares of it may not be."""
    outputs = arguments["function"](arguments["points"])
    return not bool(outputs.isfinite().all()) or immoderate({**arguments, "outputs": outputs})


def cannot_be_described(arguments):
    """Weights beyond what float32 holds the products of, or a loss that is not finite."""
    rounded = [weight for weight in leaves(arguments["weights"]) if weight.is_floating_point() or weight.is_complex()]
    too_large = any(bool((weight.abs() > 1e30).any()) for weight in rounded)
    return too_large or not math.isfinite(arguments["loss"](arguments["weights"]))


def no_ridge_solution(arguments):
    """Whether it is zero, or takes more digits than there are."""
    if immoderate(arguments) or not 1e-9 < arguments["strength"] < 1e9:
        return True
    features, targets = arguments["features"].double(), arguments["targets"].double()
    products = (features - features.mean(0)).T @ (targets - targets.mean(0))
    return bool(products.abs().max() <= 1e-9 * features.abs().max() * targets.abs().max())


def group_arguments(*names):
    def arguments(draw):
        n = draw(st.integers(1, 5))
        table = (torch.arange(n)[:, None] + torch.arange(n)) % n
        return {
            name: draw(integers(n, n, dtypes=(torch.bool, torch.int64)))
            if name == "pairs" and draw(st.booleans())
            else None
            if name == "pairs"
            else table
            if name == "table" and draw(st.integers(0, 4))
            else draw(integers(n, n))
            for name in names
        }

    return arguments


def probe_function(draw):
    weight = draw(tensors(3, 2, kinds=("normal", "zeros", "large", "one NaN"), dtypes=(torch.float64,)))
    return draw(
        st.sampled_from(
            [lambda x: torch.relu(x.double().flatten(1)[:, :3] @ weight[: x.flatten(1).shape[1]]), lambda x: x, torch.tanh]
        )
    )


def connectivity_arguments(draw):
    kinds = ("normal", "zeros", "equal", "one NaN", "one Inf", "low contrast", "large", "huge", "tiny")
    return {
        "function": probe_function(draw), "points": draw(shaped(draw(sizes), draw(sizes), kinds=kinds)),
        "num_interpolation": draw(rarely([21, 3], [2, 0])), "memory_limit": draw(rarely([2**20, 1], [0])),
        "rank": draw(rarely([0], [1])), "world_size": draw(rarely([1, 2], [0])),
    }  # fmt: skip


def estimate_arguments(draw):
    drawn = connectivity_arguments(draw)
    return drawn | {"num_samples": draw(rarely([1, 3], [0])), "repeats": draw(rarely([1, 3], [0]))}


WEIGHT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64)


def weights(draw):
    count = draw(st.integers(0, 3))
    named = {f"w{number}": draw(tensors(*draw(any_shape), dtypes=WEIGHT_DTYPES)) for number in range(count)}
    if named and draw(st.booleans()):
        named["tied"] = named["w0"]
    return named


def encoded(draw):
    return {
        "weights": weights(draw), "bin_size": draw(numbers(0.1, 1e-3)), "threshold": draw(numbers(1.0, 0.5)),
        "encoding": draw(rarely(["paper", "tight"], ["other"])),
    }  # fmt: skip


def distorted(draw):
    drawn = encoded(draw)
    target = draw(st.sampled_from([0.0, 0.5, math.nan]))
    return {
        "weights": drawn["weights"], "encoding": drawn["encoding"], "epsilon": draw(numbers(1.0, 0.1)),
        "loss": lambda weights: sum(
            (weight.to(torch.complex128).abs().nan_to_num() - target).square().sum() for weight in weights.values()
        ),
        "two_sided": draw(st.booleans()),
    }  # fmt: skip


def payload(draw):
    """A description, cut short or damaged."""
    named = {"a": torch.arange(12.0).view(3, 4), "b": torch.zeros(2, 0), "c": torch.eye(9)[:, :2] @ torch.ones(2, 9)}
    whole = functional.encode(named, draw(st.sampled_from([0.0, 0.5])), 0.9, draw(st.sampled_from(["paper", "tight"])))
    content = bytearray(whole[: draw(st.sampled_from([draw(st.integers(0, len(whole))), len(whole)]))])
    if content and draw(st.booleans()):
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return {"payload": bytes(content), "names": draw(rarely([list(named)], [["a"], []]))}


def masks(draw):
    shape = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    weight = draw(shaped(*shape, dtypes=(torch.float64, torch.float32)))
    return {
        "model_call": lambda named: named["w"].sum(-1, keepdim=True) if named["w"].ndim else named["w"], "name": "w",
        "weight": weight,
        "masks": draw(integers(draw(st.integers(0, 3)), *shape, low=0, high=2, dtypes=(torch.bool, torch.int64))),
        "memory_limit": draw(rarely([2**20, 1], [0])),
    }  # fmt: skip


def input_gradient(draw):
    inputs = draw(shaped(draw(sizes), draw(sizes), dtypes=(torch.float64, torch.float32)))
    inputs.requires_grad_(draw(st.integers(0, 5)) > 0)
    outputs = draw(rarely([torch.square, torch.tanh], [lambda x: x[:1], lambda x: x.detach(), lambda x: x.sum()]))
    probes = draw(rarely([None, 1, 3], [0]))
    return {"outputs": outputs(inputs) if inputs.ndim else inputs, "inputs": inputs, "num_probes": probes}


def entropic(draw):
    drawn = matrix("features")(draw)
    return drawn | {"alpha": draw(numbers(1.0, 2.0, 0.5, 1, 3.0))}


def gram(draw, n):
    if draw(st.integers(0, 5)) == 0:
        return draw(shaped(n, n))
    return functional.gram_matrix(draw(tensors(n, draw(sizes), dtypes=DTYPES[:6])))


def count_rows(name):
    return lambda a: (0.0, math.log(max(len(a[name]), 1)))


CASES: dict[str, Case] = {
    "activation_sparsity": Case(
        lambda draw: {
            "activations": draw(shaped(draw(sizes), draw(sizes))),
            "threshold": draw(numbers(0.1)),
            "relative": draw(st.booleans()),
        },
        lambda a: SHARE,
    ),
    "answer_entropy": Case(matrix("logits"), lambda a: SHARE, lambda a: a["logits"].shape[1] == 1, strict=False),
    "associativity_agreement": Case(group_arguments("predictions", "pairs"), lambda a: SHARE, lambda a: a["pairs"] is not None),
    "center": Case(matrix("matrix"), undefined=immoderate, strict=False),
    "circuit_complexity": Case(
        two("logits", "pruned_logits"),
        lambda a: NOT_NEGATIVE,
        strict=False,
        infinite=lambda a: bool(a["pruned_logits"].real.isneginf().any()),
    ),
    "class_distance_ratio": Case(
        with_size(
            lambda draw, n: {"features": draw(shaped(n, draw(sizes))), "labels": draw(integers(n, high=2))}, st.integers(2, 12)
        ),
        lambda a: NOT_NEGATIVE,
        lambda a: immoderate(a) or len(in_pairs(a)) < 2 or not varies(torch.cat(in_pairs(a))),
        strict=False,
        infinite=lambda a: not any(map(varies, in_pairs(a))),
    ),
    "code_length": Case(
        with_size(lambda draw, n: {"logits": draw(shaped(n, 4)), "targets": draw(integers(n, low=0, high=4))}),
        lambda a: NOT_NEGATIVE,
        strict=False,
        infinite=lambda a: bool(a["logits"].real.isneginf().any()),
    ),
    "commutativity": Case(two("logits", "mirrored_logits"), lambda a: SHARE, strict=False),
    "decode": Case(payload),
    "effective_rank": Case(matrix("matrix"), lambda a: (1.0, min(a["matrix"].shape) * (1)), lambda a: not a["matrix"].any()),
    "encode": Case(encoded),
    "feature_energy": Case(li2("features", "targets"), lambda a: NOT_NEGATIVE, immoderate, strict=False),
    "feature_entropy": Case(entropic, count_rows("features")),
    "feature_gradient": Case(li2("residual", "weight"), undefined=immoderate, strict=False),
    "feature_mutual_information": Case(
        with_size(
            lambda draw, n: {
                "features1": draw(shaped(n, draw(sizes))),
                "features2": draw(shaped(n, draw(sizes))),
                "alpha": draw(numbers(1.0, 2.0)),
            }
        ),
    ),
    "generalization_bound": Case(
        lambda draw: {
            "risk": draw(numbers(0.1, 1.0)),
            "bits": draw(numbers(1.0, 1e6)),
            "num_samples": draw(numbers(1.0, 1000.0)),
            "delta": draw(numbers(0.05)),
        },
        lambda a: NOT_NEGATIVE,
        lambda a: not all(map(math.isfinite, a.values())),
        infinite=lambda a: True,
    ),
    "gradient_coherence": Case(
        two("first", "second"), lambda a: (-1.0, 1.0), lambda a: not (a["first"].any() and a["second"].any())
    ),
    "gradient_scale": Case(
        two("logit_gradient", "residual"), undefined=lambda a: not a["residual"].any() or immoderate(a), strict=False
    ),
    "gram_matrix": Case(matrix("features"), lambda a: (-1, 1), strict=False),
    "identity_agreement": Case(
        group_arguments("predictions", "table", "pairs"), lambda a: SHARE, lambda a: a["pairs"] is not None
    ),
    "inverse_agreement": Case(
        group_arguments("predictions", "table", "pairs"), lambda a: SHARE, lambda a: a["pairs"] is not None
    ),
    "largest_feature_cosine": Case(
        matrix("features"), lambda a: (-1.0, 1.0), lambda a: sum(map(varies, a["features"].T)) < 2, strict=False
    ),
    "lazy_alignment": Case(
        li2("gradient", "features", "targets"), lambda a: (-1.0, 1.0), constant("gradient", "features", "targets")
    ),
    "linear_connectivity": Case(connectivity_arguments, lambda a: SHARE, no_outputs, strict=False),
    "linear_mapping_number": Case(
        with_size(lambda draw, n: {"connectivity": draw(shaped(n, n))}),
        lambda a: (1, a["connectivity"].shape[-1]),
        lambda a: not a["connectivity"].any(),
    ),
    "linear_mapping_number_estimate": Case(
        estimate_arguments, lambda a: (float(a["world_size"] == 1), a["num_samples"]), no_outputs, strict=False
    ),
    "logit_distance": Case(two("logits", "mirrored_logits"), lambda a: NOT_NEGATIVE, immoderate, strict=False),
    "loss_oscillation": Case(
        lambda draw: {"losses": draw(shaped(draw(st.integers(1, 12))))},
        lambda a: NOT_NEGATIVE,
        lambda a: (
            len(a["losses"]) < 5 or abs(a["losses"].double().mean()) <= 1e-9 * a["losses"].double().abs().max() or immoderate(a)
        ),
    ),
    "matrix_entropy": Case(
        lambda draw: {"gram": gram(draw, draw(sizes)), "alpha": draw(numbers(1.0, 2.0))},
        count_rows("gram"),
        lambda a: not a["gram"].any(),
    ),
    "matrix_mutual_information": Case(
        with_size(lambda draw, n: {"gram1": gram(draw, n), "gram2": gram(draw, n), "alpha": draw(numbers(1.0, 2.0))}),
        undefined=lambda a: not (a["gram1"] * a["gram2"]).any(),
    ),
    "mean_squared_input_gradient": Case(input_gradient, lambda a: NOT_NEGATIVE, strict=False, infinite=immoderate),
    "naive_size": Case(lambda draw: {"weights": weights(draw)}, lambda a: (8.0, math.inf), strict=False),
    "parameter_norm": Case(
        lambda draw: {
            "tensors": [draw(tensors(*draw(any_shape))) for _ in range(draw(st.integers(0, 3)))],
            "ord": draw(numbers(2.0, 1.0, 0.5)),
        },
        lambda a: NOT_NEGATIVE,
        lambda a: a["ord"] < 0.1 or a["ord"] > 100,
        infinite=lambda a: a["ord"] < 0.1,
    ),
    "participation_ratio": Case(
        matrix("features"), lambda a: (1, min(len(a["features"]) - 1, a["features"].shape[1])), constant("features")
    ),
    "prediction_churn": Case(two("logits", "previous_logits"), lambda a: SHARE, strict=False),
    "prediction_confidence": Case(matrix("logits"), lambda a: SHARE, strict=False),
    "prediction_entropy": Case(matrix("logits"), lambda a: (0.0, math.log(a["logits"].shape[1])), strict=False),
    "pruned_logits": Case(masks, strict=False),
    "pruning_masks": Case(
        lambda draw: {
            "shape": draw(any_shape),
            "fraction": draw(numbers(0.1, 1.0)),
            "repeats": draw(st.integers(0, 3)),
            "seed": draw(st.integers(0, 9)),
        },
        lambda a: SHARE,
    ),
    "rate_distortion": Case(distorted, lambda a: NOT_NEGATIVE, cannot_be_described, strict=False),
    "relative_change": Case(
        two("weights", "initial"),
        lambda a: NOT_NEGATIVE,
        lambda a: not a["initial"].any() or immoderate(a),
        strict=False,
        infinite=immoderate,
    ),
    "representation_entropy": Case(
        matrix("features"), lambda a: (0.0, 1), lambda a: a["features"].shape[1] == 1 or constant("features")(a)
    ),
    "residual_alignment": Case(
        li2("gradient", "features", "targets", "residual"),
        lambda a: (-1.0, 1.0),
        constant("gradient", "features", "targets", "residual"),
    ),
    "residual_ratio": Case(li2("residual", "targets"), lambda a: NOT_NEGATIVE, constant("targets"), strict=False),
    "ridge_distance": Case(
        li2("weight", "features", "targets", "strength"),
        lambda a: NOT_NEGATIVE,
        no_ridge_solution,
        strict=False,
    ),
    "ridge_solution": Case(
        li2("features", "targets", "strength"), undefined=lambda a: immoderate(a) or not 1e-9 < a["strength"] < 1e9
    ),
    "ridge_strength": Case(
        lambda draw: {"weight_decay": draw(numbers(0.1)), "scale": draw(numbers(0.5))},
        lambda a: NOT_NEGATIVE,
        lambda a: not all(map(math.isfinite, a.values())),
        strict=False,
        infinite=lambda a: True,
    ),
    "singular_values": Case(matrix("matrix"), lambda a: NOT_NEGATIVE),
    "spectral_entropy": Case(
        matrix("matrix"), lambda a: (0.0, math.log(min(a["matrix"].shape))), lambda a: not a["matrix"].any()
    ),
    "spectral_entropy_penalty": Case(matrix("matrix"), lambda a: (0.0, math.log(min(a["matrix"].shape)))),
    "truncate_spectrum": Case(
        lambda draw: {"weight": draw(shaped(draw(sizes), draw(sizes))), "shares": [draw(numbers(0.5, 0.99, 1.0))]},
        undefined=lambda a: not a["weight"].any(),
    ),
    "weight_entropy": Case(lambda draw: {"weight": draw(tensors(*draw(any_shape)))}),
}


FUNCTIONS = sorted(name for name in functional.__all__ if inspect.isfunction(getattr(functional, name)))


def test_no_function_is_left_out():
    assert set(FUNCTIONS) <= set(CASES)


def leaves(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return []


def is_finite(arguments):
    return all(bool(leaf.isfinite().all()) for leaf in leaves(arguments))


def named(message, arguments):
    """Whether a message names an argument, also one of a numbered pair by its common name."""
    words = {word for name in arguments for word in (name, name.rstrip("12"))}
    return any(re.search(rf"\b{word}\b", message) for word in words)


def in_numbers(result):
    if isinstance(result, functional.RateDistortion):
        return torch.tensor([result.bits, result.bin_size], dtype=torch.float64)
    if isinstance(result, functional.LinearMappingEstimate):
        return result.samples
    if isinstance(result, functional.InputGradient):
        return result.mean
    if isinstance(result, (bytes, dict)):
        return torch.zeros(1)
    return torch.as_tensor(result[0] if isinstance(result, list) else result).double()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_number_or_nan_or_an_error_that_names_an_argument(name):
    demanded = []

    @EXAMPLES
    @given(ordinary, st.data())
    def check(_, data):
        demanded.append(check_once(CASES[name], getattr(functional, name), data))

    check()
    # A case that never asks for a number would pass on NaN alone.
    assert sum(demanded) >= 5, name


def check_once(case, function, data):
    """Returns whether the documentation promises a number for what was drawn."""
    arguments = case.arguments(data.draw)
    before = [leaf.detach().clone() for leaf in leaves(arguments)]
    state = torch.get_rng_state()
    result, refusal = None, ""
    try:
        result = in_numbers(function(**arguments))
    except ValueError as error:
        refusal = str(error)
    # Whatever happens, nothing is written and nobody's random numbers are drawn.
    assert torch.equal(state, torch.get_rng_state())
    for leaf, copy in zip(leaves(arguments), before, strict=True):
        assert torch.equal(leaf.detach().reshape(-1).nan_to_num(7), copy.reshape(-1).nan_to_num(7))
    if result is None:
        assert named(refusal, arguments), f"{refusal} names none of {list(arguments)}"
        return False
    finite = is_finite(arguments)
    is_defined = finite and not case.undefined(arguments)
    low, high = case.bounds(arguments)
    known, rounding = result[~result.isnan()], 1e-9 if is_defined else 0.1
    assert bool(((known >= low - rounding) & (known <= high + rounding)).all()), (result, low, high)
    if is_defined:
        assert not result.isnan().any(), result
        assert case.infinite(arguments) or result.isfinite().all(), result
    elif not finite and case.strict:
        assert result.isnan().any(), result
    return is_defined


@EXAMPLES
@given(
    values=st.lists(st.tuples(*3 * [st.one_of(st.floats(-1, 1), st.just(math.nan))]), max_size=12),
    patience=st.integers(1, 3),
)
def test_stages_never_go_back_and_never_skip(values, patience):
    stage = Li2Stage(patience=patience)
    for number, (lazy, residual, ratio) in enumerate(values, start=1):
        following = stage.update(lazy, residual, ratio)
        assert 0 <= following.stage - stage.stage <= 1
        assert following.stage <= 1 + number // patience
        if math.isnan(lazy):
            assert following.stage == stage.stage
        stage = following


# --- invariances ---------------------------------------------------------------------------------------------------


def rotated(matrix, generator):
    rotation, _ = torch.linalg.qr(torch.randn(matrix.shape[1], matrix.shape[1], generator=generator, dtype=torch.float64))
    return matrix @ rotation


TRANSFORMS: dict[str, Callable[..., torch.Tensor]] = {
    "order of the rows": lambda x, g, order: x[order],
    "order of the columns": lambda x, g, order: x[:, torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(7))],
    "scale": lambda x, g, order: 2.5e-3 * x,
    "sign": lambda x, g, order: -x,
    "shift": lambda x, g, order: x + torch.arange(1.0, x.shape[1] + 1),
    "rotation": lambda x, g, order: rotated(x, g),
    "transposition": lambda x, g, order: x.T,
    "scale of each row": lambda x, g, order: x * torch.linspace(0.5, 2, len(x), dtype=torch.float64)[:, None],
    "scale of each column": lambda x, g, order: x * torch.linspace(0.5, 2, x.shape[1], dtype=torch.float64),
    "repeated rows": lambda x, g, order: x.repeat(3, 1),
}
ROWS, COLUMNS = "order of the rows", "order of the columns"
INVARIANCES: dict[str, tuple[str, ...]] = {
    "activation_sparsity": (ROWS, COLUMNS, "transposition", "repeated rows"),
    "circuit_complexity": (ROWS, COLUMNS, "repeated rows"),
    "commutativity": (ROWS, COLUMNS, "scale", "repeated rows", "scale of each row"),
    "effective_rank": (ROWS, COLUMNS, "scale", "sign", "rotation", "transposition", "repeated rows"),
    "feature_entropy": (ROWS, COLUMNS, "scale", "sign", "rotation", "scale of each row", "repeated rows"),
    "feature_mutual_information": (ROWS, COLUMNS, "scale", "sign", "rotation", "scale of each row", "repeated rows"),
    "largest_feature_cosine": (ROWS, COLUMNS, "scale", "sign", "shift", "scale of each column", "repeated rows"),
    "logit_distance": (ROWS, "sign", "repeated rows"),
    "parameter_norm": (ROWS, COLUMNS, "sign", "rotation", "transposition"),
    "participation_ratio": (ROWS, COLUMNS, "scale", "sign", "shift", "rotation", "repeated rows"),
    "prediction_churn": (ROWS, COLUMNS, "scale", "repeated rows", "scale of each row"),
    "prediction_entropy": (ROWS, COLUMNS, "repeated rows"),
    "prediction_confidence": (ROWS, COLUMNS, "repeated rows"),
    "relative_change": (ROWS, COLUMNS, "scale", "sign", "rotation", "transposition", "repeated rows"),
    "representation_entropy": (ROWS, COLUMNS, "scale", "sign", "shift", "rotation"),
    "residual_ratio": (ROWS, COLUMNS, "scale", "sign", "shift", "rotation", "repeated rows"),
    "spectral_entropy": (ROWS, COLUMNS, "scale", "sign", "rotation", "transposition", "repeated rows"),
    "weight_entropy": (ROWS, COLUMNS, "sign", "transposition"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "transform"), [(name, transform) for name in INVARIANCES for transform in INVARIANCES[name]])
@settings(EXAMPLES, max_examples=12)
@given(sizes=st.tuples(*3 * [st.integers(1, 9)]), seed=st.integers(0, 999))
def test_invariances(name, transform, sizes, seed):
    """Whatever the shape and the rank; all tensors that a function takes are changed alike."""
    n, d, rank = sizes[0] + 1, sizes[1] + 1, sizes[2]
    function, generator = getattr(functional, name), torch.Generator().manual_seed(seed)
    count = sum(parameter.default is parameter.empty for parameter in inspect.signature(function).parameters.values())
    factors = [torch.randn(2, max(n, d), rank, generator=generator, dtype=torch.float64) for _ in range(count)]
    given_to = [left[:n] @ right[:d].T for left, right in factors]
    order = torch.randperm(n, generator=generator)
    change = TRANSFORMS[transform]
    changed = [change(x, torch.Generator().manual_seed(seed), order) for x in given_to]
    torch.testing.assert_close(function(*changed), function(*given_to), rtol=1e-6, atol=1e-7, equal_nan=True)

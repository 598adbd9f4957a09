"""What each family of measures is called, what it means, where it comes from, and which of its curves share an axis.

The one table that TensorBoard's layout, the figure and the page of a run, and the documentation are made from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple, get_args

__all__ = ["MEASURES", "QUESTIONS", "Chart", "Measure", "Question", "Source", "chart_of", "group_by_chart"]

Question = Literal["Is it memorising?", "Is it compressing?", "Is it about to generalise?"]

#: In the order in which a run raises them.
QUESTIONS: tuple[Question, ...] = get_args(Question)


class Source(NamedTuple):
    """Where a measure was published.

    Args:
        authors: Names and year.
        arxiv: The paper's number there, empty where it has none.
    """

    authors: str
    arxiv: str = ""


@dataclass(frozen=True)
class Measure:
    """A family of keys, such as all of ``grok/robustness/...``.

    Args:
        title: Its name, with its unit.
        question: The question that it helps to answer.
        meaning: What it is, and what to make of it, in two or three sentences.
        sources: Where it was published.
        charts: Titles of charts, with globs of what follows the family's name in the keys of their curves. Keys of none of
            them share a chart with the family's title.
    """

    title: str
    question: Question
    meaning: str
    sources: tuple[Source, ...] = ()
    charts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class Chart(NamedTuple):
    """A set of axes.

    Args:
        family: The family of measures, as in the keys.
        title: What stands above it.
    """

    family: str
    title: str


_LIU_2022 = Source("Liu et al. 2022", "2205.10343")
_POWER = Source("Power et al. 2022", "2201.02177")
_LMN = Source("Liu, Zhong, Tegmark 2023", "2310.05918")
_GOLECHHA = Source("Golechha 2024", "2405.12755")
_DEMOSS = Source("DeMoss et al. 2024", "2412.09810")
_TAN = Source("Tan and Huang 2023", "2311.06597")
_TIAN = Source("Tian 2025", "2509.21519")
_TRUONG = Source("Truong et al. 2026", "2604.13123")
_ILDR = Source("ILDR 2026", "2604.20923")

#: By the second part of the keys.
MEASURES: Mapping[str, Measure] = {
    "accuracy": Measure(
        "Accuracy",
        "Is it memorising?",
        "Share of right answers. Training data that are fitted while validation stays at chance are memorised; grokking is "
        "validation that follows much later.",
        (_POWER,),
    ),
    "loss": Measure(
        "Loss",
        "Is it memorising?",
        "Loss on the probe's samples. While a network memorises, the training loss falls and the validation loss rises; when "
        "it generalises, the validation loss comes down again, often before the accuracy moves.",
        (_POWER,),
    ),
    "onset": Measure(
        "Events",
        "Is it memorising?",
        "The steps at which the run memorised, began to generalise and had generalised.",
        (_LIU_2022,),
    ),
    "norm": Measure(
        "Weight norm",
        "Is it compressing?",
        "Length of the vector of all weights. It often falls while a network generalises, but it falls on random labels too "
        "and can grow in a run that groks: the measure that every other must beat.",
        (_LMN, _GOLECHHA),
    ),
    "weight_entropy": Measure(
        "Weight entropy (nats)",
        "Is it compressing?",
        "-Σ |w| ln |w| over a matrix. It falls where weights move away from 1/e in size, so as weight decay silences them. It "
        "depends on scale and size: compare a matrix with itself only.",
        (_GOLECHHA,),
    ),
    "spectral_entropy": Measure(
        "Spectral entropy (nats)",
        "Is it compressing?",
        "Entropy of a matrix's singular values, as shares of their sum. It falls as a matrix comes to use fewer directions, "
        "whatever its scale.",
        (_DEMOSS,),
    ),
    "effective_rank": Measure(
        "Effective rank",
        "Is it compressing?",
        "The exponential of the spectral entropy: about how many directions a matrix uses.",
        (_DEMOSS, Source("Roy and Vetterli 2007")),
    ),
    "sparsity": Measure(
        "Activation sparsity",
        "Is it compressing?",
        "Share of a layer's activations that are silent. It rises as fewer units do the work, and also where all activations "
        "merely shrink.",
        (_GOLECHHA,),
    ),
    "circuit_complexity": Measure(
        "Circuit complexity (nats)",
        "Is it compressing?",
        "How far the predictions move when a tenth of a layer's weights is removed at random. It is high while answers hang on "
        "many fine-tuned weights, and falls when they no longer do; it falls on random labels as well.",
        (_GOLECHHA,),
    ),
    "lmn": Measure(
        "Linear mapping number",
        "Is it compressing?",
        "How many linear maps the network amounts to between a layer and its output, over a fixed number of samples. It rises "
        "while a network memorises and falls when it finds a simpler solution; it is 1 for a linear network.",
        (_LMN,),
    ),
    "complexity": Measure(
        "Rate-distortion complexity",
        "Is it compressing?",
        "How short a description of the weights can be that keeps the training loss within a tolerance. It rises while a "
        "network memorises and falls when it finds a simpler solution. A bound of 1 or more says nothing about the error rate.",
        (_DEMOSS,),
        {
            "Description length (bits)": ("bits*", "total_bits*", "naive_bits"),
            "Bound on the error rate": ("bound*",),
            "Loss of the coarse model": ("*_loss",),
            "Bin size and threshold chosen": ("bin_size", "threshold"),
        },
    ),
    "robustness": Measure(
        "Matrix information (nats)",
        "Is it about to generalise?",
        "Entropy of the answers under noise (pe), information that they share with the first layer (pmi), and the change of "
        "both by the noise (ed, mid). The changes move before validation does in the runs on record, and hardly on random "
        "labels.",
        (_TAN,),
        {
            "Information under noise (nats)": ("pmi", "pmi/*", "pe"),
            "Change by noise (nats)": ("mid", "mid/*", "ed"),
            "Input gradient": ("input_gradient",),
        },
    ),
    "representation": Measure(
        "Representation",
        "Is it about to generalise?",
        "The last hidden features and the answers to validation inputs. Classes that move apart, answers that grow certain "
        "and stop changing speak for generalisation; labels of validation samples are used for the distance ratio alone.",
        (_TRUONG, _ILDR),
        {
            "Entropy of the features": ("entropy",),
            "Distance of the classes": ("class_distance_ratio",),
            "Entropy of the predictions (nats)": ("prediction_entropy",),
            "Evenness of the answers": ("answer_entropy",),
            "Confidence and churn": ("confidence", "churn"),
        },
    ),
    "truncation": Measure(
        "Loss with cut weights",
        "Is it about to generalise?",
        "Training loss and accuracy of the network with each matrix cut to its leading directions. A network that has "
        "memorised needs nearly all of them; on the way to a general solution the cut network gets better before validation "
        "does.",
        (),
        {"Loss with cut weights": ("loss/*",), "Accuracy with cut weights": ("accuracy/*",)},
    ),
    "gradient_coherence": Measure(
        "Gradient coherence",
        "Is it about to generalise?",
        "Cosine of the gradients of two halves of the training samples. High where fitting the one half fits the other; below "
        "zero where a fitted network is pulled both ways.",
        (Source("Fort et al. 2019", "1901.09491"),),
    ),
    "li2": Measure(
        "Feature learning (Li2)",
        "Is it about to generalise?",
        "The stage of feature learning: I, the last layer fits random features; II, each unit learns a feature of its own; "
        "III, units turn to what is missing. A stage is no verdict: runs with too little data reach III and memorise.",
        (_TIAN,),
        {
            "Stage of feature learning": ("stage",),
            "Alignment of the gradient": ("cos_lazy", "cos_residual"),
            "Norm of the gradient": ("gradient_norm",),
            "Residual and distance to ridge": ("residual_ratio", "ridge_distance"),
            "Change of the weights": ("weight_change",),
            "Directions that features use": ("participation_ratio",),
            "Largest cosine of two units": ("feature_cosine",),
            "Energy of units": ("energy_*",),
        },
    ),
    "commutativity": Measure(
        "Commutativity",
        "Is it about to generalise?",
        "Share of pairs that get the same answer in both orders. What was memorised in both orders agrees, so the pairs to "
        "watch are those whose mirror image was not trained on. It follows the accuracy; it does not run ahead.",
        (_TAN,),
        {"Commutativity": ("", "unseen", "both_unseen"), "Distance of mirrored logits": ("logit_distance",)},
    ),
    "group_law": Measure(
        "Group laws",
        "Is it about to generalise?",
        "How far the network's own answers obey the laws of the group that it learns. Constant answers are associative: "
        "read it beside the accuracy.",
        (_TAN,),
    ),
    "forecast": Measure(
        "Forecast",
        "Is it about to generalise?",
        "How probable it is that this run will generalise, and when, judged by the other measures up to each step.",
        (),
        {
            "Probability of generalising": ("probability",),
            "Expected step of generalising, with 80% interval": ("eta_steps", "lower", "upper"),
        },
    ),
}


# Families of standard errors and deviations, which are for those who do statistics on the event files.
_ERRORS = frozenset({"circuit_complexity_std", "lmn_standard_error"})


def _is_error(family: str, rest: str) -> bool:
    return family in _ERRORS or (family == "robustness" and rest.partition("/")[0].endswith("_se"))


def chart_of(family: str, rest: str = "") -> Chart:
    """Where a curve belongs.

    Args:
        family: The second part of its key.
        rest: What follows it.

    Example:
        >>> chart_of("robustness", "mid").title, chart_of("norm", "mlp.0.weight").title, chart_of("of_my_own").title
        ('Change by noise (nats)', 'Weight norm', 'Of my own')
    """
    measure = MEASURES.get(family)
    if measure is None:
        return Chart(family, family.replace("_", " ").capitalize())
    titles = (title for title, globs in measure.charts.items() if any(fnmatchcase(rest, glob) for glob in globs))
    return Chart(family, next(titles, measure.title))


def group_by_chart(keys: Iterable[str], prefix: str = "grok") -> dict[Chart, dict[str, str]]:
    """The keys of each chart, by the name of their curve; error bars and what has another prefix are left out.

    Args:
        keys: Full keys.
        prefix: What stands before the family's name.

    Example:
        >>> group_by_chart(["grok/norm", "grok/norm/weight", "grok/robustness/pe", "grok/robustness/pe_se", "loss"])
        {Chart(family='norm', title='Weight norm'): {'all': 'grok/norm', 'weight': 'grok/norm/weight'},
         Chart(family='robustness', title='Information under noise (nats)'): {'pe': 'grok/robustness/pe'}}
    """
    charts: dict[Chart, dict[str, str]] = {}
    for key in keys:
        if not key.startswith(f"{prefix}/"):
            continue
        family, _, rest = key.removeprefix(f"{prefix}/").partition("/")
        if _is_error(family, rest):
            continue
        charts.setdefault(chart_of(family, rest), {})[rest or "all"] = key
    return charts

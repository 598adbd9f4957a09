"""A lazy, cached, read-only view of a model at one step, shared by everything that measures it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from grok_callbacks._distributed import Ranks
from grok_callbacks._isolation import observing
from grok_callbacks._sharding import is_sharded, own_piece, refuse_flat_shards, substituted
from grok_callbacks.functional.spectral import flatten_matrix, singular_values
from grok_callbacks.probe import IGNORE_INDEX, Batch, Probe, Split
from grok_callbacks.selection import clean_name, select

__all__ = ["Drawn", "ModelView", "Run", "Snapshot"]

#: Samples, the error of drawing them, or ``None`` where there are no data.
Drawn = Batch | ValueError | None

# Modules whose output is a hidden activation. Softmax and its kin normalise; they are not hidden units.
_ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish,
    nn.Softplus, nn.Tanh, nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Softsign,
)  # fmt: skip
_ACTIVATION_FUNCTIONS = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish", "hardswish",
     "softplus", "tanh", "tanh_", "hardtanh", "sigmoid", "sigmoid_", "hardsigmoid", "softsign", "square"}
)  # fmt: skip
# What may stand between a functional activation and the module that takes it, without making it another activation.
_CARRYING_FUNCTIONS = frozenset(
    {"dropout", "flatten", "reshape", "view", "contiguous", "permute", "transpose", "squeeze", "unsqueeze", "max_pool2d",
     "max_pool1d", "avg_pool2d", "adaptive_avg_pool2d"}
)  # fmt: skip
_CARRYING_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.MaxPool1d, nn.MaxPool2d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
)  # fmt: skip
_AFFINE_MODULES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Bilinear)
_INPUT = ":input"
# Samples on which a model is tried out before the first measurement.
_TRIAL_SIZE = 2


@dataclass(frozen=True)
class Run:
    """One forward pass: the logits as the model returned them, and the activations at the sites asked for."""

    logits: Tensor
    captured: Mapping[str, Tensor] = field(default_factory=dict)


class ModelView:
    """The names in a model, and what a monitor may choose among them.

    A *site* is a place where a single floating tensor passes on a forward pass: ``"mlp.1"`` is that module's output,
    ``"mlp.2:input"`` what goes into it. A module that is called several times has the sites ``"act@0"``, ``"act@1"`` ...

    Args:
        model: Any module; never changed.
        probe: Says how the model is called.
        samples: The probe's samples by split, on the CPU, or why they can't be had; monitors that need none don't mind.
        ranks: The process group.

    Raises:
        ValueError: If the model is sharded in a way in which weights can't be told from pieces of them.
    """

    def __init__(
        self, model: nn.Module, probe: Probe, samples: Mapping[Split, Drawn] | None = None, ranks: Ranks | None = None
    ) -> None:
        self.model = model
        self.probe = probe
        self.samples: dict[Split, Drawn] = dict(samples or {})
        self.ranks = ranks or Ranks()
        self.asked_for_samples = False
        self._requests: dict[Split, list[str]] = {"train": [], "validation": []}
        refuse_flat_shards(model)
        #: Whether ranks hold pieces of the weights (FSDP2).
        self.is_sharded = is_sharded(model)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by clean name; tied ones once, under their first name."""
        return {clean_name(name): parameter for name, parameter in self.model.named_parameters()}

    @property
    def matrices(self) -> list[str]:
        """Names of the parameters with at least two dimensions: weights of layers and embeddings, no biases, no gains.

        Those without an entry, such as a layer of no outputs has, and complex ones are left out.
        """
        parameters = self.parameters
        return [name for name in self._real if parameters[name].ndim > 1 and parameters[name].numel()]

    @property
    def _real(self) -> list[str]:
        return [name for name, parameter in self.parameters.items() if not parameter.is_complex()]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        parameter = next(self.model.parameters(), None)
        return parameter.device if parameter is not None else torch.device("cpu")

    def select_parameters(self, patterns: str | Sequence[str] | None, argument: str = "parameters") -> list[str]:
        """Names of the parameters that match, all real ones by default.

        Raises:
            ValueError: If the patterns match none, or a complex one, which no measure of weights is defined for.
        """
        if patterns is None:
            return self._real
        chosen = select(list(self.parameters), patterns, argument)
        unfit = [name for name in chosen if name not in self._real]
        if unfit:
            raise ValueError(f"`{argument}`: {unfit} are complex; name real parameters.")
        return chosen

    def select_matrices(self, patterns: str | Sequence[str] | None, argument: str = "parameters") -> list[str]:
        """Names of the matrices that match, all of them by default.

        Raises:
            ValueError: If the model has no matrix, or the patterns match none.
        """
        if not self.matrices:
            raise ValueError("The model has no parameter with two or more dimensions.")
        return self.matrices if patterns is None else select(self.matrices, patterns, argument)

    def select_sites(self, patterns: str | Sequence[str] | None, argument: str = "layers") -> list[str]:
        """Sites that match, the hidden activations by default.

        Raises:
            ValueError: If there is none; the message lists the sites there are.
        """
        if patterns is None:
            if not self.hidden_activations:
                raise ValueError(f"`{argument}`: no hidden activation was found; name sites, such as: {self._site_list()}.")
            return self.hidden_activations
        return select(self.sites, patterns, argument)

    def request(self, sites: Sequence[str], split: Split = "train") -> None:
        """Have these sites captured by the one forward pass of each snapshot."""
        self._requests[split] += [site for site in sites if site not in self._requests[split]]

    def requested(self, split: Split) -> list[str]:
        """The sites that any monitor has asked for."""
        return self._requests[split]

    def require_samples(self, split: Split = "train") -> Batch:
        """The probe's samples.

        Raises:
            ValueError: If there are none, or they can't be read.
        """
        self.asked_for_samples = True
        samples = self.samples.get(split)
        if isinstance(samples, ValueError):
            raise ValueError(str(samples)) from samples
        if samples is None:
            raise ValueError(
                f"There are no {split} samples to look at. "
                f"Set `{split}` of the Probe, or give the Trainer {'training' if split == 'train' else 'validation'} data."
            )
        return samples

    def require_logits(self, split: Split = "train") -> None:
        """Make sure that the model can be called on the probe's samples and that its outputs fit their targets.

        Raises:
            ValueError: If not; the message names the argument of the Probe to set.
        """
        targets = self.require_samples(split).targets
        if isinstance(targets, Tensor) and targets.numel() and bool((targets == IGNORE_INDEX).all()):
            raise ValueError(
                f"All targets of the {split} samples are {IGNORE_INDEX}, to be ignored; set `unpack` of the Probe."
            )
        samples = self.require_samples(split).first(_TRIAL_SIZE).to(self.device, _floating_dtype(self.model))
        with observing(self.model):
            logits, aligned = self.probe.align(_tried(self, samples.inputs), samples.targets)
        if isinstance(aligned, Tensor) and aligned.ndim < logits.ndim:
            self.probe.check_classes(targets, logits.shape[-1])

    def require_loss(self, split: Split = "train") -> None:
        """Make sure that there are outputs, and targets to compare them with.

        Raises:
            ValueError: If not; the message names the argument of the Probe to set.
        """
        self.require_logits(split)
        if self.require_samples(split).targets is None:
            raise ValueError(f"There is no loss, since the {split} samples have no targets; set `unpack` of the Probe.")

    @property
    def _trace(self) -> _Trace:
        self.asked_for_samples = True
        return self._traced

    @cached_property
    def _traced(self) -> _Trace:
        return _trace(self)

    @property
    def sites(self) -> list[str]:
        """Every site: outputs in the order in which modules finish, then inputs."""
        return [*self._trace.outputs, *self._trace.inputs]

    @property
    def hidden_activations(self) -> list[str]:
        """The outputs of activation modules and the inputs that functional activations feed, in the order of the forward pass.

        Where none is found (an activation the package does not know, such as a square written as a power), the inputs of all
        linear and convolutional modules but the first.
        """
        return self._trace.activations

    def _site_list(self) -> str:
        return ", ".join(self.sites[:60])

    def announce_pass(self) -> None:
        """Before a sharded model is called: the ranks that wait for something else take part in the pass."""
        if self.is_sharded:
            self.ranks.take_part = self._take_part
            self.ranks.agree(calling=True)

    def _take_part(self) -> None:
        samples = self.require_samples("train").first(1).to(self.device, _floating_dtype(self.model))
        with observing(self.model):
            self.probe.call(self.model, samples.inputs)


class Snapshot:
    """The model at one step, as all monitors see it: each thing is computed when first asked for, and once.

    Weights are named cleanly (no ``_orig_mod.``), detached, and shared with the model: reading them is free and writing them
    is forbidden. Probe passes run in eval mode and in the model's own precision without autocast, and leave no trace.

    Of a model that is sharded over ranks (FSDP2) ``weights`` gathers one weight at a time, and all ranks must ask for it;
    ``pieces`` has what this rank holds. Probe passes go through the sharded model, which never holds more of it in one place
    than in training. Ranks may make different passes, and different numbers of them: those without work take part in
    the others'.

    Args:
        view: The model and its probe.
        step: Optimiser steps taken.

    Attributes:
        weights: Whole weights by name.
        pieces: This rank's part of each weight by name; the parts of all ranks make up its entries, each once. Where the model
            is not sharded, the weights.
    """

    def __init__(self, view: ModelView, step: int) -> None:
        self.view = view
        self.step = step
        self.weights: Mapping[str, Tensor] = _Weights(view)
        self.pieces: Mapping[str, Tensor] = _Pieces(view)
        # What has names in the model: found once, as every pass asks for it.
        self._modules = {clean_name(name): module for name, module in view.model.named_modules()}
        self._parameter_names = {clean_name(name): name for name, _ in view.model.named_parameters()}
        self._spectra: dict[str, Tensor] = {}
        self._runs: dict[Split, Run] = {}
        self._batches: dict[Split, Batch] = {}

    @property
    def ranks(self) -> Ranks:
        """The process group: ``rank``, ``world_size``, ``all_reduce``, ``gather``."""
        return self.view.ranks

    def spectrum(self, name: str) -> Tensor:
        """Singular values of a weight in float64, largest first; a convolution is flattened to (out, in * k)."""
        if name not in self._spectra:
            self._spectra[name] = singular_values(flatten_matrix(self.weights[name]))
        return self._spectra[name]

    def has(self, split: Split) -> bool:
        """Whether there are samples of this split."""
        return isinstance(self.view.samples.get(split), Batch)

    def batch(self, split: Split = "train") -> Batch:
        """The probe's samples on the model's device, floating inputs in the model's precision."""
        if split not in self._batches:
            samples = self.view.require_samples(split)
            with torch.inference_mode(False):
                self._batches[split] = samples.to(self.view.device, _floating_dtype(self.view.model))
        return self._batches[split]

    def logits(self, split: Split = "train") -> Tensor:
        """The model's outputs on the probe, one row a prediction: positions flattened, ignored ones dropped."""
        return self._aligned(split)[0]

    def targets(self, split: Split = "train") -> Any:
        """What the rows of :meth:`logits` should be, ``None`` for unlabelled samples."""
        return self._aligned(split)[1]

    def activations(self, site: str, split: Split = "train") -> Tensor:
        """What passes at a site on the probe, samples first."""
        run = self.run(split)
        if site not in run.captured:
            # Not asked for beforehand: costs one more pass, and takes along what was there.
            self._runs[split] = run = self.forward(split, capture=[*run.captured, site])
        return run.captured[site]

    def loss(self, split: Split = "train") -> Tensor:
        """The loss on the probe, a float64 scalar."""
        return self.loss_of(*self._aligned(split))

    def loss_of(self, logits: Tensor, targets: Any) -> Tensor:
        """The probe's loss of any aligned outputs."""
        return self.view.probe.loss_of(logits, targets)

    def forward(
        self,
        split: Split = "train",
        *,
        inputs: Any = None,
        replace: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        capture: Sequence[str] = (),
        grad: bool = False,
    ) -> Run:
        """A forward pass of its own: other inputs, activations or weights put in place of the model's, sites captured.

        Args:
            split: Whose samples go in unless ``inputs`` are given.
            inputs: Other inputs for the model.
            replace: Tensors to stand in at sites; what the model computed there is dropped.
            weights: Tensors to stand in for parameters, by clean name; the model's own are not touched.
            capture: Sites whose tensors to return.
            grad: Whether autograd records the pass. Inputs, replacements and weights that require a gradient can then be
                differentiated with ``torch.autograd.grad``.

        Returns:
            The logits as returned by the model, and the captured tensors.
        """
        view = self.view
        if view.is_sharded and grad:
            # FSDP would take the backward pass for one of training's, and reduce gradients that are being accumulated.
            raise ValueError("Gradients can't be taken through a model that is sharded by FSDP2.")
        view.announce_pass()
        captured: dict[str, Tensor] = {}
        with observing(view.model, grad=grad), _hooked(self._modules, replace or {}, capture, captured):
            # A copy, or a model that writes into its inputs would spoil the probe.
            inputs = tree_map(_copy, self.batch(split).inputs) if inputs is None else inputs
            logits = self._call(inputs, weights)
        missing = [site for site in [*capture, *(replace or {})] if site not in captured]
        if missing:
            raise ValueError(f"No single tensor passed at {missing}. There are: {view._site_list()}.")
        return Run(logits, captured)

    def _call(self, inputs: Any, weights: Mapping[str, Tensor] | None) -> Tensor:
        view = self.view
        if not weights:
            return view.probe.call(view.model, inputs)
        unknown = [name for name in weights if name not in self._parameter_names]
        if unknown:
            raise ValueError(f"`weights`: the model has no parameters {unknown}.")
        substitutes = {self._parameter_names[name]: weight for name, weight in weights.items()}
        if view.is_sharded:
            with substituted(view.model, substitutes):
                return view.probe.call(view.model, inputs)
        inside = {f"model.{name}": weight for name, weight in substitutes.items()}
        return functional_call(_Caller(view), inside, (inputs,))  # type: ignore[no-any-return]

    def run(self, split: Split = "train") -> Run:
        """The one pass over the probe that all monitors share, with the sites that were requested."""
        if split not in self._runs:
            self._runs[split] = self.forward(split, capture=self.view.requested(split))
        return self._runs[split]

    def _aligned(self, split: Split) -> tuple[Tensor, Any]:
        return self.view.probe.align(self.run(split).logits, self.batch(split).targets)


class _Weights(Mapping[str, Tensor]):
    """Weights by clean name, looked up one at a time: a sharded one is gathered when asked for, and kept till the next."""

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._parameters = view.parameters
        self._gathered: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name].detach()
        if not hasattr(parameter, "full_tensor"):
            return parameter
        if self._gathered is None or self._gathered[0] != name:
            self._gathered = None
            # Gathering is a collective: all ranks must be here.
            self._view.ranks.agree()
            self._gathered = name, parameter.full_tensor()
        return self._gathered[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class _Pieces(_Weights):
    """What this rank holds of each weight."""

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name].detach()
        return own_piece(parameter) if self._view.is_sharded else parameter


class _Caller(nn.Module):
    """The probe's way to call a model as a module, so that weights can be substituted below it."""

    def __init__(self, view: ModelView) -> None:
        super().__init__()
        self.model = view.model
        self._probe = view.probe

    def forward(self, inputs: Any) -> Tensor:
        return self._probe.call(self.model, inputs)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _floating_dtype(model: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), None)


def _is_site_value(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _parse_site(site: str) -> tuple[str, int, bool]:
    """Module name, which call of it, and whether its input is meant."""
    is_input = site.endswith(_INPUT)
    name = site.removesuffix(_INPUT)
    module, _, call = name.partition("@")
    return module, int(call or 0), is_input


@contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], replace: Mapping[str, Tensor], capture: Sequence[str], captured: dict[str, Tensor]
) -> Iterator[None]:
    """Hooks that replace and capture at sites, for as long as the context lasts."""
    wanted: dict[str, dict[tuple[int, bool], str]] = defaultdict(dict)
    for site in [*replace, *capture]:
        name, call, is_input = _parse_site(site)
        if name not in modules:
            raise ValueError(f"There is no module {name!r} in the model.")
        wanted[name][call, is_input] = site

    def take(site: str | None, value: Any) -> Tensor | None:
        if site is None or not _is_site_value(value):
            return None
        replacement = replace.get(site)
        # A copy, since an in-place activation may follow; with autograd the tensor itself, which is part of the graph.
        captured[site] = replacement if replacement is not None else (value if torch.is_grad_enabled() else value.clone())
        return replacement

    def hooks(sites: Mapping[tuple[int, bool], str]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        calls = 0

        def before(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            replacement = take(sites.get((calls, True)), args[0]) if args else None
            return None if replacement is None else (replacement, *args[1:])

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            return take(sites.get((calls - 1, False)), output)

        return before, after

    with ExitStack() as stack:
        for name, sites in wanted.items():
            before, after = hooks(sites)
            stack.callback(modules[name].register_forward_pre_hook(before).remove)
            stack.callback(modules[name].register_forward_hook(after).remove)
        yield


@dataclass
class _Trace:
    outputs: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    activations: list[str] = field(default_factory=list)


class _FunctionalActivations(TorchFunctionMode):
    """Remembers the tensors that activation functions return, and follows them through dropout, pooling and reshaping."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        carried = name in _CARRYING_FUNCTIONS and args and self.holds(args[0])
        if isinstance(output, Tensor) and (name in _ACTIVATION_FUNCTIONS or carried):
            # Kept alive, or its id could be given to another tensor.
            self._alive[id(output)] = output
        return output

    def holds(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self._alive

    def drop(self, value: Any) -> None:
        self._alive.pop(id(value), None)


def _trace(view: ModelView) -> _Trace:
    """Call the model once on a few samples and write down which tensors pass where."""
    samples = view.require_samples("train").first(_TRIAL_SIZE).to(view.device, _floating_dtype(view.model))
    # A wrapper and what it wraps have one name; the inner one comes later and stays. Scripted modules run no hooks.
    modules = {
        clean: module
        for name, module in view.model.named_modules()
        if (clean := clean_name(name)) and not isinstance(module, torch.jit.ScriptModule)
    }
    events: list[tuple[str, str, int, bool]] = []  # what, module, call, whether it is a hidden activation
    functions = _FunctionalActivations()

    def hook(name: str, module: nn.Module, stack: ExitStack) -> None:
        calls = 0

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and _is_site_value(args[0]):
                consumes = next(module.children(), None) is None and not isinstance(module, _CARRYING_MODULES)
                is_activation = consumes and functions.holds(args[0])
                if is_activation:
                    functions.drop(args[0])  # One site is enough, though other modules may take it as well.
                events.append(("input", name, calls, is_activation))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            nonlocal calls
            if _is_site_value(output):
                is_activation = isinstance(module, _ACTIVATION_MODULES)
                if is_activation:
                    functions.drop(output)
                events.append(("output", name, calls, is_activation))
            calls += 1

        stack.callback(module.register_forward_pre_hook(before).remove)
        stack.callback(module.register_forward_hook(after).remove)

    with ExitStack() as stack:
        for name, module in modules.items():
            hook(name, module, stack)
        with observing(view.model, quick=False), functions:
            _tried(view, samples.inputs)
    return _sites_of(events, modules)


def _tried(view: ModelView, inputs: Any) -> Tensor:
    """The model's logits; if it fails, the user needs to hear what to set."""
    try:
        return view.probe.call(view.model, inputs)
    except Exception as error:
        raise ValueError(
            f"The model could not be called on the probe's inputs: {type(error).__name__}: {error}. "
            "Set `forward` (model, inputs) -> logits or `unpack` (batch) -> (inputs, targets) of the Probe."
        ) from error


def _sites_of(events: Sequence[tuple[str, str, int, bool]], modules: Mapping[str, nn.Module]) -> _Trace:
    call_counts: dict[str, int] = defaultdict(int)
    for _, name, call, _ in events:
        call_counts[name] = max(call_counts[name], call + 1)
    trace = _Trace()
    affine_inputs: list[str] = []
    for what, name, call, is_activation in events:
        site = f"{name}@{call}" if call_counts[name] > 1 else name
        if what == "input":
            site += _INPUT
            if isinstance(modules[name], _AFFINE_MODULES):
                affine_inputs.append(site)
        (trace.outputs if what == "output" else trace.inputs).append(site)
        if is_activation and site not in trace.activations:
            trace.activations.append(site)
    trace.activations = trace.activations or affine_inputs[1:]
    return trace

"""Leaving no trace: random-number states, train/eval mode, gradients and buffers are put back as they were."""

from __future__ import annotations

import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grok_callbacks._pooling import quick_pooling
from grok_callbacks._sharding import is_sharded, reshard, unfinished_pass_forgotten

__all__ = ["afresh", "evaluating", "fingerprint", "isolated_rng", "observing", "untouched"]


@contextmanager
def isolated_rng(*owners: object, seed: int | None = None) -> Iterator[None]:
    """Give every random-number generator (torch on all devices, numpy, python) its state back on leaving.

    Args:
        *owners: Objects whose own generators get their states back as well, such as a dataset that augments.
        seed: Start the CPU's generators from here, so that what is drawn inside does not depend on the state outside.
    """
    restore = [_restorer(generator) for generator in _generators_in(owners)]
    python_state = random.getstate()
    # A program that has not imported numpy has no state of it to keep.
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        if seed is not None:
            _seed(seed)
        yield
    finally:
        random.setstate(python_state)
        if numpy is not None and numpy_state is not None:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)
        for put_back in restore:
            put_back()


@contextmanager
def untouched(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Let code look at ``model``, in eval mode: afterwards gradients, modes and random-number states are as they were.

    Gradients are out of sight meanwhile, so a backward pass inside adds nothing to those that training has accumulated.

    Args:
        model: The module that is looked at.
        seed: Starts the generators, so that a measure that draws random numbers is the same on every rank and after a resume.
    """
    reshard(model)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    # A parametrised weight is computed when it is read, and spectral normalisation then moves on unless in eval mode.
    with isolated_rng(seed=seed), torch.inference_mode(False), evaluating(model):
        for parameter, gradient in gradients:
            if gradient is not None:
                parameter.grad = None
        _kept.append(model)
        try:
            yield
        finally:
            _kept.pop()
            for parameter, gradient in gradients:
                if parameter.grad is not gradient:
                    parameter.grad = gradient


@contextmanager
def afresh(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Within :func:`untouched`, have each of several observers find no gradients, the model's modes and seeded generators."""
    _seed(seed)
    with _restored_modes(list(model.modules())):
        try:
            yield
        finally:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = None


# The models within :func:`untouched`: while there is one, the states of numpy's and python's generators are kept already.
_kept: list[nn.Module] = []


def _seed(seed: int) -> None:
    random.seed(seed)
    # Not ``torch.manual_seed``: before CUDA is in use it would leave a seed for it behind.
    torch.default_generator.manual_seed(seed % 2**32)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


@contextmanager
def observing(model: nn.Module, *, grad: bool = False, quick: bool = True) -> Iterator[None]:
    """Run ``model`` in eval mode, eagerly and in its own precision, and leave it exactly as it was.

    Args:
        model: The module to look at; its modes, buffers and attributes come back, and weights that its forward writes to,
            bit for bit. What it logs with ``self.log`` meanwhile is dropped.
        grad: Whether autograd records. Parameters get no gradients as long as ``torch.autograd.grad`` is used.
        quick: Whether layers may come to the same values by other operations than their own.
    """
    # Found once: in a deep model it takes longer than all that follows.
    modules = list(model.modules())
    with ExitStack() as stack:
        # Lightning validates in inference mode, whose tensors could not be used for gradients, nor saved by a metric.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(unfinished_pass_forgotten(model))
        stack.enter_context(torch.enable_grad() if grad else torch.no_grad())
        stack.enter_context(torch.autocast(_device_type(model), enabled=False))
        stack.enter_context(_eager())
        stack.enter_context(_without_fast_path())
        stack.enter_context(_default_dtype(model))
        generators = _generators_of(modules)
        stack.enter_context(_same_draws(generators) if _kept else isolated_rng(*generators))
        stack.enter_context(_restored_buffers(modules))
        stack.enter_context(_restored_attributes(modules))
        stack.enter_context(_restored_weights(model))
        stack.enter_context(_restored_modes(modules))
        _to_eval_mode(modules)
        _mute(modules)
        if quick and not grad:
            stack.enter_context(quick_pooling(modules))
        yield


@contextmanager
def _same_draws(generators: Sequence[Any]) -> Iterator[None]:
    """As :func:`isolated_rng`, but for numpy's and python's common generators."""
    restore = [_restorer(generator) for generator in generators]
    state = torch.get_rng_state()
    # An accelerator's generators are not held by the model; what is drawn there is put back at the measurement's end.
    try:
        yield
    finally:
        torch.set_rng_state(state)
        for put_back in restore:
            put_back()


def fingerprint(model: nn.Module, *, thorough: bool) -> list[int]:
    """Whole numbers that change when something is written into the model's weights or buffers.

    Args:
        model: The module.
        thorough: Whether to add up every bit, at the price of a pass over the weights.
    """
    reshard(model)
    tensors = [*model.parameters(), *model.buffers()]
    versions = [0 if tensor.is_inference() else tensor._version for tensor in tensors]
    if not thorough:
        return versions
    return [*versions, *(int(total) for total in [_sum_of_bits(tensor) for tensor in tensors])]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    local = getattr(tensor, "_local_tensor", tensor).detach()  # Of a DTensor, this rank's shard.
    if local.layout is not torch.strided or local.is_quantized:
        return torch.zeros(())
    if local.is_complex():
        local = torch.view_as_real(local)
    return local.view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _device_type(model: nn.Module) -> str:
    tensor = next(model.parameters(), None)
    device_type = tensor.device.type if tensor is not None else "cpu"
    return device_type if torch.amp.is_autocast_available(device_type) else "cpu"


def _eager() -> AbstractContextManager[object]:
    # Hooks may not run in compiled code. Where nothing has been compiled, dynamo isn't even imported; leave it so.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return cast("AbstractContextManager[object]", torch.compiler.set_stance("force_eager"))


@contextmanager
def _without_fast_path() -> Iterator[None]:
    # In eval mode torch's transformer layers would bypass their children, where activations are to be seen.
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


@contextmanager
def _default_dtype(model: nn.Module) -> Iterator[None]:
    # As Lightning's "-true" precisions do around every step, for models that make tensors as they go.
    before = torch.get_default_dtype()
    own = next((parameter.dtype for parameter in model.parameters() if parameter.dtype in _DEFAULT_DTYPES), before)
    torch.set_default_dtype(own)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_DEFAULT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def _restored_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        for module, training in modes:
            _set_training(module, training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have all modules in eval mode, and back in their own modes afterwards."""
    modules = list(model.modules())
    with _restored_modes(modules):
        _to_eval_mode(modules)
        yield


def _to_eval_mode(modules: Iterable[nn.Module]) -> None:
    # The flag itself: ``train()`` and ``eval()`` may be overridden to do more, and freezing recipes set modules apart.
    for module in modules:
        _set_training(module, False)


def _set_training(module: nn.Module, training: bool) -> None:
    # Modules take a microsecond to set an attribute, of which a deep one has hundreds.
    if module.training != training:
        module.training = training


@contextmanager
def _restored_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    registered = [(module, dict(module._buffers)) for module in modules]
    buffers = [buffer for _, members in registered for buffer in members.values() if buffer is not None]
    copies = [buffer.clone() for buffer in buffers]
    versioned = tuple(buffer for buffer in buffers if not buffer.is_inference())
    # The version counter comes back too, so that it tells of real writes.
    with _unsafe_preserve_version_counter(versioned) if versioned else nullcontext():
        try:
            yield
        finally:
            for module, members in registered:
                # Scripted modules don't let go of theirs.
                if not isinstance(module, torch.jit.ScriptModule):
                    module._buffers.clear()
                    module._buffers.update(members)
            for buffer, copy in zip(buffers, copies, strict=True):
                # Sparse tensors cannot be compared.
                if buffer.layout is not torch.strided or not torch.equal(buffer, copy):
                    buffer.copy_(copy)


# What modules keep outside of parameters and buffers: a counter, a state carried from batch to batch, a metric.

_LARGEST_COPY = 2**16
_CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextmanager
def _restored_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules their attributes back; of lists, dicts and the like their members, of small tensors their values.

    Large tensors and containers are not copied for each pass: of a list what was appended is taken off.
    """
    kept = [(module, *_attributes(module)) for module in modules if not _is_of_torch(module)]
    try:
        yield
    finally:
        for module, attributes, refill in kept:
            present = vars(module)
            for key in present.keys() - attributes.keys() - _OF_EVERY_MODULE:
                del present[key]
            for key, value in attributes.items():
                if present.get(key, _MISSING) is not value:
                    present[key] = value
            for put_back in refill:
                put_back()


_MISSING = object()


def _is_of_torch(module: nn.Module) -> bool:
    """Layers of torch set no attribute in their forward pass."""
    return type(module).__module__.startswith("torch.nn.modules.")


def _attributes(module: nn.Module) -> tuple[dict[str, Any], list[Callable[[], object]]]:
    attributes = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE}
    refill = []
    for value in attributes.values():
        kind = type(value)
        if kind in _CONTAINERS:
            refill.append(_refiller(value))
        elif _is_small_tensor(value):
            refill.append(partial(_rewrite, value, value.detach().clone()))
    return attributes, refill


def _refiller(container: Any) -> Callable[[], object]:
    if len(container) > _LARGEST_COPY:
        return partial(_shorten, container, len(container)) if isinstance(container, list) else _nothing
    return partial(_refill, container, copy(container), _small_tensors(container))


def _small_tensors(container: Any) -> list[tuple[Tensor, Tensor]]:
    members = container.values() if isinstance(container, dict) else container
    return [(each, each.detach().clone()) for each in members if _is_small_tensor(each)]


def _is_small_tensor(value: Any) -> bool:
    return type(value) is Tensor and value.numel() <= _LARGEST_COPY and not value.is_quantized and _has_memory(value)


def _refill(container: Any, members: Any, tensors: Sequence[tuple[Tensor, Tensor]]) -> None:
    # The order too, but only where something has changed: most never do.
    if list(map(id, container)) != list(map(id, members)) or (isinstance(container, dict) and _differ(container, members)):
        container.clear()
        container.extend(members) if isinstance(container, (list, deque)) else container.update(members)
    for tensor, value in tensors:
        _rewrite(tensor, value)


def _differ(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return any(one[key] is not other[key] for key in other)


def _shorten(container: list[Any], length: int) -> None:
    del container[length:]


def _nothing() -> None:
    pass


def _rewrite(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape == value.shape and not torch.equal(tensor, value):
        with torch.no_grad(), _unsafe_preserve_version_counter((tensor,)):
            tensor.copy_(value)


def _mute(modules: Iterable[nn.Module]) -> None:
    # In the instance's attributes, which are restored: what a LightningModule logs in its forward is not of training.
    for module in modules:
        if hasattr(type(module), "log_dict"):
            vars(module).update(log=_log_nothing, log_dict=_log_nothing)


def _log_nothing(*_: Any, **__: Any) -> None:
    pass


# Weights that the forward pass itself writes to, as a layer does that keeps them at unit length: by the outermost module.
_written: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


@contextmanager
def _restored_weights(model: nn.Module) -> Iterator[None]:
    """Give weights back what the pass writes to them. The first whole pass finds out which; later ones copy no others."""
    first = model not in _written and not is_sharded(model)
    candidates = [each for each in (model.parameters() if first else _written.get(model, ())) if not each.is_inference()]
    if not candidates:
        yield
        return
    # The version counter comes back too, so that it tells of real writes.
    with _unsafe_preserve_version_counter(tuple(candidates)):
        copies = {} if first else {parameter: parameter.detach().clone() for parameter in candidates}
        watch = _CopyOnWrite(candidates, copies) if first else nullcontext()
        try:
            with watch:
                yield
            # A pass that failed, or that was none, has not shown what a pass writes to.
            if isinstance(watch, _CopyOnWrite) and watch.has_seen_weights:
                _written[model] = list(copies)
        finally:
            for parameter, value in copies.items():
                _rewrite(parameter, value)


class _CopyOnWrite(TorchDispatchMode):
    """Copies parameters right before an operation that writes to their memory."""

    def __init__(self, parameters: Iterable[nn.Parameter], copies: dict[nn.Parameter, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.has_seen_weights = False
        self._copies = copies
        # Several may lie in one piece of memory, such as those of a recurrent layer.
        self._owners: dict[int, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            if _has_memory(parameter):
                self._owners[parameter.untyped_storage().data_ptr()].append(parameter)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.has_seen_weights = self.has_seen_weights or any(self._owners_of(leaf) for leaf in tree_leaves((args, kwargs)))
        for position, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, value: Any) -> None:
        for owner in self._owners_of(value):
            if owner not in self._copies:
                self._copies[owner] = owner.detach().clone()

    def _owners_of(self, value: Any) -> Sequence[nn.Parameter]:
        if not isinstance(value, Tensor) or not _has_memory(value):
            return ()
        return self._owners.get(value.untyped_storage().data_ptr(), ())


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.untyped_storage().nbytes() > 0


# Random-number generators that objects keep to themselves.

_MAX_DEPTH = 4
_MAX_ITEMS = 64


def _generators_of(modules: Iterable[nn.Module]) -> list[Any]:
    # No deeper than attributes: a LightningModule holds its Trainer.
    kinds = _generator_kinds()
    return [
        value
        for module in modules
        for value in module.__dict__.values()
        if type(value) not in _COMMON_ATTRIBUTES and isinstance(value, kinds)
    ]


# Types of most of a module's attributes: a look into a set is quicker than asking what each is an instance of.
_COMMON_ATTRIBUTES = frozenset({bool, int, float, str, tuple, list, set, dict, OrderedDict, type(None)})


def _generators_in(roots: Iterable[object]) -> list[Any]:
    """Generators among objects, in their attributes and small containers; data are not searched."""
    kinds = _generator_kinds()
    found: dict[int, Any] = {}
    seen: set[int] = set()

    def search(value: Any, depth: int) -> None:
        if isinstance(value, kinds):
            found[id(value)] = value
        elif depth < _MAX_DEPTH and id(value) not in seen and not isinstance(value, (Tensor, nn.Module, str, type)):
            seen.add(id(value))
            for member in _members(value):
                search(member, depth + 1)

    for root in roots:
        search(root, 0)
    return list(found.values())


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values() if len(value) <= _MAX_ITEMS else ()
    if isinstance(value, (list, tuple, set)):
        return value if len(value) <= _MAX_ITEMS else ()
    return getattr(value, "__dict__", {}).values()


def _generator_kinds() -> tuple[type, ...]:
    numpy = sys.modules.get("numpy")
    own = () if numpy is None else (numpy.random.Generator, numpy.random.RandomState)
    return (torch.Generator, random.Random, *own)


def _restorer(generator: Any) -> Callable[[], object]:
    """What puts a generator's present state back."""
    if isinstance(generator, random.SystemRandom):
        return lambda: None  # Has no state.
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if hasattr(generator, "bit_generator"):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return partial(generator.set_state, generator.get_state())

"""Shallow copies of data sets and samplers, so that what indexing changes in them is changed in the copies."""

from __future__ import annotations

import copy
import copyreg
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import Thread
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

__all__ = ["copies"]

T = TypeVar("T")

_MAX_DEPTH = 8
# Larger containers are copied, but not searched for data sets; nor are any when so many members have been seen.
_MAX_ITEMS = 1024
_MOST_SEARCHED = 2**16
_CONTAINERS = (list, dict, set, deque)
_NEVER = (Tensor, nn.Module, type, ModuleType, FunctionType)
# Objects of these packages that are neither data sets nor samplers have no state that indexing changes, or are meant to be
# shared: queues, locks, Trainers.
_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy", "lightning", "pytorch_lightning"})


@contextmanager
def copies() -> Iterator[Callable[[Any], Any]]:
    """Within, a function that copies objects without the data in them.

    Copied are data sets, samplers and plain objects, their lists, dictionaries, sets and deques, and what is in turn in these;
    bound methods are bound to the copies. Tensors and arrays are shared, and so is what cannot be copied, such as an open
    file. An object that is met twice is copied once.
    """
    copier = _Copier()
    try:
        yield copier.of
    finally:
        copier.forget()


class _Copier:
    def __init__(self) -> None:
        # The originals are held as well: another object could get the place in memory that tells one from the others.
        self._twins: dict[int, tuple[Any, Any]] = {}
        self._searched = 0

    def of(self, value: T, depth: int = 0) -> T:
        if id(value) in self._twins:
            return cast("T", self._twins[id(value)][1])
        if depth > _MAX_DEPTH:
            return value
        if isinstance(value, MethodType):
            owner = self.of(value.__self__, depth)
            return value if owner is value.__self__ else cast("T", MethodType(value.__func__, owner))
        if type(value) is tuple:
            return cast("T", self._tuple(cast("tuple[Any, ...]", value), depth))
        twin = _shallow(value)
        if twin is value:
            return value
        self._twins[id(value)] = (value, twin)
        self._go_down(twin, depth + 1)
        return twin

    def _tuple(self, value: tuple[Any, ...], depth: int) -> tuple[Any, ...]:
        if len(value) > _MAX_ITEMS:
            return value
        members = tuple(self.of(member, depth + 1) for member in value)
        return value if all(new is old for new, old in zip(members, value, strict=True)) else members

    def _go_down(self, twin: Any, depth: int) -> None:
        if isinstance(twin, (list, deque)):
            places: Any = twin
            members = list(enumerate(twin)) if len(twin) <= _MAX_ITEMS else []
        elif isinstance(twin, set):
            return
        else:
            # Into the dictionary itself: a class may do more when an attribute is set.
            places = twin if isinstance(twin, dict) else vars(twin)
            members = list(places.items()) if len(places) <= _MAX_ITEMS else []
        self._searched += len(members)
        for place, member in members if self._searched <= _MOST_SEARCHED else ():
            new = self.of(member, depth)
            if new is not member:
                places[place] = new
        for slot in copyreg._slotnames(type(twin)):  # type: ignore[attr-defined]
            if hasattr(twin, slot):
                setattr(twin, slot, self.of(getattr(twin, slot), depth))

    def forget(self) -> None:
        """Let go of the copies without their finalisers, which could close what they share with the originals."""
        for _, twin in self._twins.values():
            if hasattr(type(twin), "__del__"):
                try:
                    twin.__class__ = _Shell
                except TypeError:
                    _undying.append(twin)
        self._twins.clear()


class _Shell:
    """What an object with a finaliser turns into to get rid of it."""


# Copies whose finalisers could not be taken away.
_undying: list[Any] = []


def _shallow(value: T) -> T:
    """A copy that shares all attributes, or the object itself where that can't be had."""
    cls = type(value)
    if isinstance(value, _CONTAINERS):
        return _copied(value)
    is_plain = _is_plain(cls)
    if not (isinstance(getattr(value, "__dict__", None), dict) and _may_change(value, is_plain)):
        return value
    if not is_plain:
        return _copied(value)
    try:
        # Not ``copy.copy``: it asks the empty copy for methods; a ``__getattr__`` that asks what is wrapped then never ends.
        twin = object.__new__(cls)
        vars(twin).update(vars(value))
    except Exception:
        return value
    return twin


def _may_change(value: Any, is_plain: bool) -> bool:
    """Whether indexing may change something in an object, and only there."""
    # A thread goes on to fill the original's queue, not the copy's.
    if isinstance(value, _NEVER) or any(isinstance(member, (Thread, BaseProcess)) for member in vars(value).values()):
        return False
    is_foreign = type(value).__module__.partition(".")[0] in _FOREIGN
    return isinstance(value, (Dataset, Sampler)) or (is_plain and not is_foreign)


def _copied(value: T) -> T:
    try:
        twin = copy.copy(value)
    except Exception:
        return value
    return twin if type(twin) is type(value) else value


_COPYING_METHODS = (
    "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__getnewargs__", "__getnewargs_ex__",
)  # fmt: skip


def _is_plain(cls: type) -> bool:
    """Whether an object of this class is no more than its attributes."""
    default = all(getattr(cls, name, None) is getattr(object, name, None) for name in _COPYING_METHODS)
    return default and not copyreg._slotnames(cls)  # type: ignore[attr-defined]

"""What ``GROK_CALLBACKS`` may name: a preset, or a YAML file that lists callbacks and mixins with their settings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml

import grok_callbacks
from grok_callbacks._auto import VARIABLE
from grok_callbacks._compat import Callback, MisconfigurationException
from grok_callbacks.callbacks.monitor import Monitor
from grok_callbacks.callbacks.presets import PRESETS, preset_monitors
from grok_callbacks.mixins import Mixin
from grok_callbacks.probe import Probe
from grok_callbacks.schedule import Budget

__all__ = ["read"]

_KEYS = ("preset", "options", "callbacks", "mixins")
_OPTIONS = ("probe", "schedule", "budget", "prefix", "on_error")


def read(setting: str) -> tuple[list[Any], list[Mixin]]:
    """The callbacks and mixins that a value of ``GROK_CALLBACKS`` stands for.

    Args:
        setting: The name of a preset, or the path of a configuration.

    Returns:
        New callbacks, those of a preset first, and new mixins.

    Raises:
        MisconfigurationException: If it is neither, or something in the configuration cannot be made.
    """
    try:
        return _built({"preset": setting} if setting in PRESETS else _load(setting))
    except (ValueError, TypeError) as error:
        raise MisconfigurationException(f"{VARIABLE}={setting}: {error}") from error


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML as everybody writes it: ``1e-2`` is a number, ``on`` and ``off`` are words."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse a key that stands twice, of which YAML would silently take the last."""
        names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {', '.join(twice)} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def _load(path: str) -> Mapping[str, Any]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"neither a preset ({', '.join(PRESETS)}) nor the path of a YAML file that can be read: {error}"
        ) from error
    try:
        loaded = yaml.load(text, _Loader)  # A SafeLoader: it makes plain values only.
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"the file must hold a mapping with some of the keys {list(_KEYS)}, not a {type(loaded).__name__}")
    return loaded


def _built(config: Mapping[str, Any]) -> tuple[list[Any], list[Mixin]]:
    _refuse_unknown(config, _KEYS, "the file")
    if not any(config.get(key) for key in ("preset", "callbacks", "mixins")):
        raise ValueError("nothing to attach: give `preset`, `callbacks` or `mixins`")
    options = _arguments(Monitor, _given(config, "options", {}), "options")
    _refuse_unknown(options, _OPTIONS, "`options`")
    listed = [_parts(item, f"callbacks[{number}]") for number, item in enumerate(_list_in(config, "callbacks"))]
    makers = [make for make, _, _ in listed]
    preset = preset_monitors(config["preset"]) if config.get("preset") else []
    # A monitor that is listed has settings of its own, and takes the place of the preset's.
    preset = [cls for cls in preset if not any(isinstance(make, type) and issubclass(make, cls) for make in makers)]
    if options.get("budget") is not None:
        options["budget"] = Budget.of(options["budget"])  # One for all.
    callbacks: list[Any] = []
    for cls in preset:
        callbacks.append(_called(cls, options, f"options: {cls.__name__}"))
        callbacks[-1].optional = True
    for make, given, where in listed:
        arguments = {**(options if _is_monitor(make) else {}), **_arguments(make, given, where)}
        callbacks.append(_checked(_called(make, arguments, where), where))
    return callbacks, [_mixin(item, f"mixins[{number}]") for number, item in enumerate(_list_in(config, "mixins"))]


def _is_monitor(make: Any) -> bool:
    return isinstance(make, type) and issubclass(make, Monitor)


def _checked(callback: Any, where: str) -> Any:
    bases = [base for base in Callback.__mro__ if base.__name__ == "Callback"]
    if not isinstance(callback, tuple(bases)):
        hint = "; list it under `mixins`" if isinstance(callback, Mixin) else ""
        raise ValueError(f"{where}: a {type(callback).__name__} is no callback{hint}")
    return callback


def _mixin(item: Any, where: str) -> Mixin:
    mixin = _made(item, where)
    if not isinstance(mixin, Mixin):
        raise ValueError(f"{where}: a {type(mixin).__name__} is no mixin")
    return mixin


def _list_in(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    items = _given(config, key, [])
    if not isinstance(items, list):
        raise ValueError(f"`{key}` must be a list, not a {type(items).__name__}")
    return items


def _given(mapping: Mapping[str, Any], key: str, default: Any) -> Any:
    """What a key holds; one that is written and left empty has the default, but no other empty value has."""
    value = mapping.get(key)
    return default if value is None else value


def _refuse_unknown(given: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; there are {list(known)}")


# Objects from their description.


def _made(item: Any, where: str) -> Any:
    make, given, where = _parts(item, where)
    return _called(make, _arguments(make, given, where), where)


def _parts(item: Any, where: str) -> tuple[Callable[..., Any], Mapping[str, Any], str]:
    """What to call with which arguments, and where that stands, for messages."""
    item = {"class_path": item} if isinstance(item, str) else item
    if not isinstance(item, Mapping) or not isinstance(item.get("class_path"), str):
        raise ValueError(f"{where}: give a name, or a mapping with `class_path` and `init_args`, not {item!r}")
    _refuse_unknown(item, ("class_path", "init_args"), where)
    given = _given(item, "init_args", {})
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: `init_args` must be a mapping, not a {type(given).__name__}")
    return _imported(item["class_path"], where), given, f"{where}: {item['class_path']}"


def _called(make: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    try:
        return make(**arguments)
    except Exception as error:
        raise ValueError(f"{where}: {error}") from error


def _arguments(make: Callable[..., Any], given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: must be a mapping, not a {type(given).__name__}")
    annotations = _annotations(make)
    return {name: _value(value, annotations.get(name, ""), f"{where}: {name}") for name, value in given.items()}


def _value(value: Any, annotation: str, where: str) -> Any:
    """An argument, of which YAML holds a number, a word, or a description."""
    if isinstance(value, list):
        return [_value(item, "", where) for item in value]
    if isinstance(value, Mapping):
        if "class_path" in value:
            return _made(value, where)
        return _called(Probe, _arguments(Probe, value, where), where) if "Probe" in annotation else value
    if isinstance(value, str) and "Schedule" in annotation:
        return _made(value, where)
    if isinstance(value, str) and "Callable" in annotation:
        return _imported(value, where)
    return value


def _annotations(make: Callable[..., Any]) -> dict[str, str]:
    """The type of each argument as it is written, those that ``**kwargs`` hands on to a base class included."""
    if not isinstance(make, type):
        initialisers: list[Any] = [make]
    else:
        initialisers = [vars(base)["__init__"] for base in reversed(make.__mro__[:-1]) if "__init__" in vars(base)]
    return {
        name: str(parameter.annotation)
        for initialiser in initialisers
        for name, parameter in inspect.signature(initialiser).parameters.items()
    }


def _imported(path: str, where: str) -> Callable[..., Any]:
    """What a dotted path, or a public name of this package, stands for."""
    found = _public(path, where) if "." not in path else _dotted(path, where)
    if not callable(found):
        raise ValueError(f"{where}: {path!r} is neither a class nor a function")
    return cast("Callable[..., Any]", found)


def _public(name: str, where: str) -> Any:
    names = [public for public in dir(grok_callbacks) if not public.startswith("_")]
    if name not in names:
        raise ValueError(f"{where}: {name!r} is no dotted path, and none of grok_callbacks' {', '.join(names)}")
    return getattr(grok_callbacks, name)


def _dotted(path: str, where: str) -> Any:
    module, *rest = path.split(".")
    try:
        found = import_module(module)
        for number, name in enumerate(rest):
            if not hasattr(found, name):
                import_module(".".join([module, *rest[: number + 1]]))
            found = getattr(found, name)
    except Exception as error:
        # Importing runs the user's code, which can fail in any way.
        raise ValueError(f"{where}: {path!r} cannot be imported: {type(error).__name__}: {error}") from error
    return found

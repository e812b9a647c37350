"""The configuration: frozen dataclasses, two levels, one YAML file.

Precedence: defaults < recipe < preset < flags < `section.key=value`. A value is checked against its annotation, a key against
the fields, and both answer with the nearest accepted spelling. The field comments are the reference documentation.
No torch: every login-node command imports this.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from fixres_dist.base.errors import UserError, unknown
from fixres_dist.config.schema import Config

# What may differ between two starts of one run: it changes speed, place or reporting, never the result's meaning.
OPERATIONAL = {
    "cluster": "*",
    "data": {
        "root",
        "workers",
        "backend",
        "cache",
        "on_bad",
        "deny_list",
        "hw_decoder_load",
        "preallocate_width",
        "preallocate_height",
    },
    "run": {
        "optimizer",
        "activation_checkpointing",
        "log_every",
        "save_every_s",
        "batch_per_device",
        "memory_format",
        "compile",
        "engine",
        "feature_cache",
        "record_samples",
    },
}


def parse(cls: type, values: Any, where: str = "") -> Any:
    """`values` (from YAML or the command line) as a `cls`; raises UserError for a key or value that does not fit."""
    if not isinstance(values, Mapping):
        raise UserError(
            f"{where or 'the configuration'} is {values!r}; accepted: a mapping of {', '.join(names(cls))}."
        )
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown(
                "key", f"{where}.{key}" if where else key, [f"{where}.{n}" if where else n for n in names(cls)]
            )
    return cls(**{key: convert(value, hints[key], f"{where}.{key}" if where else key) for key, value in values.items()})


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it; text is read as that type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        inner, alternative = get_args(hint)  # `X | None` or `int | Literal["auto"]`
        if alternative is type(None):
            return None if value is None or value == "null" else convert(value, inner, where)
        if value in get_args(alternative):
            return value
        try:
            return convert(value, inner, where)
        except UserError as error:
            raise UserError(f"{str(error).rstrip('.')}, {', '.join(get_args(alternative))}.") from None
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where)  # type: ignore[arg-type]
    if origin is Literal:
        if value not in get_args(hint):
            raise unknown(f"value for {where}", value, get_args(hint))
        return value
    if origin is tuple:
        items = read_yaml(value) if isinstance(value, str) and value.startswith("[") else value
        return tuple(str(item) for item in (items if isinstance(items, list | tuple) else [items]))
    if origin is not None:  # Mapping[str, str]
        items = read_yaml(value) if isinstance(value, str) else value
        if not isinstance(items, Mapping):
            raise UserError(f"{where} is {value!r}; accepted: a mapping such as {{NAME: value}}.")
        return {str(key): str(item) for key, item in items.items()}
    if hint is bool:
        flag = {"true": True, "false": False}.get(str(value).lower())
        if flag is None:
            raise UserError(f"{where} is {value!r}; accepted: true, false.")
        return flag
    if hint is str:
        return "" if value is None else str(value)
    try:
        number = hint(str(value)) if hint is int else float(value)  # int("1.5") refuses; YAML reads 1e-3 as text
        if isinstance(value, bool) or number != number or number in (float("inf"), float("-inf")):
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{where} is {value!r}; accepted: {'a whole number' if hint is int else 'a number'}.") from None
    return number


def read_yaml(text: str) -> Any:
    """YAML whose scalars stay text: `convert` knows the type that is wanted, YAML 1.1 would read 24:00:00 as 86400."""
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the configuration: {error}") from None


def names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two-level mappings, `over` winning key by key; a section set to None goes."""
    merged = {key: dict(value) if isinstance(value, Mapping) else value for key, value in base.items()}
    for section, values in over.items():
        if isinstance(values, Mapping) and isinstance(merged.get(section), Mapping):
            merged[section] = {**merged[section], **values}
        else:
            merged[section] = values
    return merged


def overrides(items: list[str]) -> dict[str, dict[str, Any] | None]:
    """`["tune.epochs=3"]` as a two-level mapping; keys are checked by `parse`. `pretrain=none` drops stage one."""
    result: dict[str, Any] = {}
    for item in items:
        path, equals, value = item.partition("=")
        if item == "pretrain=none":
            result["pretrain"] = None
            continue
        section, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise UserError(f"cannot read {item!r}; accepted: section.key=value, such as tune.epochs=3.")
        hints = get_type_hints(Config)
        if section not in hints:
            raise unknown("section", section, hints, "Keys are written section.key=value.")
        result.setdefault(section, {})[key] = value
    return result


def load(text: str) -> Config:
    """The configuration a YAML text describes; `load(dump(c)) == c`."""
    return parse(Config, read_yaml(text) or {})


def dump(config: Config) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, width=120)


def plain(config: Config) -> dict[str, Any]:
    """The configuration as plain containers, ready for YAML or JSON."""
    values = dataclasses.asdict(config)
    values["cluster"]["env"] = dict(values["cluster"]["env"])
    for key in ("setup", "srun_args"):
        values["cluster"][key] = list(values["cluster"][key])
    return values


def identity(config: Config) -> dict[str, Any]:
    """What makes two starts the same run: the configuration without its operational keys."""
    return {
        section: {k: v for k, v in values.items() if k not in OPERATIONAL.get(section, ())} if values else values
        for section, values in plain(config).items()
        if OPERATIONAL.get(section) != "*"
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`["tune.base_lr 0.001 -> 0.002"]`: where two identities differ."""
    lines = []
    for section in {**old, **new}:
        a, b = old.get(section) or {}, new.get(section) or {}
        lines += [f"{section}.{k} {a.get(k)} -> {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]
    return lines

"""Reading, merging and comparing configurations, whose fields are in schema.py: YAML files and `section.key=value`.

Precedence: defaults < recipe < preset < flags < `section.key=value`. A value is checked against its annotation, a key
against the fields; a UserError names the nearest accepted spelling. No torch: every login-node command imports this.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fixres_dist.base.environment import slurm_file
from fixres_dist.base.errors import UserError, unknown
from fixres_dist.base.secrets import REDACTED, is_secret, without_secrets
from fixres_dist.base.small_files import read_text
from fixres_dist.config.schema import Config

Section = TypeVar("Section")
LONGEST_YAML = 1 << 20  # characters: a class list or a script does not belong into a configuration
MOST_VALUES = 100_000
EMPTY = (None, "", "null", "~")  # a key that YAML leaves empty, as one whose lines are all comments
DEEPEST = 200  # brackets within brackets: the time that YAML takes grows with their square

# Keys in which two starts of one run may differ: they change speed, place or reporting, never the result's meaning.
# The whole section `cluster` is among them.
OPERATIONAL = {
    "data": {
        *(
            "root",
            "train_split",
            "val_split",
            "labels",
            "workers",
            "backend",
            "cache",
            "on_bad",
            "max_skipped",
            "deny_list",
        ),
        *("max_pixels", "max_file_mib", "hw_decoder_load", "preallocate_width", "preallocate_height"),
    },
    "run": {
        *("optimizer", "activation_checkpointing", "batch_per_device", "memory_format", "compile"),
        *(
            "deterministic",
            "engine",
            "feature_cache",
            "log_every",
            "save_every_s",
            "watchdog_s",
            "record_samples",
            "profile",
            "logger",
        ),
    },
}


def parse(cls: type[Section], values: Any, where: str = "") -> Section:
    """`values` (from YAML or the command line) as a `cls`; raises UserError for a key or value that does not fit."""
    hints, prefix = get_type_hints(cls), f"{where}." if where else ""
    if not isinstance(values, Mapping):
        raise UserError(f"{where or 'the configuration'} is {values!r}; accepted: a mapping of {', '.join(hints)}.")
    for key in values:
        if key not in hints:
            raise unknown("key", f"{prefix}{key}", [f"{prefix}{name}" for name in hints])
    return cls(**{key: convert(value, hints[key], f"{prefix}{key}") for key, value in values.items()})


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it; text is read as that type."""
    origin, accepted = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner, alternative = accepted  # `X | None` or `int | Literal["auto"]`
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
        if value not in accepted:
            raise unknown(f"value for {where}", value, accepted)
        return value
    if origin is tuple:
        if value in EMPTY:
            return ()
        items = read_yaml(value) if isinstance(value, str) and value.startswith("[") else value
        items = items if isinstance(items, list | tuple) else [items]
        return tuple(convert(item, accepted[0], where) for item in items)
    if origin is not None:  # Mapping[str, str]
        if value in EMPTY:
            return {}
        items = read_yaml(value) if isinstance(value, str) else value
        if not isinstance(items, Mapping):
            raise UserError(f"{where} is {value!r}; accepted: a mapping such as {{NAME: value}}.")
        for key, item in items.items():
            if isinstance(item, Mapping | list | tuple):
                raise UserError(f"{where} has {item!r} at {key}; accepted: one value for each name.")
        return {str(key): str(item) for key, item in items.items()}
    if hint is str:
        if isinstance(value, Mapping | list | tuple):
            raise UserError(
                f"{where} is {value!r}; accepted: text, such as n1,n2, in quotes where it begins with a bracket."
            )
        return "" if value is None else str(value)
    if hint is bool:
        if (text := str(value).lower()) not in ("true", "false"):
            raise UserError(f"{where} is {value!r}; accepted: true, false.")
        return text == "true"
    try:
        number = hint(str(value)) if hint is int else float(value)  # int("1.5") refuses; YAML reads 1e-3 as text
        if isinstance(value, bool) or not math.isfinite(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where} is {value!r}; accepted: {'a whole number' if hint is int else 'a number'}.") from None
    return number


def read_yaml(text: str) -> Any:
    """YAML whose scalars stay text: `convert` knows the wanted type, and YAML 1.1 would read 24:00:00 as 86400.

    Raises UserError for text that is no YAML, and for one that a few hundred settings do not explain.
    """
    if len(text) > LONGEST_YAML:
        raise UserError(f"the configuration has {len(text):,} characters; accepted: {LONGEST_YAML:,}.")
    if max(accumulate(("[{".count(c) - "]}".count(c) for c in text if c in "[]{}"), initial=0)) > DEEPEST:
        raise UserError("cannot read the configuration: it is nested too deeply. Accepted: two levels.")
    try:
        found = yaml.load(text, Loader=yaml.BaseLoader)
        values = count_values(found, {})
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the configuration: {error}") from None
    except RecursionError:
        raise UserError("cannot read the configuration: it is nested too deeply. Accepted: two levels.") from None
    if values > MOST_VALUES:
        raise UserError(f"the configuration has {values:,} values, its aliases written out; accepted: {MOST_VALUES:,}.")
    return found


def count_values(value: Any, known: dict[int, int]) -> int:
    """How many values YAML has once its aliases are written out: a few lines of aliases to aliases would fill the memory."""
    if not isinstance(value, Mapping | list):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(count_values(part, known) for part in parts)
    return known[id(value)]


def read_sections(file: Path) -> dict[str, Any]:
    """The sections of a YAML file that is laid over others, such as a profile; raises UserError for anything else."""
    try:
        found = read_yaml(read_text(file, "save it as UTF-8 text")) or {}
    except FileNotFoundError:
        raise UserError(f"{file} is not there. Accepted: a YAML file.") from None
    sections = get_type_hints(Config)
    if not isinstance(found, Mapping):
        raise UserError(
            f"{file} holds {str(found)[:60]!r}; accepted: sections, such as cluster: with a mapping below it."
        )
    if found.get("pretrain") in ("none", "null"):
        found = {**found, "pretrain": None}  # drops stage one
    for section, values in found.items():
        if section not in sections:
            raise unknown("section", section, sections, f"It stands in {file}.")
        if values and not isinstance(values, Mapping):
            raise UserError(f"{file}: section {section} is {str(values)[:60]!r}; accepted: a mapping of its keys.")
    return {section: {} if values == "" else values for section, values in found.items()}


def read_profile(file: Path) -> dict[str, Any]:
    """The sections of --profile FILE; raises UserError."""
    if not file.is_file():
        raise UserError(f"no profile {file}. Accepted: a YAML file such as {slurm_file('profiles/generic.yaml')}.")
    return read_sections(file)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Two-level mappings; `over` wins key by key. A section of it that is None replaces the whole section."""
    merged = {section: dict(values) if isinstance(values, Mapping) else values for section, values in base.items()}
    for section, values in over.items():
        both = isinstance(values, Mapping) and isinstance(merged.get(section), Mapping)
        merged[section] = {**merged[section], **values} if both else values
    return merged


def overrides(items: list[str]) -> dict[str, dict[str, Any] | None]:
    """`["tune.epochs=3"]` as a two-level mapping; `pretrain=none` drops stage one.

    Raises UserError for another form, an unknown section, or a key of the stage one that is dropped; `parse` checks the keys.
    """
    keys: dict[str, Any] = {}
    for item in items:
        path, equals, value = item.partition("=")
        section, dot, key = path.partition(".")
        if item == "pretrain=none":
            continue
        if not (equals and dot and key):
            raise UserError(f"cannot read {item!r}; accepted: section.key=value, such as tune.epochs=3.")
        if section not in (sections := get_type_hints(Config)):
            raise unknown("section", section, sections, "Keys are written section.key=value.")
        keys.setdefault(section, {})[key] = value
    if "pretrain=none" not in items:
        return keys
    if "pretrain" in keys:
        raise UserError(
            f"pretrain=none drops stage one, and pretrain.{next(iter(keys['pretrain']))} is given. "
            "Next: leave out one of the two."
        )
    return {**keys, "pretrain": None}


def load(text: str) -> Config:
    """The configuration a YAML text describes; `load(dump(c)) == c`."""
    return parse(Config, read_yaml(text) or {})


def dump(config: Config, public: bool = False) -> str:
    """YAML; `public`: for readers who are not to see the secrets in it."""
    values = dataclasses.asdict(config)
    if public:
        cluster = values["cluster"]
        hidden = {name: REDACTED for name, value in cluster["env"].items() if value and is_secret(name)}
        values = without_secrets(values, cluster["env"])
        values["cluster"]["env"] |= hidden
        if cluster["on_change"]:  # the address that it calls is often a secret
            values["cluster"]["on_change"] = REDACTED
    return str(yaml.safe_dump(values, sort_keys=False, width=120))


def has_secrets(config: Config) -> bool:
    """Whether what holds all settings of a run must be its owner's alone."""
    return dump(config, public=True) != dump(config)


def identity(config: Config) -> dict[str, Any]:
    """The settings that are equal in all starts of one run: the configuration without its operational keys."""
    return {
        section: {k: v for k, v in values.items() if k not in OPERATIONAL.get(section, ())} if values else values
        for section, values in dataclasses.asdict(config).items()
        if section != "cluster"
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys in which two identities differ: `["tune.base_lr 0.001 -> 0.002"]`."""
    lines = []
    for section in {**old, **new}:
        a, b = old.get(section) or {}, new.get(section) or {}
        lines += [f"{section}.{k} {a.get(k)} -> {b.get(k)}" for k in {**a, **b} if a.get(k) != b.get(k)]
    return lines

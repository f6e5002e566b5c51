"""Which engine, with which options, under which policies: what a command was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from kvplug import parse
from kvplug_evals.models.folder import BUILD_MODELS
from kvplug_evals.served.engine import Engine
from kvplug_evals.served.sglang import SGLang
from kvplug_evals.served.vllm import VLLM

ENGINES: dict[str, type[Engine]] = {each.package: each for each in (VLLM, SGLang)}


def policies(lines: Sequence[str]) -> list[str]:
    """The lines to compare, dense first, none twice. Raises ValueError for a bad line."""
    named = {parse(line): line.strip() for line in reversed(["dense", *lines])}
    return list(reversed(named.values()))


def find_engine(name: str) -> type[Engine]:
    """Raises ValueError that says what to do."""
    if name not in ENGINES:
        raise ValueError(f"--engine must be {' or '.join(ENGINES)}, got {name!r}")
    engine = ENGINES[name]
    if find_spec(engine.package) is None:
        raise ValueError(
            f"{engine.title} is not installed here; run make {engine.make}, or pip install "
            f"'kvplug[{engine.package}]'"
        )
    return engine


def configure(name: str, model: Path, options: Mapping[str, object]) -> Engine:
    """An engine with the options that are not None. Raises ValueError that says what to do."""
    engine = find_engine(name)
    given = {option: value for option, value in options.items() if value is not None}
    for option in given.keys() - {field.name for field in fields(engine)}:
        raise ValueError(f"--{option.replace('_', '-')} is not for {engine.title}; leave it out")
    return engine(model=model, **given)  # type: ignore[arg-type]


def check_model(model: Path) -> None:
    """Raises FileNotFoundError that says how to get one."""
    if not (model / "config.json").exists():
        raise FileNotFoundError(f"there is no model in {model}; {BUILD_MODELS}, or give --model")

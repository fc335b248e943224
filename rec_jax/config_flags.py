"""What the command line says of a config: `--config.a.b=value`."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rec_jax.types import RecJaxError


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Parses argv, and collects `--config.a.b=v` and `--config.a.b v` as overrides."""
    rest, overrides, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--config."):
            key, eq, value = word.removeprefix("--config.").partition("=")
            if not eq and not words:
                raise RecJaxError(f"--config.{key} has no value; write --config.{key}=VALUE")
            overrides.append((key, value if eq else words.pop(0)))
        else:
            rest.append(word)
    return parser.parse_args(rest), overrides


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets `a.b.c` to a value given as text, converted to the type of the value that is there; `stage.NAME.a.b.c` sets it for one stage."""
    names = key.split(".")
    old: Any = config
    for depth, name in enumerate(names):
        if depth == 2 and names[0] == "stage":
            old = config  # a stage holds only what differs: its keys and their types are those of the whole config
        if not isinstance(old, ConfigDict) or name not in old:
            raise RecJaxError(_unknown_key(key, depth, old))
        old = old[name]
    if isinstance(old, ConfigDict):
        raise RecJaxError(f"config.{key} is a group of keys ({', '.join(old)}); set one of them")
    value = _parse(key, text, old)
    node = config
    for name in names[:-1]:
        if name not in node:
            node[name] = ConfigDict()
        node = node[name]
    node[names[-1]] = value


def _unknown_key(key: str, depth: int, node: Any) -> str:
    names = list(node) if isinstance(node, (ConfigDict, Mapping)) else []
    wrong = key.split(".")[depth]
    near = difflib.get_close_matches(wrong, names, n=3) or names
    place = ".".join(["config", *key.split(".")[:depth]])
    return f"config.{key}: {place} has no key {wrong!r}; nearest: {', '.join(near) or 'none (it is a single value)'}"


def _parse(key: str, text: str, old: Any) -> Any:
    """Text -> a value of the type of `old`."""
    if isinstance(old, str):
        return text
    try:
        value: Any = {"true": True, "false": False, "none": None}.get(text.lower(), ...)
        value = ast.literal_eval(text) if value is ... else value
    except (ValueError, SyntaxError, TypeError):
        raise RecJaxError(f"config.{key}={text!r}: expected {type(old).__name__}, like {old!r}") from None
    if isinstance(old, bool) != isinstance(value, bool):
        raise RecJaxError(f"config.{key}={text!r}: expected {type(old).__name__}, like {old!r}")
    if isinstance(old, float) and isinstance(value, int):
        value = float(value)
    if isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if old is not None and not isinstance(value, type(old)):
        raise RecJaxError(f"config.{key}={text!r}: expected {type(old).__name__}, like {old!r}")
    return value

"""What prepared data is known by: its input files by name and content, and the settings that it depends on."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from etils import epath

from rec_jax.config import cache_dir
from rec_jax.config_features import has_columns, has_user_features
from rec_jax.data import folders, readers, vectors
from rec_jax.data.readers import files

FORMAT = 1  # of the prepared folder; raise it when what is written changes
# Settings of config.data that change nothing in the folder; files count by name and content.
NO_PART = ("cache", "path", "items", "negatives", "corpus", "users")
NO_PART_TEXT = ("max_tokens", "tokenizer")
NO_PART_FEATURES = ("missing_feature", "bad_feature")  # of config.data.on_bad, where no feature is named
NO_PART_EMPTY = ("context", "labels", "propensity")  # of config.data.columns


def identify(config: Any) -> tuple[epath.Path, str, list[dict[str, Any]]]:
    """Config -> (prepared folder, fingerprint, input files)."""
    given = [file.path for file in vectors.sources(config.data.features.vectors).values()]
    given += [files.single(config.data.users, "config.data.users").path] if config.data.users else []
    inputs = [_input(path) for path in (*readers.inputs(config.data), *given)]
    settings = settings_of(config)
    whole = {"format": FORMAT, "inputs": inputs, "settings": settings}
    fingerprint = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", config.data.path.rstrip("/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]).strip(".") or "data"
    return cache_dir(config) / f"{name}-{fingerprint[:12]}", fingerprint, inputs


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that the prepared folder depends on."""
    settings = json.loads(config.data.to_json())
    for key in NO_PART:
        settings.pop(key)
    for key in NO_PART_TEXT:
        settings["text"].pop(key)
    # What was prepared before there were these settings stays what it is.
    settings["columns"] = {role: name for role, name in settings["columns"].items() if name or role not in NO_PART_EMPTY}
    if has_columns(config):
        settings["features"]["vectors"] = sorted(vectors.sources(config.data.features.vectors))
    else:
        separator = settings.pop("features")["separator"]
        if has_user_features(config):
            settings["user_features"]["separator"] = separator
    if not has_user_features(config):
        settings.pop("user_features")
    if not settings["event_features"]:
        settings.pop("event_features")
    if not (has_columns(config) or has_user_features(config) or config.data.event_features):
        for key in NO_PART_FEATURES:
            settings["on_bad"].pop(key)
    if not settings["impressions"]["split"]:
        settings.pop("impressions")
    if not settings["filter"]["unseen_items"]:
        settings["filter"].pop("unseen_items")
    if settings["split"]["history"] == "earlier":
        settings["split"].pop("history")
    if settings["split"]["kind"] in ("cold_item", "random") or "impressions" in settings:
        settings["seed"] = config.seed
    return settings


def _input(path: epath.Path) -> dict[str, Any]:
    """Name, size and content of an input file; of a remote one the time of its last change stands for the content."""
    stat = path.stat()
    if not folders.is_local(path):
        return {"name": path.name, "size": stat.length, "changed": stat.mtime}
    with open(path, "rb") as f:
        return {"name": path.name, "size": stat.length, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}

"""Checks of the keys that are about features of items: `config.data.features`, and words of their texts (`config.towers.item.words`)."""

from __future__ import annotations

from ml_collections import ConfigDict

from rec_jax.defaults import defaults
from rec_jax.types import RecJaxError

# Keys that mean nothing where no feature is named: what was made before there were these keys stays what it is.
FEATURES = ("categorical", "multi_hot", "numeric", "vectors")  # kinds of config.data.features
USER_KEYS = ("data.users", "data.user_features")  # likewise, where no feature of users is named
FEATURE_KEYS = (
    "data.features", "data.on_bad.missing_feature", "data.on_bad.bad_feature", "towers.item.features", "towers.item.fusion",
    "towers.item.modality_dropout", "towers.item.words",
)  # fmt: skip


def has_columns(config: ConfigDict) -> bool:
    """Whether the data is prepared with features of items."""
    return any(config.data.features[kind] for kind in FEATURES)


def has_features(config: ConfigDict) -> bool:
    """Whether items have features beside text and IDs: those of the data, or words of their texts."""
    return has_columns(config) or config.towers.item.words > 0


def has_user_features(config: ConfigDict) -> bool:
    """Whether the history tower reads features of users."""
    return any(config.data.user_features.values())


def check_features(config: ConfigDict) -> None:
    """Raises RecJaxError for features that are named twice or cannot be parameters' names, and for keys that do not go together."""
    features, item = config.data.features, config.towers.item
    _check_names("config.data.event_features", config.data.event_features, paths=False)
    for group in ("features", "user_features"):
        for kind in (kind for kind in FEATURES if kind in config.data[group]):
            _check_names(f"config.data.{group}.{kind}", config.data[group][kind], paths=kind == "vectors")
    if config.data.users and not has_user_features(config):
        raise RecJaxError(f"config.data.users={config.data.users!r}: name columns of it in config.data.user_features, or no file")
    if has_user_features(config) and (config.towers.user.kind != "history" or config.batch.cloze):
        raise RecJaxError(
            "config.data.user_features are read by a history tower that sees the past alone: set config.towers.user.kind='history' and "
            "config.batch.cloze=0, or name none"
        )
    attended = config.towers.user.attended
    if not isinstance(attended, tuple) or not set(attended) <= set(config.data.user_features.multi_hot):
        raise RecJaxError(
            f"config.towers.user.attended={attended!r}: expected some of config.data.user_features.multi_hot="
            f"{config.data.user_features.multi_hot!r}, like ('friends',)"
        )
    if (features.multi_hot or config.data.user_features.multi_hot) and not features.separator.strip():
        raise RecJaxError(f"config.data.features.separator={features.separator!r}: expected a character that no value has, like ',' or '|'")
    if item.words < 0:
        raise RecJaxError(f"config.towers.item.words={item.words!r}: must be at least 0; 0 = no words")
    if item.words and not item.text:
        raise RecJaxError(
            f"config.towers.item.words={item.words} are of texts, which config.towers.item.text=False leaves out: set it to 0"
        )
    if not 0 <= item.modality_dropout < 1:
        raise RecJaxError(f"config.towers.item.modality_dropout={item.modality_dropout!r}: must be at least 0 and below 1")
    reference = defaults().towers.item
    for key in ("fusion", "modality_dropout"):
        if item[key] != reference[key] and not has_features(config):
            raise RecJaxError(
                f"config.towers.item.{key}={item[key]!r} is about features, and config.data.features names none, nor are there words"
            )
    if item.features.dim < 0 or (item.features.dim and item.fusion != "concat"):
        raise RecJaxError(
            f"config.towers.item.features.dim={item.features.dim}: a width of their own is for fusion='concat'; 0 = towers.dim"
        )


def _check_names(key: str, names: object, *, paths: bool) -> None:
    if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
        raise RecJaxError(f"{key}={names!r}: expected names, like ('name',)")
    again = [name for n, name in enumerate(names) if name in names[:n]]
    if again:
        raise RecJaxError(f"{key} names {again[0]!r} twice")
    wrong = [name for name in names if not paths and "/" in name]
    if wrong:
        raise RecJaxError(f"{key} names {wrong[0]!r}: a feature's name is part of its parameters', without '/'")


def check_stage(config: ConfigDict, name: str, stage: ConfigDict) -> None:
    """Raises RecJaxError unless a stage's config has the features of the whole: one coding, and the same parameters, serve all stages."""
    groups = {"data.features": lambda c: c.data.features, "data.user_features": lambda c: c.data.user_features}
    groups |= {"towers.item.features": lambda c: c.towers.item.features}
    if config.towers.item.words != stage.towers.item.words:
        raise RecJaxError(f"config.stage.{name}.towers.item.words: all stages have the same words; set config.towers.item.words")
    if config.data.event_features != stage.data.event_features:
        raise RecJaxError(f"config.stage.{name}.data.event_features: all stages have the same data; set config.data.event_features")
    for key, group in groups.items():
        if group(stage).to_dict() != group(config).to_dict():
            raise RecJaxError(f"config.stage.{name}.{key}: all stages have the same features; set config.{key}")

"""Features of users, which the history tower reads: columns of `config.data.users` or of the reader, by the users of the prepared data.

user_features.parquet    of a prepared folder, in the order of its users, as features.parquet is of items
user_features.json       of a workdir: what the towers' numbers mean (`feature_codes`)
"""

from __future__ import annotations

from typing import Any

from rec_jax.config_features import has_user_features
from rec_jax.data import feature_codes, features
from rec_jax.data.feature_codes import Arrays, Coding
from rec_jax.data.prepare import Prepared
from rec_jax.data.start import start_of

CODES = "user_features.json"


def coding_of_run(config: Any, prepared: Prepared) -> Coding | None:
    """The coding that a run begins with, of the workdir that it goes on from where there is one; None without features of users."""
    if not has_user_features(config):
        return None
    columns = features.read_columns(prepared.local, features.USER_FILE)
    key, settings = "config.data.user_features", config.towers.item.features
    made = feature_codes.learn_columns(columns, config.data.user_features, key, settings)
    if config.start.path:
        start = start_of(config)
        if has_user_features(start.config):
            return feature_codes.extended(feature_codes.kept(start.workdir, CODES), made, str(start.workdir))
    return made


def arrays(coding: Coding, prepared: Prepared) -> Arrays:
    """Kind -> name -> one row a user [U, ...]."""
    return coding.of_columns(features.read_columns(prepared.local, features.USER_FILE))

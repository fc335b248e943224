"""Keys about features of events that have a bad value or do not go together."""

import pytest
import tiny

from rec_jax.types import RecJaxError

ON = {"data.event_features": ("kind",), "towers.user.inputs": ("kind",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.user.inputs": ("kind",)}, r"inputs=\('kind',\): expected some of gap, rating, .*config.data.event_features=\(\) too"),
        ({"data.event_features": ("kind",), "towers.user.inputs": ("king",)}, r"expected some of gap, rating, kind, each once"),
        ({"data.event_features": ("rating",)}, r"config.data.event_features names 'rating', which means something else in"),
        ({"data.event_features": ("kind", "kind")}, r"config.data.event_features names 'kind' twice"),
        ({"data.event_features": ("a/b",)}, r"config.data.event_features names 'a/b': a feature's name is part of its parameters'"),
        ({**ON, "objectives.history_views.weight": 0.1}, r"makes views of histories without kind, which the tower reads"),
        ({**ON, "batch.cloze": 0.2}, r"nobody knows the kind of a hidden event, which the tower reads"),
        (
            {"stages": ("a",), "stage": {"a": {"data": {"event_features": ("kind",)}}}},
            r"config.stage.a.data.event_features: all stages have the same data; set config.data.event_features",
        ),
    ],
)
def test_keys_that_do_not_go_together(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**changes)

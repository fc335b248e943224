"""The table and the JSON file."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from rec_jax.eval import report
from rec_jax.types import RecJaxError

RESULTS = {"popularity": {"ndcg@10": 0.018, "hr@10": 0.03}, "model": {"ndcg@10": 0.06123, "hr@10": 0.03, "mrr@10": 0.04}}


def test_table_is_aligned_and_marks_the_best():
    assert report.table(RESULTS, ["ndcg@10", "hr@10", "mrr@10"]) == (
        "            ndcg@10    hr@10  mrr@10\n"
        "----------  -------  -------  ------\n"
        "popularity  0.0180   0.0300*       -\n"
        "model       0.0612*  0.0300*  0.0400\n"
    )
    assert report.table(RESULTS) == report.table(RESULTS, ["ndcg@10", "hr@10", "mrr@10"])
    with pytest.raises(RecJaxError, match="there are hr@10, mrr@10, ndcg@10"):
        report.table(RESULTS, ["auc"])


def test_show_writes_plain_text_off_a_terminal_and_a_grid_on_one():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    plain, terminal = io.StringIO(), Terminal()
    report.show(RESULTS, ["ndcg@10"], title="test", file=plain)
    assert plain.getvalue() == "test\n" + report.table(RESULTS, ["ndcg@10"])
    report.show(RESULTS, ["ndcg@10"], title="test", file=terminal)
    assert "0.0612" in terminal.getvalue()
    assert "popularity" in terminal.getvalue()


def test_json_is_sorted_rounded_and_whole(tmp_path):
    path = tmp_path / "eval" / "test.json"
    figures = {"test/hr@10": np.float32(0.1), "popularity/ndcg@10": 1 / 3, "users": 610, "zero": np.float64(0)}
    report.write_json(path, figures)
    text = path.read_text()
    assert text == '{\n "popularity/ndcg@10": 0.33333333,\n "test/hr@10": 0.1,\n "users": 610,\n "zero": 0.0\n}\n'
    report.write_json(path, dict(reversed(figures.items())))
    assert path.read_text() == text
    assert json.loads(text)["users"] == 610
    assert [p.name for p in path.parent.iterdir()] == ["test.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), "high", None])
def test_what_is_no_finite_number_is_refused_and_the_old_file_stays(tmp_path, value):
    path = tmp_path / "test.json"
    report.write_json(path, {"a": 1.0})
    with pytest.raises(RecJaxError, match="metric 'b'"):
        report.write_json(path, {"a": 2.0, "b": value})
    assert json.loads(path.read_text()) == {"a": 1.0}


def test_a_table_refuses_nan():
    with pytest.raises(RecJaxError, match="model/b"):
        report.table({"model": {"b": float("nan")}})

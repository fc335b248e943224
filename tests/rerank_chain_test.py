"""The command as a user types it: a stage of pairs after a contrastive one, whose best items it ranks anew in the test."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

# One device, as a user has it, not the eight of the other tests.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
CONFIG = '''
"""python -m rec_jax.train --config=chain.py"""

from ml_collections import ConfigDict

from rec_jax import recipes
from rec_jax.defaults import defaults


def get_config(arg=None):
    c = defaults()
    recipes.sequences(c)
    c.data.on_bad.duplicate_event = "keep"
    c.data.text.max_tokens = 16
    c.towers.text.path = "scratch"
    c.towers.text.scratch.update({"layers": 1, "width": 16, "heads": 2, "words": 100})
    c.batch.history_length, c.towers.dim = 16, 16
    c.train.duration, c.train.eval_every, c.train.checkpoint_every = "10 steps", "5 steps", "5 steps"
    c.eval.k, c.eval.baselines = (5, 10), ("popularity",)
    c.stages = ("contrastive", "cross")
    c.stage.contrastive = ConfigDict()
    c.stage.cross = ConfigDict(
        {
            "batch": {"kind": "pairs", "max_items": 32, "pair_negatives": 3, "text_rows": 32, "shards": 2},
            "towers": {"text": {"source": "tokens"}},
            "objectives": {"info_nce": {"weight": 0.0}, "cross": {"weight": 1.0}},
            "train": {"monitor": "valid/pair_mrr"},
            "eval": {"rerank": 10},
        }
    )
    return c
'''


@pytest.mark.slow
def test_a_stage_of_pairs_ranks_the_best_of_the_stage_before_anew(tmp_path):
    random, lines = np.random.default_rng(0), []
    titles = [
        f"{color} {thing}" for color in ("Red", "Green", "Blue", "Black") for thing in ("Car", "House", "Bird", "Tree", "Boat", "Shoe")
    ]
    for user in range(60):
        items = (random.integers(24) + np.cumsum(random.choice([1, 1, 5], random.integers(6, 14)))) % 24
        lines.append(" ".join(map(str, [user, *(items + 1)])))
    (tmp_path / "events.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{n}\t{t}\n" for n, t in enumerate(titles, 1)))
    (tmp_path / "chain.py").write_text(CONFIG)
    words = ["-m", "rec_jax.train", f"--config={tmp_path}/chain.py", f"--workdir={tmp_path}/run", f"--config.data.cache={tmp_path}/cache"]
    files = [f"--config.data.path={tmp_path}/events.txt", f"--config.data.items={tmp_path}/items.tsv"]
    done = subprocess.run([sys.executable, *words, *files], capture_output=True, text=True, timeout=400, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "test: the best 10 by contrastive are ranked anew" in done.stdout
    before, after, last = (
        json.loads((tmp_path / "run" / name / "eval" / "test.json").read_text()) for name in ("contrastive", "cross", "")
    )
    for protocol in ("test", "test_all"):
        assert after[f"{protocol}/hr@10"] == before[f"{protocol}/hr@10"]  # the same ten, in another order
        assert after[f"{protocol}/ndcg@10"] != before[f"{protocol}/ndcg@10"]
    assert last["test/ndcg@10"] == after["test/ndcg@10"]

"""Any data set by path: one user a line, `user item item ...` in time order, with or without a table of item texts.

    python -m rec_jax.train --config=configs/sequences.py --config.data.path=FILE --config.data.items=ITEMS.tsv --workdir=DIR

ITEMS.tsv has `item_id` and text columns (title, categories, genres, brand, author, description). Each history place is trained against
the whole catalogue; text vectors are made once. Amazon Beauty (22,363 users, 12,101 items) on two CPU cores: about 6 minutes when nothing
else runs; test NDCG@10 .048, HR@10 .085 with the history's items removed (README.md, "Other data").
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that a file is read as it should be."""
    c = defaults()
    recipes.sequences(c)
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.eval.max_users = 200
        c.eval.baselines, c.eval.fuse = ("popularity",), ""
    return c

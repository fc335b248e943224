"""Books (goodbooks-10k): which books a user rated 4 or 5; a history is a set.

    python -m rec_jax.train --config=configs/goodbooks.py --config.data.path=DIR --workdir=runs/goodbooks

DIR holds books.csv and ratings.csv, or a part of the ratings as ratings_NAME.csv (Zajac, 2017; CC BY-SA 4.0). 8:1:1 at random by user,
users known by their train events. Test Recall@10, NDCG@10 of one seed on a part of the ratings: the model .143 and .147 and still rising,
EASE .189 and .203, both together .193 and .206; two minutes on two cores.
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be."""
    c = defaults()
    recipes.sets(c)
    c.data.reader = "goodbooks"
    c.data.filter.min_rating = 4.0
    c.data.filter.min_user_events = 5
    c.data.split.history = "train"
    c.batch.history_length = 64
    c.batch.history_rows = 40
    c.towers.item.text = False
    c.train.duration = "20 epochs"
    if arg == "smoke":
        recipes.smoke_of_sets(c)
    return c

"""Content (Anonymous Microsoft web data): which areas of a site a user visited, with the areas' titles; a history is a set.

    python -m rec_jax.train --config=configs/msweb.py --config.data.path=DIR/anonymous-msweb.data --workdir=runs/msweb

The file is that of the UCI KDD archive (Breese et al., 1998). 8:1:1 at random by user, users known by their train events.
Test Recall@10, NDCG@10 of one seed: the model .685 and .446, EASE .715 and .475, both together the same; 36 seconds on two cores.
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be."""
    c = defaults()
    recipes.sets(c)
    c.data.reader = "msweb"
    c.data.split.history = "train"
    # With 286 items the map from a history to a user is most of the model: one that begins near the items had .666 and .413.
    c.towers.user.near_items = False
    c.batch.history_rows = 8
    c.objectives.info_nce.places = 256
    c.objectives.info_nce.positives = 3
    c.train.duration = "10 epochs"
    if arg == "smoke":
        recipes.smoke_of_sets(c)
    return c

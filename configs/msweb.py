"""Content (Anonymous Microsoft web data): which areas of a site a user visited, with the areas' titles; a history is a set.

    python -m rec_jax.train --config=configs/msweb.py --config.data.path=DIR/anonymous-msweb.data --workdir=runs/msweb

The file is that of the UCI KDD archive (Breese et al., 1998). 8:1:1 at random by user, users known by their train events.
After half of the training validation NDCG@10 was .410; the test is not measured.
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
    c.batch.history_rows = 8
    c.objectives.info_nce.places = 256
    c.objectives.info_nce.positives = 3
    c.train.duration = "10 epochs"
    if arg == "smoke":
        recipes.smoke_of_sets(c)
    return c

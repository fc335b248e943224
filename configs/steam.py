"""Games (Steam): who played which game for an hour or more; a history is a set.

    python -m rec_jax.train --config=configs/steam.py --config.data.path=DIR --workdir=runs/steam

DIR holds game_purchase.dat, game_play.dat and item_info.dat (Kaggle "Steam Video Games" as CaseRecommender keeps it). An event's rating is
the hours played; of what was bought, games of at least an hour count, and a target weighs log(1 + hours) in the loss. 8:1:1 at random by
user, users known by their train events. Test Recall@10, NDCG@10 of one seed: the model .346 and .231, EASE .355 and .242, both together
.370 and .248; 44 s on two cores with other work beside it.

What a target weighs (`batch.event_weight`), on the same seed: validation NDCG@10 of the model and with EASE, and their test NDCG@10.

    ""            .2171   .2381   .2259   .2465
    log_rating    .2207   .2387   .2305   .2480
    rating        .1726   .2372   .1900   .2451

On another seed, with a split of its own, validation of the model is .2174 with log_rating and .2147 without, test .2243 and .2231.
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be."""
    c = defaults()
    recipes.sets(c)
    c.data.reader = "steam"
    c.data.filter.min_rating = 1.0
    c.data.filter.min_user_events = 3
    c.data.split.history = "train"
    c.batch.history_rows = 16
    c.batch.event_weight = "log_rating"
    c.objectives.info_nce.places = 16
    c.towers.item.text = False
    c.train.duration = "20 epochs"
    if arg == "smoke":
        recipes.smoke_of_sets(c)
    return c

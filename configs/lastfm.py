"""Music (Last.fm HetRec 2011): who listened to which artist; a history is a set.

    python -m rec_jax.train --config=configs/lastfm.py --config.data.path=DIR --workdir=runs/lastfm

DIR holds user_artists.dat and artists.dat (Cantador et al., 2011; for non-commercial use). The protocol is that of RecBole-GNN's table:
nothing filtered, 8:1:1 at random by user, users known by their train events, every artist ranked, those of the history removed. Test
Recall@10 and NDCG@10, mean and spread of three seeds, each with its own split: the model .222 ± .007 and .212 ± .006, EASE .218 ± .005 and
.213 ± .004, both together .227 ± .007 and .222 ± .005; published, on another draw of the split, LightGCN .206 and .197, MHCN, which reads
friends, .212 and .207. EASE's constants were chosen on another draw of the split, its test in view. Two to four minutes on two cores with
other work beside it, half a minute of it text vectors.
Artists' names and tags are read; counts are not, nor friends, which `--config.data.user_features.multi_hot="('friends',)"` reads. On the
first seed validation NDCG@10 was .1933 with them (.1926 with `towers.user.attended=('friends',)`) and .1922 without, with EASE .2005
(.2003) and .1996; in the test .2067 (.2057) and .2060, by user .0007 ± .0007 apart, with EASE .2176 (.2179) and .2172: no more than
chance.
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be."""
    c = defaults()
    recipes.sets(c)
    c.data.reader = "lastfm"
    c.data.filter.min_user_events = 1
    c.data.split.history = "train"
    # Names and tags of the artists: by words, and as a text vector that begins short.
    c.towers.item.words, c.towers.item.text_length = 32, 1.0
    c.optimizer.learning_rate = 1e-3
    c.train.duration = "100 epochs"
    c.train.eval_every = c.train.checkpoint_every = "20 percent"
    c.eval.ease_popularity_power, c.eval.ease_regularisation = 0.2, 50.0
    if arg == "smoke":
        recipes.smoke_of_sets(c)
        c.towers.text.path = "scratch"
        c.towers.text.scratch.update({"layers": 1, "width": 128, "heads": 2, "words": 2000})
    return c

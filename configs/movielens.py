"""The main job: MovieLens latest-small (embedded), text only, through all-MiniLM-L6-v2.

python -m rec_jax.train --config=configs/movielens.py --workdir=runs/movielens
"""

from rec_jax import config as config_lib

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: the same run in seconds."""
    c = config_lib.defaults()
    c.data.reader = "movielens"
    c.data.path = "builtin:ml-latest-small"
    c.data.text.template = "{title} ({year}). {genres}"
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.eval.max_users = 64
        c.eval.baselines = ("popularity",)
    return c

"""The main job: MovieLens latest-small (embedded) through all-MiniLM-L6-v2, in four stages.

    ./launch/local.sh
    python -m rec_jax.train --config=configs/movielens.py --workdir=runs/movielens

1. `pretrain`: the encoder goes on learning from the titles alone: two dropout views of a text find each other (SimCSE), hidden words are
   told (masked language model).
2. `contrastive`: item vectors (text, words and ID) and the history tower by the recipe of configs/sequences.py, each place against all
   9,724 films, its target and its history's neighbours sharing the weight; text vectors are made once.
3. `task`: the same towers go on with L_CL + lambda L_T, the task being to rank the next film above drawn ones.
4. `distill`: a student without a transformer (the mean of its words' vectors) learns the teacher's softmax over all films, and the labels.
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke", *recipes.VARIANTS)


def get_config(arg=None):
    """`smoke`: all stages in a minute or two, on few users and steps. The others leave a stage out (rec_jax/recipes.py)."""
    c = defaults()
    recipes.sequences(c)
    c.data.reader = "movielens"
    c.data.path = "builtin:ml-latest-small"
    c.data.text.template = "{title} ({year}). {genres}"
    c.data.text.max_tokens = 32
    c.train.eval_every, c.train.patience = "20 percent", 0  # the stages are short
    c.eval.fuse = "sequence_knn"
    c.eval.examples = (
        ("Toy Story (1995)", "Finding Nemo (2003)"),
        ("Alien (1979)", "Blade Runner (1982)"),
        ("Pride & Prejudice (2005)", "Notting Hill (1999)"),
    )

    recipes.four_stages(c, pretrain="20 steps", task="100 steps", distill="50 steps")
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.train.eval_every = "10 steps"
        c.batch.history_length, c.towers.user.layers = 16, 1
        c.eval.max_users = 64
        c.eval.baselines, c.eval.fuse = ("popularity",), ""
        # Made from the titles: the pretrained encoder takes a minute for all of them
        c.towers.text.path = "scratch"
        c.towers.text.scratch.update({"layers": 1, "width": 128, "heads": 2, "words": 2000})
        c.stage.pretrain.train.duration = "2 steps"
        c.stage.task.train.duration = "10 steps"
        c.stage.distill.train.duration = "10 steps"
    elif arg in recipes.VARIANTS:
        recipes.vary(c, arg)
    return c

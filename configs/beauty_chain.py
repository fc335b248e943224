"""The four stages on Amazon Beauty (S3-Rec's file): pre-train, contrast, optimise for the task, distil.

    python -m rec_jax.train --config=configs/beauty_chain.py --workdir=DIR \\
        --config.data.path=Beauty.txt --config.data.items=Beauty.items.tsv

The stages are those of configs/movielens.py with longer trainings: about 19 minutes on two CPU cores with other work beside them; the
student's test NDCG@10 .057, HR@10 .092 (configs/experiments.md).
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke", *recipes.VARIANTS)


def get_config(arg=None):
    """`smoke`: a few steps of each stage, with a small encoder of random weights. The others leave a stage out (rec_jax/recipes.py)."""
    c = defaults()
    recipes.sequences(c)
    # Neighbours as targets are a teacher of another kind, and words, a start near the items and texts that seldom seen items are ranked by
    # are read from texts as the stages are: without them it is seen what the stages add.
    c.objectives.info_nce.neighbour_share = 0.0
    c.objectives.info_nce.label_smoothing, c.objectives.info_nce.mask_history = 0.0, False
    c.batch.drop_events = 0.0
    c.towers.user.near_items, c.towers.user.positions, c.towers.user.layers = False, "learned", 2
    c.towers.item.words, c.towers.item.id_shrinkage = 0, 0.0
    c.optimizer.learning_rate = 3e-3
    c.eval.fuse = "sequence_knn"

    recipes.four_stages(c, pretrain="100 steps", task="2 epochs", distill="3 epochs")
    if arg == "smoke":
        c.towers.text.path = "scratch"
        c.towers.text.scratch.update({"layers": 1, "width": 128, "heads": 2, "words": 2000})
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.eval.max_users = 200
        c.eval.baselines, c.eval.fuse = ("popularity",), ""
        for name in ("pretrain", "task", "distill"):
            c.stage[name].train.duration = "10 steps"
    elif arg in recipes.VARIANTS:
        recipes.vary(c, arg)
    return c

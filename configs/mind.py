"""News (MIND): a click-through task on the items of each impression, measured within impressions as MIND does.

    python -m rec_jax.train --config=configs/mind.py --config.data.path=DIR --workdir=runs/mind

DIR holds behaviors.tsv and news.tsv (Wu et al., 2020; for non-commercial research). Items are texts and ID vectors, users ID vectors; an
MLP reads both with the hour and the day of the week. The parts are cut by date. The table at the end has AUC, MRR and NDCG of the items
shown together (slate_auc and so on), of the model, a logistic regression and a factorisation machine. In the public sample of 5,000
impressions nearly every user is new and most news have no text, so that nothing can be concluded of it: slate_auc .592 of the model,
.594 of the logistic regression, in 20 seconds.
"""

from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be."""
    c = defaults()
    c.data.reader = "mind"
    c.data.on_bad.empty_text = "keep"
    c.data.on_bad.unknown_item = "skip"  # in a part of the data not all news are described
    c.data.filter.min_user_events = 1
    c.data.text.template = "{title}. {categories}"
    c.data.split.kind = "impressions"
    c.data.impressions.split = "temporal"
    c.batch.kind = "impressions"
    c.batch.shards = 4
    c.batch.impressions = 512
    c.towers.user.kind = "id"
    c.towers.item.ids = True
    c.towers.task.kind = "mlp"
    c.towers.task.hidden = (128,)
    c.towers.task.dropout = 0.3
    c.objectives.info_nce.weight = 0.0
    c.objectives.task.weight = 1.0
    c.optimizer.learning_rate = 1e-3
    c.train.duration = "4 epochs"
    c.train.log_every = "20 steps"
    c.train.monitor = "valid/slate_auc"
    c.train.patience = 3
    if arg == "smoke":
        c.towers.text.path = "scratch"
        c.towers.text.scratch.update({"layers": 1, "width": 64, "heads": 2, "words": 2000})
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
    return c

"""Apps with context (Frappe): a click-through task on labelled impressions, two seeded negatives for each use of an app.

    python -m rec_jax.train --config=configs/frappe.py --config.data.path=DIR --workdir=runs/frappe

DIR holds frappe.csv and meta.csv (Baltrunas et al., 2015). Users and items are ID vectors, items' texts beside them; a DCN-v2 head
reads user, item and the context of each use (time of day, weekday, weather, country, city ...). The tables at the end have a logistic
regression and a factorisation machine fitted on the same split: labels of impressions, and 1,000 of the uses (`eval.top_n`), each among
all apps in its context. There HR@10 is .57, the machine's .53, and .75 where a user's own uses are counted, in whatever context.
"""

from rec_jax.defaults import defaults

PRESETS = ("", "smoke")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be."""
    c = defaults()
    c.data.reader = "frappe"
    c.data.on_bad.empty_text = "keep"
    c.data.filter.min_user_events = 1
    c.data.split.kind = "impressions"
    c.data.impressions.split = "random"
    c.batch.kind = "impressions"
    c.batch.shards = 4
    c.batch.impressions = 512
    c.towers.user.kind = "id"
    c.towers.item.ids = True
    c.towers.item.whiten = False
    c.towers.normalize = False
    c.towers.task.kind = "dcn"
    c.towers.task.hidden = (256, 128)
    c.towers.task.cross_layers = 3
    c.towers.task.context_dim = 32
    c.towers.task.dropout = 0.3
    c.towers.task.scale = 1.0
    c.objectives.info_nce.weight = 0.0
    c.objectives.task.weight = 1.0
    c.optimizer.learning_rate = 1e-3
    c.optimizer.weight_decay = (
        2.0  # of what is left each step the learning rate's share: vectors of rare users and apps are learned by heart else
    )
    c.train.duration = "12 epochs"
    c.train.log_every = "100 steps"
    c.train.monitor = "valid/log_loss"
    c.train.monitor_goal = "min"
    c.train.patience = 3
    c.eval.top_n = 1000
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.eval.top_n = 100
    return c

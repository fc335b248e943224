"""Learning from a log whose probabilities are known (Open Bandit): off-policy REINFORCE, and what the policy would have earned.

    python -m rec_jax.train --config=configs/open_bandit.py --config.data.path=DIR/random/men --workdir=runs/bandit

DIR holds POLICY/CAMPAIGN folders with CAMPAIGN.csv and item_context.csv (Saito et al., 2020); give one of them, for the items of one
campaign are never shown in another. The towers are ID vectors, their softmax over the catalogue is the policy; no head is trained, so that
of the click metrics only the AUCs say something. The table at the end has the policy's value by IPS, SNIPS, direct method and doubly
robust, beside the logging and the uniform policy's. On the public sample (10,000 rows and 46 to 69 clicks a log; half a minute) nothing can
be concluded: the intervals of the trained and the logging policy overlap, but for the direct method, whose bias no interval shows.

`:clicks` trains a click model in place of a policy, an MLP on the vectors of user and item with the context: on random/men, with 18
clicks in the test part, an AUC of .486, the logistic regression .502, the factorisation machine .392.
"""

from rec_jax.defaults import defaults

PRESETS = ("", "smoke", "clicks")


def get_config(arg=None):
    """`smoke`: a few steps, to see that the files are read as they should be. `clicks`: a click model in place of a policy."""
    c = defaults()
    c.data.reader = "open_bandit"
    c.data.on_bad.empty_text = "keep"
    c.data.filter.min_user_events = 1
    c.data.split.kind = "impressions"
    c.data.split.valid = 0.2
    c.data.split.test = 0.3
    c.data.impressions.split = "temporal"
    c.batch.kind = "impressions"
    c.batch.shards = 2
    c.batch.impressions = 256
    c.towers.dim = 16
    c.towers.text.path = "scratch"
    c.towers.text.scratch.update({"layers": 1, "width": 32, "heads": 2, "words": 200})
    c.towers.item.ids = True
    c.towers.user.kind = "id"
    c.objectives.info_nce.weight = 0.0
    c.objectives.policy.weight = 1.0
    c.objectives.policy.baseline = 0.005  # the share of clicks: what is not clicked counts against an item too
    c.objectives.policy.temperature = 0.5  # cosines over it: the less a log says, the nearer its policy has to stay to uniform
    c.train.duration = "20 epochs"
    c.train.monitor = "valid/auc"
    if arg == "clicks":
        c.objectives.policy.weight, c.objectives.task.weight = 0.0, 1.0
        c.towers.task.kind = "mlp"
        c.towers.task.hidden = (32,)
        c.towers.task.dropout = 0.3
        c.train.monitor, c.train.monitor_goal = "valid/log_loss", "min"
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
    return c

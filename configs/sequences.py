"""Any data set by path: one user a line, `user item item ...` in time order, with or without a table of item texts.

    python -m rec_jax.train --config=configs/sequences.py --config.data.path=FILE --config.data.items=ITEMS.tsv --workdir=DIR

ITEMS.tsv has `item_id` and text columns (title, categories, genres, brand, author, description). Each history place is trained against
the whole catalogue, with a share of the weight for the neighbours of its newest items; text vectors are made once, and words have
vectors of their own. How long it trains, how wide the towers are, and how strong the means against learning histories by heart, goes by
how often an epoch predicts an item (rec_jax/train/adapt.py).

Test NDCG@10, HR@10 with the history's items removed, and with neighbours' scores beside the model's (README.md, "Results"):
Amazon Beauty (22,363 users, 12,101 items) .075, .125; .077, .127. MovieLens-1M by time (6,040 users, 3,706 items) .205, .345; .206, .346;
SASRec's file of it (3,416 items) .218, .361; .219, .363. Amazon Games 2018 (50,546 users, 16,859 items) .080, .138; .085, .144.

Items of the history are no candidates in training, as in the ranking: where items come again, and `data.on_bad.duplicate_event="keep"`,
set `objectives.info_nce.mask_history=False`.

`large` is for catalogues of millions of items: a step touches the items that it looks up alone. On smaller ones the softmax over all
items is better: on Amazon Beauty `large` has .056, .098.

Presets beside it for comparison: `sasrec` is SASRec (Kang & McAuley 2018) with one drawn negative for each place, `sasrec_ce` the same
with the softmax over the whole catalogue. Both know items by their IDs alone, on dot products, and stop 20 epochs after the best.
`bert4rec` is BERT4Rec (Sun et al. 2019) in the sizes and with the loss of `sasrec_ce`: hidden items are found from both sides; it stops
40 epochs after the best.
"""

from rec_jax import recipes
from rec_jax.defaults import defaults

PRESETS = ("", "smoke", "large", "sasrec", "sasrec_ce", "bert4rec")


def get_config(arg=None):
    """`smoke`: a few steps, to see that a file is read as it should be. The others: see above."""
    c = defaults()
    recipes.sequences(c)
    if arg == "large":
        recipes.large(c)
    if arg in ("sasrec", "sasrec_ce"):
        recipes.sasrec(c, loss="ce" if arg == "sasrec_ce" else "bce")
    if arg == "bert4rec":
        recipes.bert4rec(c)
    if arg == "smoke":
        c.train.duration = "20 steps"
        c.train.log_every = "5 steps"
        c.eval.max_users = 200
        c.eval.baselines, c.eval.fuse = ("popularity",), ""
    return c

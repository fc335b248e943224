"""User sequences: a text file, one user a line, `user item item ...` in time order; with an optional table of items."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data.readers import files, item_file
from rec_jax.data.tables import Report, Tables, bad_input, items_of


def read(data: Any, report: Report) -> Tables:
    """Reads the sequences at `data.path` and the items at `data.items` (TSV or CSV with `item_id`, then columns; "" = titles are ids).

    A user may stand on several lines (one `user item` pair a line, say): they follow each other. A user alone on a line has no events.

    Raises:
      RecJaxError: bad input whose policy is "error".
    """
    file = files.single(data.path)
    users: dict[bytes, int] = {}
    items: dict[bytes, int] = {}
    user, item, time, ends, lines, length = array("i"), array("i"), array("i"), array("q"), array("q"), array("i")
    for number, line in file.lines():
        if not line.isascii():
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as e:
                wrong = line[max(0, e.start - 10) : e.end + 10]
                bad_input(report, data.on_bad, "bad_encoding", f"{file}:{number}", f"{wrong!r} is not UTF-8")
                continue
        name, *sequence = line.split()
        row = users.setdefault(name, len(users))
        if row == len(length):
            length.append(0)
        user.extend([row] * len(sequence))
        item.extend([items.setdefault(token, len(items)) for token in sequence])
        time.extend(range(length[row], length[row] + len(sequence)))
        length[row] += len(sequence)
        ends.append(len(user))
        lines.append(number)
    user_ids, item_ids = (pl.Series([t.decode("utf-8") for t in table], dtype=pl.String) for table in (users, items))
    events = pl.DataFrame(
        {
            "user": user_ids.gather(np.frombuffer(user, np.int32)),
            "item": item_ids.gather(np.frombuffer(item, np.int32)),
            "time": pl.Series(np.frombuffer(time, np.int32)).cast(pl.Int64),
            "rating": pl.Series(np.ones(len(user), np.float32)),
        }
    )
    end, line_of = np.frombuffer(ends, np.int64), np.frombuffer(lines, np.int64)

    def place(row: int) -> str:
        return f"{file}:{line_of[int(np.searchsorted(end, row, side='right'))]}"

    table = pl.DataFrame({"user": user_ids})
    if not data["items"]:
        return Tables(items_of(events), table, events, report, clock=False, event_place=place)
    frame, item_place = item_file.read(data, report, pl.String)
    return Tables(frame, table, events, report, clock=False, event_place=place, item_place=item_place)

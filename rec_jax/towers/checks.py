"""Checks of the keys of `config.towers.item`."""

from __future__ import annotations

from typing import Any

from rec_jax.types import RecJaxError


def check_item(item: Any, *, features: bool) -> None:
    """Checks `config.towers.item`, for items with or without features (or words).

    Raises:
      RecJaxError: id_dropout outside [0, 1) or without IDs, a negative text_length, id_shrinkage or id_buckets, no id_hashes, buckets
        without IDs, id_shrinkage without IDs, without text or with buckets, text_dropout outside [0, 1) or where nothing else is known of
        an item, gates with another fusion or where there is but one thing to weigh.
    """
    if not 0 <= item.id_dropout < 1:
        raise RecJaxError(f"config.towers.item.id_dropout={item.id_dropout!r}: must be at least 0 and below 1")
    if item.id_dropout and not item.ids:
        raise RecJaxError(f"config.towers.item.id_dropout={item.id_dropout!r} drops items' own vectors: set config.towers.item.ids")
    if not item.text and item.id_dropout:
        raise RecJaxError(f"config.towers.item.id_dropout={item.id_dropout!r} leaves nothing of an item without text: set it to 0")
    if item.id_shrinkage < 0:
        raise RecJaxError(f"config.towers.item.id_shrinkage={item.id_shrinkage!r}: must be at least 0, which shrinks nothing")
    if item.id_shrinkage:
        _check_shrinkage(item)
    if item.id_buckets < 0 or item.id_hashes < 1:
        key, least = ("id_buckets", "0, a row for each item") if item.id_buckets < 0 else ("id_hashes", "1")
        raise RecJaxError(f"config.towers.item.{key}={item[key]!r}: must be at least {least}")
    if item.id_buckets and not item.ids:
        raise RecJaxError(
            f"config.towers.item.id_buckets={item.id_buckets} is of items' own vectors: set config.towers.item.ids=True, or it to 0"
        )
    if item.text_length < 0:
        raise RecJaxError(f"config.towers.item.text_length={item.text_length!r}: must be at least 0")
    if not 0 <= item.text_dropout < 1:
        raise RecJaxError(f"config.towers.item.text_dropout={item.text_dropout!r}: must be at least 0 and below 1")
    if item.text_dropout and not (item.text and (item.ids or features)):
        raise RecJaxError(
            f"config.towers.item.text_dropout={item.text_dropout!r} leaves out texts of items that have something else too: set "
            "config.towers.item.ids=True or name features, with config.towers.item.text=True; or set it to 0"
        )
    if item.gates and item.fusion != "sum":
        raise RecJaxError(f"config.towers.item.gates=True weighs a sum, and config.towers.item.fusion={item.fusion!r}: set it to 'sum'")
    if item.gates and not (features or (item.text and item.ids)):
        raise RecJaxError(
            "config.towers.item.gates=True weighs text, own vector and features of an item, and it has but one of them: set "
            "config.towers.item.ids=True or name features, or set it to False"
        )


def _check_shrinkage(item: Any) -> None:
    place = f"config.towers.item.id_shrinkage={item.id_shrinkage!r}"
    if not item.ids:
        raise RecJaxError(f"{place} is of items' own vectors: set config.towers.item.ids=True, or it to 0")
    if not item.text:
        raise RecJaxError(f"{place} trusts the text of a seldom seen item more than its own vector, and items have no text: set it to 0")
    if item.id_buckets:
        raise RecJaxError(f"{place} goes by item, and rows of config.towers.item.id_buckets={item.id_buckets} are shared: set one to 0")

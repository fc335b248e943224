"""The full text of every config and preset: a change of a default shows in the diff. `pytest --update_goldens` writes them anew."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from rec_jax import config as config_lib

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).parent / "goldens" / "configs"


def declared() -> list[tuple[str, str]]:
    """(config name, preset) of every file in configs; each declares `PRESETS = ("", "smoke", ...)`."""
    pairs = []
    for file in sorted((ROOT / "configs").glob("*.py")):
        pairs += [(file.stem, preset) for preset in runpy.run_path(str(file)).get("PRESETS", ("",))]
    return pairs


def golden_of(name: str, preset: str) -> Path:
    return GOLDENS / f"{name}{'_' if preset else ''}{preset}.txt"


@pytest.mark.parametrize(("name", "preset"), declared())
def test_config_text_is_the_golden_one(name, preset, update_goldens):
    config = config_lib.load(f"{ROOT}/configs/{name}.py{':' if preset else ''}{preset}")
    text, golden = config_lib.to_json(config), golden_of(name, preset)
    if update_goldens:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.is_file(), f"{golden} is missing: run pytest tests/config_golden_test.py --update_goldens, and read the diff"
    assert text == golden.read_text(), "the config changed: if meant, run this test with --update_goldens, and read the diff"


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_config_declares_presets_and_says_how_it_is_run(file):
    module = runpy.run_path(str(file))
    presets = module.get("PRESETS")
    assert isinstance(presets, tuple), f'{file.name} has no PRESETS = ("", "smoke")'
    assert presets[:2] == ("", "smoke"), f'{file.name}: PRESETS begins with "", "smoke"'
    assert f"--config=configs/{file.name}" in (module["__doc__"] or ""), f"{file.name}: its docstring gives no command"


def test_the_smoke_preset_differs():
    texts = {(name, preset): config_lib.to_json(config_lib.load(f"{ROOT}/configs/{name}.py:{preset}")) for name, preset in declared()}
    assert len(set(texts.values())) == len(texts), "two configs or presets have the same text"


def test_every_golden_has_its_config():
    assert sorted(GOLDENS.glob("*")) == sorted(golden_of(name, preset) for name, preset in declared())


@pytest.mark.parametrize(("name", "preset"), [pair for pair in declared() if pair[0] in ("beauty_chain", "movielens", "pod", "sequences")])
def test_every_stage_divides_over_a_host_of_eight_devices(name, preset):
    config = config_lib.load(f"{ROOT}/configs/{name}.py{':' if preset else ''}{preset}")
    stages = {stage: config_lib.for_stage(config, stage) for stage in config.stages} or {"the run": config}
    shards = {stage: c.batch.shards for stage, c in stages.items()}
    assert not [stage for stage, count in shards.items() if count % 8], f"batch.shards of {shards}"

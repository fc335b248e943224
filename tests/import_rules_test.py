"""Who may import whom: read from the sources, and tried with everything else away."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Room (the first name below rec_jax) -> the other rooms that it may import. Every room is listed; a `__main__.py` may import any.
BASE = {"types", "config", "config_features", "config_flags", "config_histories", "config_optimizer", "config_places", "mesh", "processes"}
ROOMS = {
    "__init__": set(),
    "types": set(),
    "cli": {"types"},
    "defaults_data": set(),
    "defaults": {"defaults_data"},
    "recipes": set(),
    "config_features": {"types", "defaults"},
    "config_flags": {"types"},
    "config_places": {"types"},
    "config_optimizer": {"types"},
    "config_histories": {"types", "config_places"},
    "config": {"types", "defaults", "config_features", "config_flags", "config_histories", "config_optimizer", "config_places"},
    "processes": {"types"},
    "mesh": {"types", "config", "processes"},
    "checkpoint": {"types", "config", "mesh"},
    "topk": {"types", "config", "mesh", "checkpoint"},
    "data": BASE,
    "towers": BASE,
    "losses": BASE,
    "train": BASE | {"checkpoint", "topk", "data", "towers", "losses"},
    "eval": BASE | {"checkpoint", "topk", "data", "towers"},
    "serve": BASE | {"checkpoint", "topk", "data", "towers", "eval"},
}
# Library -> where it may be imported: a room or a file. An empty tuple: nowhere in rec_jax or configs.
LIBRARIES = {
    "flax": ("rec_jax/towers/",),
    "orbax": ("rec_jax/checkpoint.py",),
    "polars": ("rec_jax/data/",),
    "tensorflow_datasets": ("rec_jax/data/",),
    "array_record": ("rec_jax/data/",),
    "grain": ("rec_jax/data/",),
    "tokenizers": ("rec_jax/data/",),
    "transformers": ("rec_jax/data/",),
    "torch": (),
    "tensorflow": (),
    "configs": (),
    "tests": (),
}
# These run where only jax, flax, optax and what those need are installed.
BARE = ("rec_jax.towers", "rec_jax.losses", "rec_jax.mesh", "rec_jax.topk", "rec_jax.train.step")


def sources() -> list[str]:
    """Every Python file of rec_jax and configs, relative to the project's folder."""
    return sorted(str(p.relative_to(ROOT)) for folder in ("rec_jax", "configs") for p in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, relative ones made absolute; `from a import b` gives a.b."""
    package = list(Path(file).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def violations(text: str, file: str) -> list[str]:
    """What a source file (its text, its path from the project's folder) imports against the rules."""
    found = []
    parts = Path(file).with_suffix("").parts
    room = parts[1] if parts[0] == "rec_jax" else "configs"
    if room not in ROOMS and room != "configs":
        return [f"{file}: room {room!r} has no rule; add it to ROOMS here and to the architecture in CONTRIBUTING.md"]
    allowed = {"config", "defaults", "recipes", "types"} if room == "configs" else ROOMS[room]
    for line, name in imported(ast.parse(text), file):
        top, *rest = name.split(".")
        places = LIBRARIES.get(top)
        if places is not None and not file.startswith(places):
            found.append(f"{file}:{line}: imports {name}; {top} may be imported in {', '.join(places) or 'no file of rec_jax or configs'}")
        if top == "rec_jax" and rest and parts[-1] != "__main__":
            other = rest[0]
            if other == "__main__" or (other in ROOMS and other != room and other not in allowed):
                found.append(f"{file}:{line}: imports {name}; {room} may import {', '.join(sorted(allowed)) or 'nothing of ours'}")
            if "__main__" in rest:
                found.append(f"{file}:{line}: imports {name}; nothing imports a __main__")
    return found


@pytest.mark.parametrize("file", sources())
def test_file_keeps_the_import_rules(file):
    assert violations((ROOT / file).read_text(), file) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("rec_jax/losses/a.py", "from rec_jax.towers import pool", "losses may import"),
        ("rec_jax/losses/a.py", "from rec_jax import towers as t", "losses may import"),
        ("rec_jax/losses/a.py", "import rec_jax.data.text", "losses may import"),
        ("rec_jax/losses/a.py", "from ..towers import pool", "losses may import"),
        ("rec_jax/data/readers/a.py", "from ... import towers", "data may import"),
        ("rec_jax/train/__init__.py", "from ..eval import metrics", "train may import"),
        ("rec_jax/eval/a.py", "def f():\n    from rec_jax.train.state import State", "eval may import"),
        ("rec_jax/types.py", "from . import config", "nothing of ours"),
        ("rec_jax/mesh.py", "from rec_jax.topk import top_k", "mesh may import"),
        ("rec_jax/serve/a.py", "from rec_jax.eval.__main__ import main", "nothing imports a __main__"),
        ("rec_jax/train/a.py", "import flax.linen as nn", "flax may be imported in rec_jax/towers/"),
        ("rec_jax/train/a.py", "from orbax import checkpoint", "orbax may be imported in rec_jax/checkpoint.py"),
        ("rec_jax/serve/__main__.py", "import polars", "polars may be imported in rec_jax/data/"),
        ("rec_jax/towers/a.py", "import importlib\nimportlib.import_module('torch.nn')", "no file of rec_jax"),
        ("rec_jax/data/a.py", "import tensorflow as tf", "no file of rec_jax"),
        ("rec_jax/data/a.py", "from configs import movielens", "no file of rec_jax"),
        ("configs/a.py", "from rec_jax.train import loop", "configs may import config, defaults, recipes, types"),
        ("rec_jax/attic/a.py", "", "has no rule"),
    ],
)
def test_checker_sees_a_violation(file, text, expected):
    (message,) = violations(text, file)
    assert expected in message


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("rec_jax/losses/a.py", "from . import blockwise\nfrom ..types import Batch\nfrom rec_jax import __version__\nimport jax"),
        ("rec_jax/train/a.py", "from rec_jax import towers\nfrom ..losses import info_nce"),
        ("rec_jax/train/__main__.py", "from rec_jax.eval import report"),
        ("rec_jax/towers/a.py", "from flax import linen"),
        ("configs/a.py", "from rec_jax import config as config_lib"),
    ],
)
def test_checker_lets_the_allowed_pass(file, text):
    assert violations(text, file) == []


# Makes modules as good as not installed: their import fails, and `find_spec` finds nothing.
AWAY = """
import importlib, sys

class Without:
    def __init__(self, finder, away):
        self.finder, self.away = finder, away

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self.away else self.finder.find_spec(name, path, target)

def put_away(modules):
    away = set(modules)
    sys.meta_path[:] = [Without(finder, away) for finder in sys.meta_path]

def try_imports(modules):
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as e:
            print(f"{module}: {e}")
"""

BARE_SCRIPT = """
import importlib.metadata as metadata
from packaging.requirements import Requirement

def name_of(text):
    return text.lower().replace("_", "-").replace(".", "-")

kept, waiting = set(), ["jax", "flax", "optax"]
while waiting:
    name = name_of(waiting.pop())
    if name in kept:
        continue
    kept.add(name)
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            waiting.append(requirement.name)
put_away(
    module
    for module, packages in metadata.packages_distributions().items()
    if not any(name_of(p) in kept for p in packages) and module not in sys.stdlib_module_names and module != "rec_jax"
)
try_imports(sys.argv[1:])
"""

EVERY_SCRIPT = """
import pkgutil, rec_jax
put_away(("torch", "tensorflow"))
try_imports(module.name for module in pkgutil.walk_packages(rec_jax.__path__, "rec_jax."))
"""


def run(script: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", script, *args], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_towers_losses_mesh_topk_and_step_need_only_jax_flax_optax():
    lines = run(AWAY + BARE_SCRIPT, *BARE, "rec_jax.config", "polars").splitlines()
    # The last two show that the rest is away.
    assert lines == ["rec_jax.config: No module named 'ml_collections'", "polars: No module named 'polars'"]


def test_every_module_imports_without_torch_and_tensorflow():
    assert run(AWAY + EVERY_SCRIPT) == ""


def test_importing_the_package_imports_no_room():
    loaded = run("import sys, rec_jax; print([m for m in sys.modules if m.startswith('rec_jax.') or m in ('jax', 'flax', 'numpy')])")
    assert loaded == "[]\n"


def test_rules_name_rooms_that_exist():
    assert [room for room in ROOMS if not list((ROOT / "rec_jax").glob(f"{room}*"))] == []

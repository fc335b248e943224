"""The paired bootstrap, the file of per-user values, and the command that compares workdirs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.stats

from rec_jax.cli import main_of
from rec_jax.eval import bootstrap, compare, metrics, rankings
from rec_jax.eval.compare import __main__ as command
from rec_jax.types import EvalSet, Ragged, RecJaxError

USERS = 300


def hits(seed: int, rate: float) -> np.ndarray:
    return (np.random.default_rng(seed).random(USERS) < rate).astype(np.float64)


def test_the_interval_is_near_the_paired_t_interval_and_p_near_its_p():
    random = np.random.default_rng(0)
    b = random.random(USERS)
    a = b + 0.02 + 0.2 * random.normal(size=USERS)
    got = bootstrap.compare(a, b, draws=4000)
    theirs = scipy.stats.ttest_rel(a, b)
    low, high = theirs.confidence_interval(0.95)
    assert got.difference == pytest.approx(a.mean() - b.mean())
    assert (got.a, got.b) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    assert got.low == pytest.approx(low, abs=0.05 * (high - low))
    assert got.high == pytest.approx(high, abs=0.05 * (high - low))
    assert got.p == pytest.approx(theirs.pvalue, abs=0.02)
    assert got == bootstrap.compare(a, b, draws=4000)
    assert got != bootstrap.compare(a, b, draws=4000, seed=1)
    back = bootstrap.compare(b, a, draws=4000)
    assert (back.difference, back.low, back.p) == (pytest.approx(-got.difference), pytest.approx(-got.high), pytest.approx(got.p))


def test_under_no_difference_p_is_below_five_per_cent_about_that_often():
    repeats = 200
    small = sum(bootstrap.compare(*np.random.default_rng(seed).random((2, 100)), draws=300).p < 0.05 for seed in range(repeats))
    assert scipy.stats.binom.ppf(0.0005, repeats, 0.04) <= small <= scipy.stats.binom.ppf(0.9995, repeats, 0.06)


def test_seeds_are_averaged_per_user_first():
    a, b = np.stack([hits(s, 0.3) for s in range(3)]), hits(9, 0.2)
    got = bootstrap.compare(a, b, seed=4)
    want = metrics.paired_bootstrap(a.mean(0), b, seed=4)
    assert (got.difference, got.low, got.high, got.p) == tuple(want[k] for k in ("difference", "low", "high", "p"))
    assert got.spread_a == pytest.approx(np.std(a.mean(1), ddof=1))
    assert got.spread_b is None
    np.testing.assert_array_equal(bootstrap.over_seeds(a), a.mean(0))
    np.testing.assert_array_equal(bootstrap.over_seeds(b), b)
    # The same seed three times is that seed: copies are no new users.
    np.testing.assert_allclose(
        [bootstrap.compare(np.stack([a[0]] * 3), b).low, bootstrap.compare(np.stack([a[0]] * 3), b).p],
        [bootstrap.compare(a[0], b).low, bootstrap.compare(a[0], b).p],
    )


def test_table_by_hand():
    of = lambda *values: bootstrap.Comparison(*values)
    rows = {
        "no pretrain": of(0.05, 0.06, 0.001, 0.002, -0.01, -0.02, -0.005, 0.001),
        "no task": of(0.06, 0.06, None, 0.002, 0, -0.01, 0.01, 1),
    }
    assert bootstrap.table(rows, name="chain") == (
        "               mean  over seeds +-  difference      low     high       p\n"
        "-----------  ------  -------------  ----------  -------  -------  ------\n"
        "chain        0.0600         0.0020           -        -        -       -\n"
        "no pretrain  0.0500         0.0010     -0.0100  -0.0200  -0.0050  0.0010\n"
        "no task      0.0600              -      0.0000  -0.0100   0.0100  1.0000\n"
    )
    one_seed = {"b": of(0.05, 0.06, None, None, -0.01, -0.02, -0.005, 0.001)}
    assert "seeds" not in bootstrap.table(one_seed)
    with pytest.raises(RecJaxError, match="at least one variant"):
        bootstrap.table({})


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones(3), np.ones(4), "a has values of 3 users, b of 4"),
        (np.ones((2, 3, 1)), np.ones(3), "expected \\[U\\], or \\[seeds, U\\]"),
        (np.ones(0), np.ones(0), "expected \\[U\\]"),
        (np.array([1, np.nan]), np.ones(2), "1 of 2 per-user values are not finite"),
    ],
)
def test_bad_values_are_refused(a, b, message):
    with pytest.raises(RecJaxError, match=message):
        bootstrap.compare(a, b)


def rank(seed: int) -> tuple[EvalSet, rankings.Rankings]:
    random = np.random.default_rng(seed)
    eval_set = EvalSet(
        np.arange(40), Ragged.from_rows([[u % 30] for u in range(40)]), Ragged.from_rows([[(u + 7) % 30] for u in range(40)]), 30
    )
    return eval_set, rankings.evaluate_vectors(random.random((40, 8), np.float32), random.random((30, 8), np.float32), eval_set, ks=(5, 10))


def test_what_the_final_test_has_is_written_and_read_back(tmp_path):
    eval_set, ranked = rank(0)
    bootstrap.write_users(tmp_path, "test", eval_set.users, ranked.per_user, fingerprint="abc")
    got = bootstrap.read_users(tmp_path)
    assert got.fingerprint == "abc"
    np.testing.assert_array_equal(got.users, eval_set.users)
    np.testing.assert_array_equal(got.values["ndcg@10"], ranked.per_user["test/ndcg@10"])
    np.testing.assert_array_equal(got.values["test_all/hr@5"], ranked.per_user["test_all/hr@5"])
    assert len(got.values) == len(ranked.per_user)
    first = (tmp_path / "eval" / "test_users.npz").read_bytes()
    bootstrap.write_users(tmp_path, "test", eval_set.users, ranked.per_user, fingerprint="abc")
    assert (tmp_path / "eval" / "test_users.npz").read_bytes() == first
    assert [p.name for p in (tmp_path / "eval").iterdir()] == ["test_users.npz"]


def test_a_plain_npz_of_users_and_metrics_is_enough_and_its_order_does_not_matter(tmp_path):
    (tmp_path / "eval").mkdir()
    np.savez(tmp_path / "eval" / "test_users.npz", **{"users": np.array(["c", "a", "b"]), "ndcg@10": np.array([3, 1, 2])})
    got = bootstrap.read_users(tmp_path)
    assert (list(got.users), list(got.values["ndcg@10"]), got.fingerprint) == (["a", "b", "c"], [1, 2, 3], "")


def write(folder, values, users=None, **options):
    bootstrap.write_users(
        folder, "test", np.arange(len(values)) if users is None else users, {"ndcg@10": values, "hr@10": values}, **options
    )
    return str(folder)


def test_the_command_compares_seeds_and_variants(tmp_path, capsys):
    whole = ",".join(write(tmp_path / f"whole{s}", hits(s, 0.4)) for s in range(2))
    worse, other = write(tmp_path / "worse", hits(7, 0.1)), write(tmp_path / "same", hits(0, 0.4))
    assert command.main([f"--a={whole}", f"--b={worse}", f"--b=no text={other}", "--metrics=ndcg@10"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("test ndcg@10: 300 users, 95% intervals of the difference to whole0\n")
    rows = {line.split("  ")[0]: line.split() for line in shown.splitlines()[3:] if line}
    assert set(rows) == {"whole0", "worse", "no text"}
    want = compare.run(whole.split(","), {"worse": [worse]}, metrics=("ndcg@10",), say=lambda _: None)["ndcg@10"]["worse"]
    assert rows["worse"][-4:] == [f"{v:.4f}" for v in (want.difference, want.low, want.high, want.p)]
    assert want.difference < -0.2
    assert want.p < 0.01


def test_the_command_ends_with_a_clear_message(tmp_path, capsys):
    a, b = write(tmp_path / "a", hits(0, 0.4)), write(tmp_path / "b", hits(1, 0.4))
    fewer = write(tmp_path / "fewer", hits(1, 0.4)[:-4])
    one, two = write(tmp_path / "one", hits(1, 0.4), fingerprint="1" * 64), write(tmp_path / "two", hits(1, 0.4), fingerprint="2" * 64)
    (tmp_path / "broken" / "eval").mkdir(parents=True)
    (tmp_path / "broken" / "eval" / "test_users.npz").write_bytes(b"PK\x03\x04 no zip")
    (tmp_path / "no_users" / "eval").mkdir(parents=True)
    np.savez(tmp_path / "no_users" / "eval" / "test_users.npz", ndcg=np.ones(3))
    (tmp_path / "other").mkdir()
    for arguments, message in (
        (
            [f"--a={a}", f"--b={tmp_path}/none"],
            "no such file of per-user values; write it: python -m rec_jax.eval --workdir=W --split=test",
        ),
        ([f"--a={a}", f"--b={b}", "--split=valid"], "valid_users.npz: no such file"),
        (
            [f"--a={a}", f"--b={fewer}"],
            r"a has 300 users, .*fewer 296; 4 only in the first \(296, 297, 298, \.\.\.\), 0 only in the second: a paired",
        ),
        ([f"--a={one}", f"--b={two}"], "different data .fingerprints 111111111111 and 222222222222"),
        ([f"--a={a}", f"--b={tmp_path}/broken"], "broken/eval/test_users.npz is no file of per-user values"),
        ([f"--a={a}", f"--b={tmp_path}/no_users"], "is no file of per-user values .KeyError"),
        ([f"--a={a}", f"--b={b}", "--metrics=auc"], "a has no per-user values of 'auc'; it has hr@10, ndcg@10|it has ndcg@10, hr@10"),
        ([f"--a={a}", f"--b={a}"], "two models are called 'a'; name one of them: --b=NAME="),
        ([f"--a={a}", f"--b={b}", f"--b={b}"], "two models are called 'b'"),
        ([f"--a={a}", f"--b={b},"], "names no workdir"),
        ([f"--a={a}", f"--b=={b}"], "names no workdir"),
        ([f"--a={a}", f"--b={b}", "--draws=0"], "--draws=0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main_of(command.main, arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert re.search(message, error), error


@pytest.mark.parametrize(
    ("users", "values", "message"),
    [
        (np.array([1, 1]), np.ones(2), "1 of 2 user ids are there twice"),
        (np.arange(2), np.ones(3), r"'ndcg@10' has shape \(3,\)"),
        (np.arange(2), np.array([1, np.inf]), "finite number"),
        (np.ones((1, 1)), np.ones(1), "expected ids"),
    ],
)
def test_a_bad_file_is_not_written(tmp_path, users, values, message):
    with pytest.raises(RecJaxError, match=message):
        bootstrap.write_users(tmp_path, "test", users, {"test/ndcg@10": values})
    assert not (tmp_path / "eval").exists()


def test_a_metric_cannot_have_the_name_of_another_array(tmp_path):
    with pytest.raises(RecJaxError, match="cannot be called 'users'"):
        bootstrap.write_users(tmp_path, "test", np.arange(2), {"test/users": np.ones(2)})

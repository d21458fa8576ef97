"""Pools of rewards, what pruning gives on them, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from oneshot_fast.errors import DataError
from oneshot_fast.jobs.scale.pools import Pool, read_pool, write_pool
from oneshot_fast.jobs.scale.simulate import (
    PUBLISHED,
    Arm,
    agreement,
    curve,
    search_schedule,
    simulate,
)
from oneshot_fast.runtime.files import write_json
from oneshot_fast.scale import main
from oneshot_fast.search.pruning import Cost, Draws, Schedule, best_of_n

STEPS = 8
COST = Cost(2.0, 0.1, STEPS)


def pool_of(correlation: float, prompts: int = 60, candidates: int = 40, seed: int = 0) -> Pool:
    """Rewards whose early values have this correlation with the final one."""
    draw = np.random.default_rng(seed)
    final = draw.normal(size=(prompts, candidates, 1))
    noise = draw.normal(size=(prompts, candidates, STEPS))
    values = correlation * final + (1 - correlation**2) ** 0.5 * noise
    values[..., -1:] = final
    return Pool(values[..., None], tuple(range(STEPS)), ("reward",))


def test_without_a_prune_draws_agree_with_the_closed_form():
    pool = pool_of(0.5)
    exact = simulate(pool, Arm(), 5, COST, Draws(60, 40, 2, 0))
    drawn = simulate(pool, Arm(Schedule((1,), (1.0,))), 5, COST, Draws(60, 40, 2000, 0))
    assert drawn.error > 0
    assert abs(drawn.values.mean() - exact.values.mean()) < 4 * drawn.error


def test_pruning_pays_where_early_rewards_tell_the_final_one():
    arms = {"pruned": Arm(Schedule((1,), (0.2,)))}
    good, bad = (
        curve(pool_of(c), arms, [4 * Schedule().cost(1, COST)], COST, draws=64)[1]["gain"]
        for c in (0.95, 0.0)
    )
    assert good["low"] > 0.1
    assert bad["high"] < 0


def test_the_search_recommends_best_of_n_on_noise_and_a_schedule_where_one_pays():
    budget = Schedule().cost(5, COST)
    wrong = 0
    for seed in range(5):
        found = search_schedule(pool_of(0.0, seed=seed), budget, COST, tries=40, seed=seed)
        wrong += bool(found.schedule.after)
        assert found.search_prompts == found.held_out_prompts == 30
    assert wrong <= 1
    found = search_schedule(pool_of(0.9), budget, COST, tries=40)
    assert found.schedule.after and found.held_out["searched"]["low"] > 0
    # the published schedule prunes after a step that this pool does not have
    assert found.held_out.keys() == found.n.keys() - {"best_of_n"} == {"searched"}


def test_a_noise_aware_reward_prunes_only_where_it_was_trained():
    plain = pool_of(0.3)
    aware = np.repeat(plain.final[:, :, None], 2, 2)
    pool = Pool(plain.base, plain.steps, ("reward",), aware, (1, 2))
    assert (pool.prune((1, 5), True)[0] == plain.final).all()
    assert (pool.prune((1, 5), True)[1] == plain.base[:, :, 5]).all()
    assert (pool.prune((1,), False)[0] == plain.base[:, :, 1]).all()


def write_yaml(folder: Path, values: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for step in range(values.shape[2]):
        rows = [f"{p}:\n" + "".join(f"- {v}\n" for v in values[p, :, step]) for p in range(3)]
        (folder / f"p3_i4_s{step:02d}.yaml").write_text("".join(rows))


def test_every_form_gives_the_same_pool(tmp_path: Path):
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", base=values)
    planes = np.moveaxis(values.transpose(2, 0, 1)[..., None].view(np.uint8), -1, 0)
    np.savez(tmp_path / "c.npz", base_bytes=planes)
    write_yaml(tmp_path / "flux_imr_val_base", values)
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    prompts, images, steps = np.indices(values.shape).reshape(3, -1)
    columns = {"prompt": prompts, "image": images, "step": steps, "reward": values.ravel()}
    pq.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    for name in ("a.npy", "b.npz", "c.npz", "d.parquet", "."):
        pool = read_pool(tmp_path / name)
        np.testing.assert_allclose(pool.base[..., 0], values, rtol=1e-6)
        assert pool.steps == (0, 1, 2, 3, 4)
        write_pool(tmp_path / "out.safetensors", pool)
        again = read_pool(tmp_path / "out.safetensors")
        np.testing.assert_array_equal(again.base, pool.base.astype(np.float32))
        assert again.rewards == pool.rewards
    assert read_pool(tmp_path).rewards == ("imr",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0:\n- 1\n0:\n- 2\n", "line 3: prompt 0 comes a second time"),
        ("0:\n- 1\n1:\n- 1\n- 2\n", "prompt 1 has 2 values"),
        ("0:\n- 1\n!!python/object:os\n", "line 3"),
        ("0:\n- one\n", "could not convert"),
        ("0:\n- nan\n", "image 0, step 0"),
    ],
)
def test_broken_yaml_is_named(tmp_path: Path, text: str, said: str):
    (tmp_path / "p1_i1_s00.yaml").write_text(text)
    with pytest.raises(DataError, match=said):
        read_pool(tmp_path)


def test_files_that_are_no_pools_are_refused(tmp_path: Path):
    for name, write in {
        "a.npy": lambda p: np.save(p, np.zeros((2, 2))),
        "b.npz": lambda p: np.savez(p, other=np.zeros(3)),
        "c.safetensors": lambda p: save_file({"base": np.zeros((1, 1, 1, 1))}, p),
        "d.npy": lambda p: p.write_bytes(b"no array"),
        "e.txt": lambda p: p.write_text("x"),
    }.items():
        write(tmp_path / name)
        with pytest.raises(DataError, match=f"{name} is no pool"):
            read_pool(tmp_path / name)


def test_copies_are_left_out_and_said(capsys):
    pool = pool_of(0.5, candidates=4)
    double = Pool(np.concatenate([pool.base, pool.base[:, 1:3]], 1), pool.steps, pool.rewards)
    assert (double.without_copies().base == pool.base).all()
    assert "2 of 6 candidates are copies" in capsys.readouterr().err


def test_the_command_simulates_searches_and_converts(tmp_path: Path, capsys):
    np.save(tmp_path / "pool.npy", pool_of(0.9).base)
    pool = f"--pool={tmp_path / 'pool.npy'}"
    out = f"--output_dir={tmp_path / 'out'}"
    costs = ["--evaluation_cost=2", "--verification_cost=0.1"]
    schedule = ["--after", "1", "--keep", "0.3"]
    assert main(["simulate", pool, out, *costs, *schedule]) == 0
    rows = json.loads((tmp_path / "out" / "scale.json").read_text())["rows"]
    assert [row["arm"] for row in rows[:2]] == ["best_of_n", "pruned"]
    assert rows[1]["cost"] <= rows[1]["budget"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Pruning is better" in page and "What early rewards tell" in page
    found = json.loads((tmp_path / "out" / "scale.json").read_text())
    assert found["areas"]["pruned"] > 0 and len(found["agreement"]) == STEPS - 1
    assert all(0.7 < row["kendall"] < row["spearman"] < 0.95 for row in found["agreement"])
    assert (tmp_path / "out" / "scale.png").exists()
    assert main(["search", pool, out, *costs, "--tries=30"]) == 0
    found = json.loads((tmp_path / "out" / "schedule.json").read_text())
    assert found["schedule"]["after"]
    assert "recommended: --keep" in capsys.readouterr().out
    assert main(["convert", pool, f"--output={tmp_path / 'p.safetensors'}"]) == 0
    assert (
        main(
            ["simulate", f"--pool={tmp_path / 'p.safetensors'}", out, *schedule, "--budget", "0.1"]
        )
        == 2
    )
    assert "give at least" in capsys.readouterr().err
    assert main(["simulate", pool, out, "--after", "9", "--keep", "0.5"]) == 2


def test_what_runs_gave_is_shown_beside_what_the_pool_says(tmp_path: Path, capsys):
    np.save(tmp_path / "pool.npy", pool_of(0.9).base)
    run = {"method": "prune", "after": [1], "keep": [0.3], "prune_rewards": []}
    run["num_inference_steps"] = STEPS
    arm = {"candidates": 8, "rewards": {"reward": 1.5}, "low": 1.4, "high": 1.6}
    summary = {**arm, "settings": run, "compare": {**arm, "candidates": 4}}
    write_json(tmp_path / "run" / "metrics_summary.json", summary)
    flags = ["simulate", f"--pool={tmp_path / 'pool.npy'}", f"--output_dir={tmp_path / 'out'}"]
    flags += ["--after", "1", "--keep", "0.3", "--runs", str(tmp_path / "run")]
    assert main(flags) == 0
    rows = json.loads((tmp_path / "out" / "scale.json").read_text())["measured"]
    assert [(row["arm"], row["n"]) for row in rows] == [("pruned", 8), ("best_of_n", 4)]
    exact = best_of_n(pool_of(0.9).final[..., 0], 4)[0].mean()
    assert rows[1]["simulated"] == pytest.approx(exact, rel=1e-12)
    assert rows[0]["simulated"] > exact and rows[0]["measured"] == 1.5
    assert "Measured and simulated" in (tmp_path / "out" / "report.html").read_text()
    for change, said in (
        ({"method": "fk"}, "is steered by fk"),
        ({"num_inference_steps": 4}, "has 4 steps, the pool 8"),
        ({"prune_rewards": ["x"]}, "pruned by another reward"),
    ):
        write_json(
            tmp_path / "run" / "metrics_summary.json", {**summary, "settings": {**run, **change}}
        )
        assert main(flags) == 2 and said in capsys.readouterr().err
    assert main([*flags[:-1], str(tmp_path)]) == 2
    assert "has no finished `scale run`" in capsys.readouterr().err


def test_a_pool_of_the_packaged_teacher():
    """Made by the `scale data` command of docs/scale.md: 20 prompts, 32 images, 20 steps."""
    pool = read_pool(Path(__file__).with_name("teacher_pool.safetensors"))
    assert pool.base.shape == (20, 32, 20, 1) and pool.rewards == ("thickness",)
    found = [row["spearman"] for row in agreement(pool)]
    assert found[2] < found[6] < found[11] < found[18] and found[18] > 0.99
    cost = Cost(0.2407, 0.2261, 20)  # GFLOP
    plain, pruned = curve(pool, {"pruned": Arm(PUBLISHED)}, [40.33], cost)
    assert (plain["n"], pruned["n"]) == (8, 21)
    assert pruned["gain"]["low"] > 0

"""Compiled TPU programs: how their texts are read, what a roofline makes of them, and the goldens of every pod preset.

Compiling for TPUs needs libtpu, and minutes: by hand (-m slow), where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "tests" / "bench"
sys.path.append(str(BENCH))

import tpu_compile  # noqa: E402
from tpu_program import CHIPS, Collective, Program, link_seconds, roofline  # noqa: E402

TEXT = """HloModule jit_step, entry_computation_layout={...}

%fused_slice (param_0: f32[8,1024], param_1: s32[]) -> f32[1024] {
  %param_0 = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1024]{0:T(1024)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,1024}
}

%fused_update (param_2: f32[8,1024], param_3: f32[1024], param_4: s32[]) -> f32[8,1024] {
  %param_2 = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %param_3 = f32[1024]{0:T(1024)} parameter(1)
  %param_4 = s32[]{:T(128)} parameter(2)
  ROOT %dynamic-update-slice.1 = f32[8,1024]{1,0:T(8,128)} dynamic-update-slice(%param_2, %param_3, %param_4)
}

%all-reduce-scatter (input: f32[4096]) -> f32[1024] {
  %input = f32[4096]{0:T(1024)} parameter(0)
  %all-reduce.9 = f32[4096]{0:T(1024)} all-reduce(%input), channel_id=4, replica_groups=[4,4]<=[16], to_apply=%add
  ROOT %dynamic-slice.2 = f32[1024]{0:T(1024)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={1024}
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%body (arg: (s32[], bf16[64,32], f32[8,1024])) -> (s32[], bf16[64,32], f32[8,1024]) {
  %arg = (s32[]{:T(128)}, bf16[64,32]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/f32[8,1024]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %visitor = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=1
  %table = f32[8,1024]{1,0:T(8,128)} get-tuple-element(%arg), index=2
  %moved = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} collective-permute(%visitor), source_target_pairs={{0,1}}, metadata={op_name="ring"}
  %start = (bf16[64,32]{1,0:S(1)}, bf16[64,32]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%visitor), source_target_pairs={{0,1}}
  %row = f32[1024]{0:T(1024)} fusion(%table, %n), kind=kLoop, calls=%fused_slice, backend_config={"estimated_cycles":"100"}
  %done = bf16[64,32]{1,0:S(1)} collective-permute-done(%start)
  %new = f32[8,1024]{1,0:T(8,128)} fusion(%table, %row, %n), kind=kLoop, calls=%fused_update, backend_config={"estimated_cycles":"50"}
  ROOT %out = (s32[], bf16[64,32]{1,0:S(1)}, f32[8,1024]{1,0}) tuple(%n, %moved, %new)
}

%condition (arg.1: (s32[], bf16[64,32], f32[8,1024])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[64,32]{1,0:S(1)}, f32[8,1024]{1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(16)
  %n.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n.1, %limit), direction=LT
}

ENTRY %main (state: (s32[], bf16[64,32], f32[8,1024]), shard: f32[1024]) -> f32[4096] {
  %state = (s32[]{:T(128)}, bf16[64,32]{1,0:S(1)}, f32[8,1024]{1,0:T(8,128)}) parameter(0)
  %shard = f32[1024]{0:T(1024)} parameter(1)
  %while = (s32[]{:T(128)}, bf16[64,32]{1,0:S(1)}, f32[8,1024]{1,0}) while(%state), condition=%condition, body=%body
  %ag = (f32[1024]{0}, f32[4096]{0}, u32[]{:S(2)}) all-gather-start(%shard), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %whole = f32[4096]{0:T(1024)} all-gather-done(%ag)
  %part = f32[1024]{0:T(1024)} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="gradients"}
  ROOT %result = f32[4096]{0:T(1024)} copy(%whole)
}
"""


def test_collectives_are_counted_as_often_as_their_loops_run():
    assert Program(TEXT).collectives() == [
        Collective("all-gather", 1, 4 * 4096, 4, False, ""),
        Collective("collective-permute", 16, 2 * 64 * 32, 2, False, ""),
        Collective("collective-permute", 16, 2 * 64 * 32, 2, True, "ring"),
        Collective("reduce-scatter", 1, 4 * 1024, 4, True, "gradients"),
    ]


def test_cycles_and_traffic_count_loops_slices_and_scratch_memory():
    program = Program(TEXT)
    assert program.cycles() == 16 * 150
    row, whole = 4 * 1024, 4 * 4096
    # In the loop: a row read and written, then read and put in its place, a scalar each time; the permutes stay in scratch memory.
    inside = (row + row + 4) + (row + row + 4)
    # all-gather: what its smaller side holds; the fusion reads the whole and writes a part; the copy reads and writes the whole.
    assert program.traffic() == 16 * inside + row + (whole + row) + 2 * whole


def test_a_loop_of_unknown_length_is_an_error():
    with pytest.raises(ValueError, match="loop while: its condition has the constants"):
        Program(TEXT.replace("constant(16)", "copy(%arg.1)"))
    known = TEXT.replace("constant(16)", "copy(%arg.1)").replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert Program(known).cycles() == 3 * 150
    with pytest.raises(ValueError, match="no ENTRY"):
        Program("HloModule empty")


def test_link_seconds_and_roofline_by_hand():
    chip = CHIPS["v5e"]
    one = lambda name, size, group=4, waits=False: Collective(name, 3, size, group, waits, "")
    assert link_seconds([one("collective-permute", 45_000)], chip, (4, 4)) == pytest.approx(3e-6)
    assert link_seconds([one("all-gather", 45_000)], chip, (4, 4)) == pytest.approx(3e-6 * 3 / 4 / 2)
    assert link_seconds([one("all-reduce", 45_000)], chip, (4, 4)) == pytest.approx(3e-6 * 3 / 4)
    assert link_seconds([one("reduce-scatter", 45_000)], chip, (4, 4)) == pytest.approx(3e-6 * 3 / 2), "of an array four times as long"
    # 15/16 go elsewhere, two hops in the mean, over four links
    assert link_seconds([one("all-to-all", 45_000, 16)], chip, (4, 4)) == pytest.approx(3e-6 * 15 / 16 * 2 / 4)

    found = [one("collective-permute", 45_000_000, waits=True), one("collective-permute", 15_000_000)]
    line = roofline(chip, (4, 4), flops=2 * 197e9, useful=197e9, hbm=0.81e9, found=found)
    assert line.matmul == pytest.approx(2e-3)
    assert line.memory == pytest.approx(1e-3)
    assert (line.links, line.waited) == (pytest.approx(4e-3), pytest.approx(3e-3))
    assert line.bound == "links"
    assert line.step == pytest.approx(5e-3), "what is waited for comes on top of the products"
    assert line.mfu == pytest.approx(1 / 5)


def test_differences_name_what_changed():
    golden = {"memory": {"temporaries": 1000}, "collectives": {"all-gather": {"runs": 10, "bytes": 1000, "waited_bytes": 0}}}
    near = {"memory": {"temporaries": 1015}, "collectives": {"all-gather": {"runs": 10, "bytes": 990, "waited_bytes": 0}}}
    assert tpu_compile.differences(near, golden) == []
    far = {"memory": {"temporaries": 1100}, "collectives": {"all-reduce": {"runs": 1, "bytes": 8, "waited_bytes": 8}}}
    assert tpu_compile.differences(far, golden) == [
        "temporaries [bytes] 1,100, the golden has 1,000",
        "all-gather [runs] 0, the golden has 10",
        "all-gather [bytes] 0, the golden has 1,000",
        "all-reduce [runs] 1, the golden has 0",
        "all-reduce [bytes] 8, the golden has 0",
        "all-reduce [waited_bytes] 8, the golden has 0",
    ]
    assert tpu_compile.differences(None, None) == []
    assert tpu_compile.differences(near, None) == ["fits, and in the golden it is the other way"]


def presets():
    return [p for p in runpy.run_path(str(tpu_compile.CONFIG))["PRESETS"] if tpu_compile.slice_of(p) in tpu_compile.TOPOLOGIES]


@pytest.mark.parametrize("preset", presets())
def test_a_pod_preset_fits_its_chips_by_its_golden(preset):
    topology = tpu_compile.slice_of(preset)
    goldens = json.loads((tpu_compile.GOLDENS / f"{topology.replace(':', '_')}.json").read_text())
    if preset == "v5e_16x16_large":
        assert f"step_{preset}" in goldens, "1,048,576 pairs through BERT-large on 256 chips of 16 GB"
    elif f"step_{preset}" not in goldens:
        pytest.skip(f"not compiled yet: tests/bench/tpu_compile.py --case=step --preset={preset} --update_goldens")
    golden = goldens[f"step_{preset}"]
    assert sum(golden["memory"].values()) <= CHIPS[topology.split(":")[0]].memory
    assert "all-to-all" not in golden["collectives"], "a look-up left its device"


@pytest.mark.parametrize("topology", tpu_compile.TOPOLOGIES)
def test_goldens_of_the_ring_hold_permutes_that_nothing_waits_for(topology):
    goldens = json.loads((tpu_compile.GOLDENS / f"{topology.replace(':', '_')}.json").read_text())
    rings = [golden["collectives"] for name, golden in goldens.items() if name.startswith("info_nce")]
    assert rings
    for ring in rings:
        assert set(ring) == {"collective-permute", "all-reduce"}
        assert ring["collective-permute"]["waited_bytes"] == 0
        assert ring["all-reduce"]["bytes"] <= 64, "scalars"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["info_nce", "top_k"])
def test_what_libtpu_compiles_is_the_golden_one(case):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install libtpu==0.0.42")
    command = [sys.executable, str(BENCH / "tpu_compile.py"), f"--case={case}", "--topology=v5e:4x4", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

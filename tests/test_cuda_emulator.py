"""The emulator's specification: which faults of a kernel it catches, and in which build."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

import cuda_emulator

RIGHT = [
    "right_row_sum",
    "right_compaction",
    "right_product",
    "right_last_block",
    "right_largest_block",
    "right_largest_shared_memory",
    "right_most_parameters",
]
DIFFERS = r"^differs: (reverse|shuffled)$"
# ThreadSanitizer names both lines.
RACE = r"data race(.|\n)*plants\.cpp:\d+(.|\n)*Previous (.|\n)*plants\.cpp:\d+"

# Caught by running in several orders and with two fills, by what threads wait for, or before that.
PLAIN = {
    "no_barrier": DIFFERS,
    "no_barrier_after_scan": DIFFERS,
    "no_trailing_barrier": DIFFERS,
    "no_trailing_barrier_of_stages": DIFFERS,
    "race_in_few_orders": DIFFERS,
    "uninitialized_shared": DIFFERS,
    "copy_waited_for_too_late": DIFFERS,
    "copy_never_waited_for": "exits with cp.async copies that it never waited for",
    "misaligned_atomic": r"thread \(0,0,0\): a misaligned atomic at .*plants\.cpp:\d+",
    "early_return": (
        r"deadlock in kernel .* block \(0,0,0\): no thread can go on;\n"
        r"  thread \(0,0,0\) waits at __syncthreads .*plants\.cpp:\d+ \(and 99 more\)\n"
        r"  thread \(100,0,0\) has exited \(and 27 more\)"
    ),
    "barrier_count": r"deadlock(.|\n)*exited \(and 63 more\)\n.*__syncthreads .*\(and 63 more\)",
    "two_barriers": r"divergent barrier(.|\n)*__syncthreads .*:(\d+)\n.*__syncthreads .*:(?!\2)\d+",
    "exited_lane": r"waits at __ballot_sync .*plants\.cpp:\d+ for lane 5, which has exited",
    "absent_caller": r"leaves the calling lane out, at .*plants\.cpp:\d+",
    "mismatch": r"deadlock(.|\n)*__ballot_sync .*plants\.cpp:\d+.*\n.*__shfl_sync .*plants\.cpp",
    "absent_source": r"reads lane 20, which doesn't take part, at .*plants\.cpp:\d+",
    "lane_beyond_width": r"a shuffle of 16 lanes reads lane 16 at .*plants\.cpp:\d+",
    "large_block": r"impossible launch .*plants\.cpp:\d+: block of \(1025,1,1\) threads",
    "much_static_shared": "more than 48 KB are declared",
    "much_shared": "66560 bytes of shared memory, sm_75 has 64 KB",
    "unrequested_shared": "LAUNCH requests more than 48 KB only where",
    "many_parameters": "32768 bytes of parameters, 32764 can be passed",
    "empty_grid": r"grid of \(0,1,1\)",
    "high_grid": r"grid of \(1,65536,1\)",
}
# Caught by AddressSanitizer or UBSan. What the emulator adds says who it was.
ASAN = {
    "read_past_the_last_row": r"heap-buffer-overflow(.|\n)*READ of size 4(.|\n)*plants\.cpp",
    "static_shared_overrun": r"plants\.cpp:\d+.* index 4 out of bounds for type 'float \[4\]'",
    "dynamic_shared_overrun": r"heap-buffer-overflow(.|\n)*WRITE of size 4(.|\n)*plants\.cpp",
    "local_overrun": r"plants\.cpp:\d+.* index 4 out of bounds for type 'int \[4\]'",
    "misaligned_pack": r"plants\.cpp:\d+.* misaligned address",
    "shift_too_far": r"plants\.cpp:\d+.* shift exponent 32 is too large",
    "index_overflow": r"plants\.cpp:\d+.* signed integer overflow",
}
PLACE = r"emulator: while running kernel \w+.* block \(\d+,0,0\) thread \(\d+,0,0\)"
# Caught by ThreadSanitizer, whatever the order and the values.
TSAN = {
    "no_barrier": RACE,
    "no_barrier_after_scan": RACE,
    "no_trailing_barrier": RACE,
    "no_trailing_barrier_of_stages": RACE,
    "same_value_twice": RACE,
    "race_in_few_orders": RACE,
    "warp_exchange": RACE,
    "warp_exchange_by_shuffle": RACE,
    "two_blocks_one_word": RACE,
    "two_blocks_behind_barriers": RACE,
    "atomic_and_plain_read": RACE,
    "last_block_without_fence": RACE,
}
# Of the faults that the plain build reports in words, what the sanitized ones must report too.
WAITING = ["early_return", "barrier_count", "two_barriers", "exited_lane", "mismatch"]


def run_plant(mode: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    if mode == "tsan":  # so that the emulator's hook comes before the runtime's empty one
        environment["LD_PRELOAD"] = str(cuda_emulator.build(mode, "emulator") / "libemulator.so")
    return subprocess.run(
        [cuda_emulator.build(mode, "plants") / "plants", *arguments],
        capture_output=True,
        text=True,
        env=environment,
    )


def arch_of(plant: str) -> str:
    """The smallest with all that the kernel uses."""
    return "80" if re.search("product|stages|copy", plant) else "75"


@pytest.mark.parametrize("mode", cuda_emulator.MODES)
@pytest.mark.parametrize("plant", RIGHT)
def test_a_right_kernel_raises_no_alarm(plant: str, mode: str) -> None:
    run = run_plant(mode, plant, arch_of(plant))
    assert (run.returncode, run.stdout, run.stderr) == (0, "same bits\nalive\n", "")


@pytest.mark.parametrize("plant", PLAIN)
def test_caught_by_the_plain_build(plant: str) -> None:
    run = run_plant("plain", plant, arch_of(plant))
    assert run.returncode == 0, run.stderr
    assert re.search(PLAIN[plant], run.stdout, re.MULTILINE), run.stdout
    assert run.stdout.endswith("\nalive\n"), "a fault must not break the launches to come"


@pytest.mark.parametrize("plant", ASAN)
def test_caught_by_asan_and_ubsan(plant: str) -> None:
    run = run_plant("asan", plant, arch_of(plant))
    assert run.returncode != 0
    assert re.search(ASAN[plant], run.stderr), run.stderr
    assert re.search(PLACE, run.stderr), run.stderr


@pytest.mark.parametrize("plant", TSAN)
def test_caught_by_the_race_checker(plant: str) -> None:
    run = run_plant("tsan", plant, arch_of(plant))
    assert run.returncode != 0
    assert re.search(TSAN[plant], run.stderr), run.stderr
    assert re.search(PLACE, run.stderr), run.stderr


@pytest.mark.parametrize("mode", ["asan", "tsan"])
@pytest.mark.parametrize("plant", WAITING)
def test_waiting_is_checked_in_every_build(plant: str, mode: str) -> None:
    run = run_plant(mode, plant, arch_of(plant))
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(PLAIN[plant], run.stdout, re.MULTILINE), run.stdout


def test_every_plant_is_expected() -> None:
    planted = run_plant("plain").stdout.split()
    assert {*planted} == {*RIGHT, *PLAIN, *ASAN, *TSAN}


def test_mma_needs_sm_80() -> None:
    assert "mma of bf16 needs sm_80" in run_plant("plain", "right_product", "75").stdout


def test_more_shared_memory_on_a_larger_arch() -> None:
    for arch in ("80", "86", "90", "120"):
        assert run_plant("plain", "much_shared", arch).stdout == "same bits\nalive\n"


def test_fragments_lie_as_cute_says() -> None:
    run = subprocess.run(
        [cuda_emulator.build("plain", "fragment_layouts") / "fragment_layouts"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout == (
        "mma: 0 of 128 wrong\nshuffles: 0 of 128 wrong\nldmatrix: 0 of 4096 bits wrong\n"
    )

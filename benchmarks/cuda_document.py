"""What the compiler made of every CUDA kernel, and the time that memory bandwidth alone would need.

Prints docs/kernels.md and writes it. Nothing is run on a GPU: registers and shared memory are read
from the built module, all else is arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from cuda_kernels import (
    ROOT,
    Usage,
    arch_number,
    name_and_arguments,
    resource_usage,
    source_kernels,
)
from partune import _native

DOCUMENT = ROOT / "docs" / "kernels.md"

# ---- how many blocks an SM holds at once ----


class Sm(NamedTuple):
    """What a streaming multiprocessor has, by the CUDA programming guide's table."""

    threads: int
    blocks: int
    shared: int  # bytes, all blocks together
    reserved: int  # bytes of it that the driver takes for each block
    granularity: int  # bytes: what shared memory of a block is rounded up to


SM = {
    "sm_75": Sm(1024, 16, 64 << 10, 0, 256),
    "sm_80": Sm(2048, 32, 164 << 10, 1024, 128),
    "sm_86": Sm(1536, 16, 100 << 10, 1024, 128),
    "sm_89": Sm(1536, 24, 100 << 10, 1024, 128),
    "sm_90": Sm(2048, 32, 228 << 10, 1024, 128),
    "sm_100": Sm(2048, 32, 228 << 10, 1024, 128),
    "sm_120": Sm(1536, 24, 100 << 10, 1024, 128),
}
REGISTERS_PER_QUARTER = 16384  # an SM has four parts; a warp stays in one
REGISTER_GRANULARITY = 256  # registers that a warp gets at a time


def blocks_per_sm(arch: str, block: int, usage: Usage) -> int:
    sm = SM[arch]
    warps = -(-block // 32)
    warp_registers = -(-usage.registers * 32 // REGISTER_GRANULARITY) * REGISTER_GRANULARITY
    shared = -(-(usage.shared + sm.reserved) // sm.granularity) * sm.granularity
    return min(
        sm.blocks,
        sm.threads // (32 * warps),
        4 * (REGISTERS_PER_QUARTER // warp_registers) // warps,
        sm.shared // shared if shared else sm.blocks,
    )


# ---- bytes that an op moves ----

N, DENSITY, RANK = 4096, 0.05, 128
ENTRIES = N * N
SELECTED = int(DENSITY * ENTRIES)
INDICES = 4 * SELECTED + 8 * (N + 1)  # one reading or writing of a CSR's structure
SECTOR = 32
BANDWIDTHS = {"A100": 2039e9, "H100": 3350e9, "B200": 8000e9}  # SXM; the A100 of 80 GB


def scattered(size: int) -> int:
    """One access to all selected entries: the sectors that hold one, uniformly chosen."""
    neighbours = SECTOR // size
    return round(ENTRIES / neighbours * (1 - (1 - DENSITY) ** neighbours)) * SECTOR


def sparse_adamw(size: int) -> int:
    """Gradient read, weight read and written, two float32 moments read and written."""
    return 3 * scattered(size) + 16 * SELECTED + INDICES


def found_inf(size: int) -> int:
    return scattered(size) + INDICES


def remap(size: int) -> int:
    """Two moments of all entries, both structures read."""
    return 2 * 2 * size * SELECTED + 2 * INDICES


def gather_csr(size: int) -> int:
    """Values, float32, are written."""
    return scattered(size) + 4 * SELECTED + INDICES


def scatter_csr(size: int) -> int:
    """Sectors are read too, for what is beside an entry; values are float32."""
    return 2 * scattered(size) + 4 * SELECTED + INDICES


def select_constant(name: str) -> int:
    """A constant of family select's kernels."""
    text = "".join(path.read_text() for path in (ROOT / "csrc/kernels").glob("select*.cuh"))
    return int(re.search(rf"constexpr int {name} = (\d+);", text)[1])


# Counts: 8 bytes for a row of a tile, 16 for a row. Each is written, read and written again by a
# scan, and read by emit.
TILE_COUNTS = 4 * (8 * N * -(-N // select_constant("kTileColumns")) + 16 * N)
HISTOGRAMS = -(-32 // select_constant("kDigitBits"))  # of a 32-bit key, a digit each


def topk(size: int) -> int:
    """Scores read by three histograms, by count and by emit."""
    return (HISTOGRAMS + 2) * ENTRIES * size + TILE_COUNTS + INDICES


def threshold(size: int) -> int:
    """Scores read by count and by emit."""
    return 2 * ENTRIES * size + TILE_COUNTS + INDICES


def topk_factors(size: int) -> int:
    """Factors read once in each pass: caches hold them."""
    return (HISTOGRAMS + 2) * 2 * N * RANK * size + TILE_COUNTS + INDICES


def random_scores(size: int) -> int:
    return ENTRIES * size


def half_adamw(size: int) -> int:
    """Elements: gradient read, weight read and written, moments of the live half."""
    return 3 * size * ENTRIES + 16 * ENTRIES // 2


def packed_mask(size: int) -> int:
    return ENTRIES // 8


def cuda_constant(file: str, name: str) -> int:
    text = (ROOT / "csrc" / file).read_text()
    return int(re.search(rf"constexpr int {name} = (\d+);", text)[1])


# Partial sums: two float32 numbers per channel of a tile of rows, written and read.
TILE_SUMS = 2 * 2 * 4 * ENTRIES // cuda_constant("kernels/scale_shift.cuh", "kSumTileRows")
NORM_SUMS = 2 * 2 * 4 * ENTRIES // 8  # of a norm's block of 8 rows


def scale_shift(size: int) -> int:
    return 2 * ENTRIES * size


def scale_shift_backward(size: int) -> int:
    """Gradient and input or output read, the input's gradient written."""
    return 3 * ENTRIES * size + TILE_SUMS


def layer_norm_scale_shift(size: int) -> int:
    """Mean and rstd written; backward, read."""
    return 2 * ENTRIES * size + 2 * 4 * N


def layer_norm_scale_shift_backward(size: int) -> int:
    return 3 * ENTRIES * size + NORM_SUMS + 2 * 4 * N


def rms_norm_scale_shift(size: int) -> int:
    return 2 * ENTRIES * size + 4 * N


def rms_norm_scale_shift_backward(size: int) -> int:
    return 3 * ENTRIES * size + NORM_SUMS + 4 * N


LORA_RANK, LORA_BLOCKS = 16, 2
WIDTH = N // LORA_BLOCKS


def lora_products(columns: int) -> int:
    """A float32 number per token, rank and tile of columns, written and read; then hidden."""
    tiles = columns // cuda_constant("kernels/thin_products.cuh", "kLoraTileColumns")
    return (2 * tiles + 1) * 4 * N * LORA_RANK


def lora_sums(columns: int) -> int:
    """Of each block of tokens a float32 number per rank and column, written and read."""
    tile = cuda_constant("kernels/thin_products.cuh", "kLoraTileTokens")
    tiles = columns // cuda_constant("kernels/thin_products.cuh", "kLoraTileColumns")
    fill = cuda_constant("cuda/block_lora.cuh", "kLoraBlocks")
    blocks = N // (min(max(N * tiles // (fill * tile), 1), 8) * tile)
    return 2 * blocks * 4 * columns * LORA_RANK


def block_lora(size: int) -> int:
    """Input read, output read and written."""
    return 3 * ENTRIES * size + lora_products(WIDTH)


def block_lora_backward(size: int) -> int:
    """The output's gradient and the input read, the input's gradient read and written."""
    return 4 * ENTRIES * size + lora_products(N) + lora_sums(N) + lora_sums(WIDTH)


TOKENS = 2048
TOKEN_BLOCKS = TOKENS // cuda_constant("kernels/sampled_grad.cuh", "kTokenBlock")


def sampled_grad(size: int) -> int:
    """Sampled: factors read, packed and read again; values and structure once per token block."""
    return 3 * 2 * N * TOKENS * size + TOKEN_BLOCKS * (8 * SELECTED + INDICES)


# By op: bytes of weights, scores or values of 4 or 2 bytes; whether there is a bfloat16 form.
BYTES: dict[str, tuple[Callable[[int], int], bool]] = {
    "sparse_adamw_": (sparse_adamw, True),
    "found_inf_": (found_inf, True),
    "remap_": (remap, True),
    "gather_csr_": (gather_csr, True),
    "scatter_csr_": (scatter_csr, True),
    "topk_csr": (topk, True),
    "threshold_csr": (threshold, True),
    "topk_csr_factors": (topk_factors, False),
    "random_scores": (random_scores, False),
    "block_lora_": (block_lora, True),
    "block_lora_backward_": (block_lora_backward, True),
    "half_adamw_": (half_adamw, True),
    "random_mask": (packed_mask, False),
    "mask_counts": (packed_mask, False),
    "scale_shift": (scale_shift, True),
    "scale_shift_": (scale_shift, True),
    "scale_shift_backward": (scale_shift_backward, True),
    "layer_norm_scale_shift": (layer_norm_scale_shift, True),
    "layer_norm_scale_shift_backward": (layer_norm_scale_shift_backward, True),
    "rms_norm_scale_shift": (rms_norm_scale_shift, True),
    "rms_norm_scale_shift_backward": (rms_norm_scale_shift_backward, True),
    "sampled_grad_": (sampled_grad, True),
}


def cuda_ops() -> list[str]:
    """The ops that have a CUDA binding."""
    return re.findall(r'\bimpl\("(\w+)"', (ROOT / "csrc/cuda/bindings.h").read_text())


# ---- the document ----

HEAD = """\
# CUDA kernels

`make kernels` writes this file; a test fails when the built module differs from it. **Nothing here
was run on a GPU.** Registers and shared memory are what the compiler says; blocks and times are
arithmetic.

## Registers and shared memory

Compiled by CUDA {cuda}. Each cell: registers of a thread / bytes of a block's shared memory /
blocks that an SM holds at once by these two and by its threads. No kernel has a stack frame, spills
or local memory. A change here is a decision of whoever commits it.

"""
BYTES_HEAD = """
## Bytes moved

A matrix of {n} by {n}, {density:.0%} of it selected, uniformly: the worst case, where {float32:.0%}
of all 32-byte sectors of float32 hold a selected entry and {bfloat16:.0%} of bfloat16's. A
scattered access counts its whole sector. Moments are float32 in a step and have the named dtype in
`remap_`; values of family `csr_entries` are float32; factors have rank {rank}; `half_adamw_` steps
half of the elements, by a drawn mask; family `scale_shift` takes all of the matrix; family
`block_lora` has {n} tokens of {n} features and as many outputs, rank {lora_rank} in {lora_blocks}
blocks; `sampled_grad_` is its sampled route with {tokens} tokens, whose packed factors caches hold
while entries read them. Megabytes are 10^6 bytes; times are microseconds at the memory bandwidth of
{bandwidths}, and count nothing else.

"""
FACTORS_NOTE = """
What limits `topk_csr_factors` is arithmetic: its {passes} passes form the product anew, {flops:.0f}
GFLOP of float32 in all.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def recorded(text: str) -> dict[str, dict[str, str]]:
    """The document's cells by kernel and architecture."""
    cells: dict[str, dict[str, str]] = {}
    archs: list[str] = []
    for line in text.splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if columns[0] == "kernel":
            archs = columns[2:]
        elif columns[0].startswith("`") and "<" in columns[0]:
            cells[columns[0].strip("`")] = dict(zip(archs, columns[2:], strict=True))
    return cells


def built() -> dict[str, dict[str, str]]:
    """The same cells of the built module."""
    cells = {}
    for kernel, by_arch in resource_usage().items():
        block = block_size(kernel)
        cells[kernel] = {
            arch: f"{usage.registers} / {usage.shared:,} / {blocks_per_sm(arch, block, usage)}"
            for arch, usage in by_arch.items()
            if arch in SM
        }
    return cells


def block_size(kernel: str) -> int:
    name, arguments = name_and_arguments(kernel)
    return source_kernels()[name].block_size(arguments)


def cuda_version() -> str:
    number = _native.require().build_info()["cuda"]
    return f"{number // 1000}.{number % 1000 // 10}"


def render(cells: dict[str, dict[str, str]]) -> str:
    archs = sorted({arch for by_arch in cells.values() for arch in by_arch}, key=arch_number)
    resources = [
        [f"`{kernel}`", str(block_size(kernel)), *(cells[kernel].get(arch, "") for arch in archs)]
        for kernel in sorted(cells)
    ]
    ops = []
    for op in cuda_ops():
        count, has_bfloat16 = BYTES[op]
        row = [f"`{op}`"]
        for size in (4, 2):
            if size == 2 and not has_bfloat16:
                row += [""] * (1 + len(BANDWIDTHS))
                continue
            row += [f"{count(size) / 1e6:,.1f}"]
            row += [f"{count(size) / speed * 1e6:.1f}" for speed in BANDWIDTHS.values()]
        ops.append(row)
    header = ["op"]
    for dtype in ("float32", "bfloat16"):
        header += [f"{dtype}, MB", *(f"{gpu}, µs" for gpu in BANDWIDTHS)]
    names = [f"{gpu} ({speed / 1e9:,.0f} GB/s)" for gpu, speed in BANDWIDTHS.items()]
    text = HEAD.format(cuda=cuda_version()) + table(["kernel", "threads", *archs], resources)
    text += BYTES_HEAD.format(
        n=N,
        density=DENSITY,
        rank=RANK,
        lora_rank=LORA_RANK,
        lora_blocks=LORA_BLOCKS,
        tokens=TOKENS,
        float32=scattered(4) / (4 * ENTRIES),
        bfloat16=scattered(2) / (2 * ENTRIES),
        bandwidths=", ".join(names[:-1]) + f" and {names[-1]}",
    )
    text += table(header, ops)
    if "topk_csr_factors" in cuda_ops():
        passes = HISTOGRAMS + 2
        gflop = passes * 2 * ENTRIES * RANK / 1e9
        text += FACTORS_NOTE.format(passes=passes, flops=gflop)
    return text


def main() -> None:
    if _native.require().build_info()["cuda"] is None:
        raise SystemExit("kernels: this build has none (PARTUNE_CUDA=0)")
    archs = {arch for by_arch in resource_usage().values() for arch in by_arch}
    if missing := sorted(SM.keys() - archs, key=arch_number):
        raise SystemExit(
            f"kernels: built without {', '.join(missing)}; "
            "unset TORCH_CUDA_ARCH_LIST and run `make build`"
        )
    text = render(built())
    print(text)
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()

"""Sums of matrix products on Hopper GPUs, in one kernel of Pallas Mosaic GPU.

    out = sum_j left_j @ right_j

A frozen product and its adapter's, or those of several layers, go into one accumulator: nothing is copied
side by side to be joined, and no partial sum goes to memory to be added.

Thread blocks stay, one on each multiprocessor, and go from tile to tile. One warpgroup loads slices of the
operands (TMA, into a ring of buffers), two multiply, each half of the tile's rows. Two blocks make a cluster:
their tiles lie one above the other, and each loads half of the right operand's slice for both. What lies
beyond an operand's edges is loaded as zero, and nothing is stored there.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import jaxlib
from jax import lax
from jaxtyping import Array, Float

from lorajax_kernels import jax_cache
from lorajax_kernels.device import HOPPER, Device, current_device, is_assumed
from lorajax_kernels.lora import triton
from lorajax_kernels.triton_call import stand_in

if TYPE_CHECKING:
    from lorajax_kernels.lora import Problem

# Blocks of a cluster, and warpgroups of a block that multiply. The one that loads comes after these.
BLOCKS, MULTIPLYING = 2, 2
# What can be a slice's place: a swizzled buffer has rows of 64 elements and repeats after 8.
SLICE, ROWS = 64, 8
# Few rows make few tiles: less than this share of what the multiprocessors could do is left to others.
LEAST_USE = 0.5
# Registers a thread: of the warpgroup that loads, of those that multiply.
_FEW, _MANY = 40, 232


@dataclass(frozen=True)
class Tiling:
    """How the sum is cut up.

    Attributes:
        columns: of a tile, a multiple of 64 up to 256.
        stages: slices in the ring.
        buffers: of 64 columns of results, for each warpgroup, that wait to be stored.
        rows: of a block's tile.
        strip: tiles one above the other that are taken before those beside them. What is read again comes
            from the L2 cache then. To take a column of tiles at a time reads all of the left operands from
            memory for each: as fast for a moment, but slower for good, when its power limits the GPU.
    """

    columns: int = 256
    stages: int = 4
    buffers: int = 2
    rows: int = 128
    strip: int = 8


# The wider, the less is loaded: (tiling, time of a tile's column relative to that of the widest, on an H200).
TILINGS = ((Tiling(256, 4), 1.0), (Tiling(192, 4), 1.15), (Tiling(128, 6), 1.3))


def why_not(problem: Problem, device: Device) -> str | None:
    """None if the kernels can serve the problem there, otherwise the reason why not."""
    # The other kernels are Triton's.
    reason = triton.why_not(problem, device) or device.no_mosaic
    if reason is not None:
        return reason
    if device.compute_capability is None or device.compute_capability[0] != HOPPER[0]:
        return "its instructions are those of compute capability 9.0"
    if jax.__version_info__ < (0, 11):
        return f"it needs JAX 0.11, this is {jax.__version__}"
    return None


def tiling_for(rows: int, out: int, ks: Sequence[int], processors: int | None = None) -> Tiling | None:
    """The tiling for a sum of these sizes; None where the kernel cannot serve, or is no gain.

    Args:
        rows, out: of the sum.
        ks: of the products.
        processors: multiprocessors of the GPU; None: of the current device.
    """
    fits = rows % ROWS == 0 and out % SLICE == 0
    if not fits or not all(k % SLICE == 0 if k > SLICE else k % ROWS == 0 for k in ks):
        return None

    def cost(choice: tuple[Tiling, float]) -> float:
        tiling, factor = choice
        return _rounds(rows, out, tiling, processors)[0] * tiling.columns * factor

    best = min(TILINGS, key=cost)[0]
    area = BLOCKS * best.rows * best.columns
    done = _rounds(rows, out, best, processors)[0] * _clusters(processors) * area
    return best if rows * out >= LEAST_USE * done else None


def _clusters(processors: int | None) -> int:
    return max(1, (processors or current_device().multiprocessors or BLOCKS) // BLOCKS)


def _rounds(rows: int, out: int, tiling: Tiling, processors: int | None) -> tuple[int, int]:
    """How many tiles one after the other, and the least clusters that need no more.

    More would wait at the end, or the tiles of a strip would lie less evenly: where both have as many rounds,
    an H200 at its power limit takes less time with 64 clusters than with all 66.
    """
    tiles = -(-rows // (BLOCKS * tiling.rows)) * -(-out // tiling.columns)
    rounds = -(-tiles // _clusters(processors))
    return rounds, -(-tiles // rounds)


def mosaic_sum_of_products(
    lefts: Sequence[Float[Array, "rows _"]],
    rights: Sequence[Array],
    *,
    transposed: bool,
    tiling: Tiling,
    starts: Sequence[int] | None = None,
    processors: int | None = None,
    interpret: Any = None,
) -> Float[Array, "rows out"]:
    """Sum of left_j[:, start_j : start_j + k_j] @ right_j in their dtype, from float32 sums.

    Args:
        lefts: of bfloat16 or float16; of a multiple of 64 columns, or of 8 up to 64.
        rights: each [k_j, out], or [out, k_j] if `transposed`, of the same dtype.
        starts: of the columns of each left that count, multiples of 64; None: 0. Of up to 64 columns, those
            beyond right's k are read too, and meet zeros.
        tiling: see tiling_for.
        processors: multiprocessors of the GPU; None: of the current device.
        interpret: as in pallas.mosaic_gpu.kernel.
    """
    lefts, rights = tuple(lefts), tuple(rights)
    result = _result(lefts, rights, transposed)
    if is_assumed():
        return stand_in(*lefts, *rights, out_shape=result)
    starts = (0,) * len(lefts) if starts is None else tuple(starts)
    rows, out = result.shape
    _, clusters = _rounds(rows, out, tiling, processors)
    return _call(lefts, rights, _Options(transposed, starts, tiling, clusters), interpret)


class _Options(NamedTuple):
    """What a kernel is made for beside its operands' shapes."""

    transposed: bool
    starts: tuple[int, ...]
    tiling: Tiling
    clusters: int


def _result(lefts: Sequence[Array], rights: Sequence[Array], transposed: bool) -> jax.ShapeDtypeStruct:
    shape = lefts[0].shape[0], rights[0].shape[0 if transposed else 1]
    return jax.ShapeDtypeStruct(shape, lefts[0].dtype)


# Traced once for all layers.
@functools.partial(jax.jit, static_argnums=(2, 3))
def _call(lefts: tuple[Array, ...], rights: tuple[Array, ...], options: _Options, interpret: Any) -> Array:
    if interpret is not None:
        return _kernel(lefts, rights, options, interpret)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (lefts, rights))
    return _lowered(*shapes, options).call(lefts, rights)


@functools.cache
def _lowered(
    lefts: tuple[jax.ShapeDtypeStruct, ...], rights: tuple[jax.ShapeDtypeStruct, ...], options: _Options
) -> jax.export.Exported:
    """Lowered once for all programs of a process, or of all where JAX has a folder for compiled programs.

    It takes Mosaic a third of a second; JAX looks for a program in that folder only once all is lowered.
    """
    import jax.experimental.mosaic.gpu  # noqa: F401  it tells XLA where Mosaic's runtime is, which any program needs

    if importlib.util.find_spec("flatbuffers") is None:  # which JAX writes with
        return _lower(lefts, rights, options)
    source = Path(__file__).read_text(encoding="utf-8")
    key = "\0".join([source, jax.__version__, jaxlib.__version__, repr((lefts, rights, options))])
    if (kept := jax_cache.load("mosaic", key)) is not None:
        return jax.export.deserialize(bytearray(base64.b64decode(kept)))
    made = _lower(lefts, rights, options)
    jax_cache.store("mosaic", key, base64.b64encode(made.serialize()).decode())
    return made


def _lower(
    lefts: tuple[jax.ShapeDtypeStruct, ...], rights: tuple[jax.ShapeDtypeStruct, ...], options: _Options
) -> jax.export.Exported:
    def sum_of_products(lefts: tuple[Array, ...], rights: tuple[Array, ...]) -> Array:
        return _kernel(lefts, rights, options, None)

    lower = jax.export.export(
        jax.jit(sum_of_products),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
    )
    with _simplified():
        return lower(lefts, rights)


@contextlib.contextmanager
def _simplified() -> Iterator[None]:
    """What Mosaic makes of a kernel goes through the first passes of its compiler before it is written.

    It is written into a program once for each call, and XLA reads and copies it over and over: as it is made,
    with constants and the thread's number anew for each use, it is half as long again. The GPU's code is the
    same. JAX has no way to ask for it; where it does not know the function, kernels are written as ever.
    """
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir.passmanager import PassManager

    write = getattr(core, "_run_serde_pass", None)
    if write is None:
        yield
        return

    def simplify_and_write(module: Any, **options: Any) -> Any:
        PassManager.parse("builtin.module(canonicalize,cse)", module.context).run(module.operation)
        return write(module, **options)

    core._run_serde_pass = simplify_and_write
    try:
        yield
    finally:
        core._run_serde_pass = write


def _kernel(lefts: tuple[Array, ...], rights: tuple[Array, ...], options: _Options, interpret: Any) -> Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    transposed, starts, tiling, clusters = options
    count, dtype, stages = len(lefts), lefts[0].dtype, tiling.stages
    result = _result(lefts, rights, transposed)
    rows, out = result.shape
    slices = [-(-right.shape[1 if transposed else 0] // SLICE) for right in rights]
    tiles = -(-rows // (BLOCKS * tiling.rows)), -(-out // tiling.columns)
    own_rows = tiling.rows // MULTIPLYING

    def sums_of_products(*refs: Any) -> None:
        left_refs, right_refs, out_ref = refs[:count], refs[count:-1], refs[-1]
        if interpret is None:
            plgpu.inline_mgpu()(_named_for_dumps)()

        def scoped(left_ring: Any, right_ring: Any, out_buffers: Any, full: Any, free: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")

            def corner(tile: Any) -> tuple[Any, Any]:
                row, column = plgpu.planar_snake(tile, tiles, 0, tiling.strip)
                row = row * BLOCKS + lax.axis_index("block")
                return row * tiling.rows, column * tiling.columns

            def place(step: Any) -> Any:
                return lax.rem(step, jnp.int32(stages))

            # Both count the slices, from tile to tile, as steps.
            def load_tile(tile: Any, carry: Any) -> Any:
                row, column = corner(tile.index[0])
                across, step = pl.ds(column, tiling.columns), carry
                for left, right, start, many in zip(left_refs, right_refs, starts, slices, strict=True):

                    def load(i: Any, step: Any, left: Any = left, right: Any = right, start: int = start):
                        at = place(step)

                        @pl.when(step >= stages)
                        def _() -> None:
                            plgpu.barrier_wait(free.at[at])

                        own = left.at[pl.ds(row, tiling.rows), pl.ds(start + i * SLICE, SLICE)]
                        along = pl.ds(i * SLICE, SLICE)
                        shared = right.at[(across, along) if transposed else (along, across)]
                        plgpu.copy_gmem_to_smem(own, left_ring.at[at], full.at[at])
                        plgpu.copy_gmem_to_smem(
                            shared, right_ring.at[at], full.at[at], collective_axes="block"
                        )
                        return step + 1

                    step = lax.fori_loop(0, many, load, step)
                return step

            def multiply_tile(tile: Any, carry: Any) -> Any:
                row, column = corner(tile.index[0])
                end = carry + sum(slices)

                def summed(accumulator: Any) -> Any:
                    def multiply(step: Any, _: None) -> None:
                        at = place(step)
                        plgpu.barrier_wait(full.at[at])
                        left = left_ring.at[at].at[pl.ds(warpgroup * own_rows, own_rows)]
                        right = right_ring.at[at]
                        plgpu.wgmma(accumulator, left, right.transpose((1, 0)) if transposed else right)
                        plgpu.wgmma_wait(1)

                        # The product before this one is done.
                        @pl.when(step > carry)
                        def _done() -> None:
                            plgpu.barrier_arrive(free.at[place(step - 1)])

                    lax.fori_loop(carry, end, multiply, None)
                    return accumulator[...]

                sums = pl.run_scoped(summed, plgpu.ACC((own_rows, tiling.columns), jnp.float32))
                plgpu.barrier_arrive(free.at[place(end - 1)])
                own = pl.ds(row + warpgroup * own_rows, own_rows)
                # The last tile's results have long been stored: each buffer is free.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for number, begin in enumerate(range(0, tiling.columns, SLICE)):
                    buffer = out_buffers.at[warpgroup, number % tiling.buffers]
                    if number >= tiling.buffers:
                        plgpu.wait_smem_to_gmem(tiling.buffers - 1, wait_read_only=True)
                    buffer[...] = sums[:, begin : begin + SLICE].astype(dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(buffer, out_ref.at[own, pl.ds(column + begin, SLICE)])
                return end

            each_tile = plgpu.nd_loop(
                (tiles[0] * tiles[1],), collective_axes="cluster", init_carry=jnp.int32(0)
            )

            @pl.when(warpgroup == MULTIPLYING)
            def _() -> None:
                plgpu.set_max_registers(_FEW, action="decrease")
                steps = each_tile(load_tile)
                # A block may not end before the other has signalled it for the last time.
                for i in range(stages):

                    @pl.when(steps > i)
                    def _(i: int = i) -> None:
                        plgpu.barrier_wait(free.at[place(steps - 1 - i)])

            @pl.when(warpgroup < MULTIPLYING)
            def _() -> None:
                plgpu.set_max_registers(_MANY, action="increase")
                each_tile(multiply_tile)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def buffers(*shape: int) -> Any:
            bytes_ = SLICE * 2
            transforms = (
                plgpu.TilingTransform((ROWS, bytes_ // dtype.itemsize)),
                plgpu.SwizzleTransform(bytes_),
            )
            return plgpu.SMEM(shape, dtype, transforms=transforms)

        right_slice = (tiling.columns, SLICE) if transposed else (SLICE, tiling.columns)
        pl.run_scoped(
            scoped,
            buffers(stages, tiling.rows, SLICE),
            buffers(stages, *right_slice),
            buffers(MULTIPLYING, tiling.buffers, own_rows, SLICE),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("block",), num_arrivals=MULTIPLYING, num_barriers=stages),
            collective_axes="warpgroup",
        )

    call = plgpu.kernel(
        sums_of_products,
        out_type=result,
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(BLOCKS,),
        cluster_names=("block",),
        num_threads=MULTIPLYING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return call(*lefts, *rights)


def _named_for_dumps(context: Any) -> None:
    """Name the module as what a dump of it would be called.

    Otherwise Mosaic does, and counts how often it has lowered a kernel of this name. A program would differ
    with what its process had lowered before, and JAX's compilation cache would not know it again.
    """
    attributes = context.module.operation.attributes
    attributes["mosaic_gpu.dump_basename"] = attributes["sym_name"]

"""The kernel: y^T = w^T x^T on Hopper's tensor cores, weights as the register operand.

A thread block has computing warpgroups and one more, of which a single thread issues copies. They meet at a ring of
slots in shared memory. A slot takes one *stage*: a few tiles of the stream (codes, scales and zeros in one copy) and
the x that belongs to them (one copy, read by all warpgroups). Slots are equally large for all segments; a segment of
fewer bits fits more tiles into one. Computing warpgroups come in pairs, the two halves of a strip of 128 output
channels; with two pairs, one takes the even stages and the other the odd ones.

For each group: unpack to registers, multiply by x from shared memory (64 channels x `token_tile` tokens), and only then
scale, in float32. The codes of the next group are unpacked while the tensor cores work on the last.

Segments follow one another in the same ring: the loop over stages is a chain of one loop per segment, of which each
knows its width when it is compiled.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lq_kernels.gpu.layout import ROW, TILE, StreamSegment
from lq_kernels.gpu.schedule import SIDES, Schedule
from lq_kernels.gpu.transposed import load_transposed, store_transposed
from lq_kernels.gpu.unpack import ROW_PAIRS, scales_of_pairs, scales_of_words, unpack_columns, words_layout


def multiply(x: Array, streams: tuple[Array, ...], schedule: Schedule) -> Array:
    """Products as `out_dtype` [planes, token_tiles * out_rows, strips * 128]; planes are to be summed.

    Of a unit, planes from `contributions` on are not written.

    Args:
      x: bfloat16 [tiles, tokens, 128], the input channels of all segments, padded with zeros.
      streams: one int32 [strips, rows, 64] per segment (see `layout`).
    """
    s = schedule
    swizzled = (plgpu.TilingTransform((8, s.span)), plgpu.SwizzleTransform(2 * s.span))
    scratch: dict[str, Any] = {
        "x_smem": plgpu.SMEM((s.slots, max(s.stage_tiles), s.token_tile, TILE), jnp.bfloat16, transforms=swizzled),
        "w_smem": plgpu.SMEM((s.slots, s.slot_rows, ROW), jnp.int32),
        "out_smem": plgpu.SMEM((SIDES, s.token_tile, 64), s.out_dtype),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=s.slots),
        "empty": plgpu.Barrier(num_arrivals=SIDES, num_barriers=s.slots),
    }
    if s.cluster > 1:  # a slot is free when all blocks of the cluster are done with it
        scratch["empty"] = plgpu.ClusterBarrier(collective_axes=("rank",), num_arrivals=SIDES, num_barriers=s.slots)
    if s.pairs == 2:
        scratch["handed"] = plgpu.Barrier(num_arrivals=1, num_barriers=SIDES)
        scratch["taken"] = plgpu.Barrier(num_arrivals=1, num_barriers=SIDES)
    if s.interpret:  # the interpreter takes the A operand from shared memory only
        scratch["staging"] = plgpu.SMEM((s.computing, 64, TILE), jnp.bfloat16, transforms=swizzled)

    options: dict[str, Any] = {"interpret": s.interpret} if s.interpret else {}
    if s.cluster > 1:
        options |= {"cluster": (s.cluster,), "cluster_names": ("rank",)}

    def lq_matmul(x_gmem, *refs, **buffers):
        _Block(s, x_gmem, refs[:-1], refs[-1], **buffers).run()

    run = plgpu.kernel(
        lq_matmul,
        out_type=jax.ShapeDtypeStruct((s.planes, s.token_tiles * s.out_rows, s.strips * TILE), s.out_dtype),
        scratch_types=scratch,
        grid=(s.blocks // s.cluster,),
        grid_names=("block",),
        num_threads=s.computing + 1,
        thread_name="warpgroup",
        # Safe: what a warpgroup reads it does not write, but for its part of out_smem, each thread its own elements.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        **options,
    )
    return run(x, *streams)


@dataclasses.dataclass(frozen=True)
class _Share:
    """What a block does of one unit: stages [first, last), which are its own [done, ...)."""

    strip: Array | int
    tokens: Array | int  # which tile of tokens
    first: Array | int
    last: Array | int
    done: Array | int
    plane: Array | int
    count: Array | int  # units before this one


@dataclasses.dataclass(frozen=True)
class _Block:
    """One thread block's program."""

    s: Schedule
    x_gmem: Any
    streams: tuple
    out_gmem: Any
    x_smem: Any
    w_smem: Any
    out_smem: Any
    full: Any
    empty: Any
    handed: Any = None
    taken: Any = None
    staging: Any = None

    def run(self):
        warpgroup = lax.axis_index("warpgroup")
        copying, computing = self.s.warpgroup_registers

        @pl.when(warpgroup == self.s.computing)
        def _():
            plgpu.set_max_registers(copying, action="decrease")
            self._for_units(self._copy)
            self._drain()

        @pl.when(warpgroup < self.s.computing)
        def _():
            plgpu.set_max_registers(computing, action="increase")
            pair, side = warpgroup // SIDES, lax.rem(warpgroup, SIDES)
            self._for_units(functools.partial(self._compute, pair, side))
            plgpu.wait_smem_to_gmem(0)
            if self.s.pairs == 2:

                @pl.when(pair == 1)
                def _():
                    plgpu.barrier_wait(self.taken.at[side])

    def _for_units(self, work):
        s = self.s
        if s.split:
            block, total = lax.axis_index("block"), s.units * s.stages
            begin, end = block * total // s.blocks, (block + 1) * total // s.blocks
            part = functools.partial(self._part, work, block, begin, end)
            lax.fori_loop(begin // s.stages, lax.div(end + (s.stages - 1), s.stages), part, None)
        else:
            lax.fori_loop(0, self._whole_units(), functools.partial(self._whole, work), None)

    def _whole_units(self):
        """How many units this block computes when they are not cut."""
        groups = self.s.blocks // self.s.cluster
        return lax.div(self.s.units // self.s.cluster - 1 - lax.axis_index("block"), groups) + 1

    def _whole(self, work, i, _):
        s = self.s
        bundle = lax.axis_index("block") + i * (s.blocks // s.cluster)  # one unit for each block of the cluster
        rank = lax.axis_index("rank") if s.cluster > 1 else 0
        strip, tokens = lax.div(bundle, s.token_tiles) * s.cluster + rank, lax.rem(bundle, s.token_tiles)
        work(_Share(strip, tokens, first=0, last=s.stages, done=i * s.stages, plane=0, count=i))

    def _part(self, work, block, begin, end, unit, _):
        s = self.s
        first = jnp.maximum(begin - unit * s.stages, 0)
        work(
            _Share(
                strip=lax.div(unit, s.token_tiles),
                tokens=lax.rem(unit, s.token_tiles),
                first=first,
                last=jnp.minimum(end - unit * s.stages, s.stages),
                done=unit * s.stages + first - begin,
                plane=block - s._block_of(unit * s.stages),
                count=unit - begin // s.stages,
            )
        )

    def _for_stages(self, share: _Share, step, carry, start=0, stride: int = 1):
        """`step(segment, stage, slot's turn, carry)`, one loop per segment; of the block's stages every
        `stride`-th, from `start` on."""
        begin = 0
        for j, end in enumerate(self.s.stage_ends):
            low, high = jnp.maximum(share.first, begin), jnp.minimum(share.last, end)
            if stride > 1:
                low = low + lax.rem(share.done + low - share.first + start, stride)
            count = lax.div(jnp.maximum(high - low, 0) + (stride - 1), stride)

            def one(i, carry, j=j, low=low):
                stage = low + i * stride
                return step(j, stage, share.done + stage - share.first, carry)

            carry = lax.fori_loop(0, count, one, carry)
            begin = end
        return carry

    def _copy(self, share: _Share):
        s = self.s

        def fetch(j, stage, turn, carry):
            slot, facts, tiles = lax.rem(turn, s.slots), s.segments[j], s.stage_tiles[j]

            @pl.when(turn >= s.slots)
            def _():
                plgpu.barrier_wait(self.empty.at[slot])

            first = (stage - (s.stage_ends[j] - facts.tiles // tiles)) * tiles  # tile of the segment
            plgpu.copy_gmem_to_smem(
                self.streams[j].at[share.strip, pl.ds(first * facts.rows, tiles * facts.rows)],
                self.w_smem.at[slot, pl.ds(0, tiles * facts.rows)],
                self.full.at[slot],
            )
            before = sum(segment.tiles for segment in s.segments[:j])
            plgpu.copy_gmem_to_smem(
                self.x_gmem.at[pl.ds(before + first, tiles), pl.ds(share.tokens * s.token_tile, s.token_tile)],
                self.x_smem.at[slot, pl.ds(0, tiles)],
                self.full.at[slot],
                collective_axes="rank" if s.cluster > 1 else None,
            )
            return carry

        self._for_stages(share, fetch, None)

    def _drain(self):
        """Waits until all slots are free: while the other block of a cluster may still arrive at our barriers, this
        block's memory must not go away."""
        s = self.s
        if s.split:
            block, total = lax.axis_index("block"), s.units * s.stages
            turns = (block + 1) * total // s.blocks - block * total // s.blocks
        else:
            turns = self._whole_units() * s.stages

        def wait(turn, _):
            plgpu.barrier_wait(self.empty.at[lax.rem(turn, s.slots)])

        lax.fori_loop(jnp.maximum(turns - s.slots, 0), turns, wait, None)

    def _compute(self, pair, side, share: _Share):
        s = self.s

        def stage_products(j, stage, turn, total):
            slot = lax.rem(turn, s.slots)
            plgpu.barrier_wait(self.full.at[slot])
            total = self._stage(j, slot, pair, side, total)
            plgpu.barrier_arrive(self.empty.at[slot])
            return total

        total = plgpu.layout_cast(jnp.zeros((64, s.token_tile), jnp.float32), plgpu.Layout.WGMMA)
        total = self._for_stages(share, stage_products, total, pair, s.pairs)
        self._store(total, pair, side, share)

    def _stage(self, j: int, slot, pair, side, total):
        """Adds the products of one stage to `total` [64, tokens]."""
        s, facts = self.s, self.s.segments[j]
        groups = [(t, g) for t in range(s.stage_tiles[j]) for g in range(facts.groups)]
        scales, codes = self._operands(facts, slot, side, *groups[0])
        for i, (t, g) in enumerate(groups):
            x = self.x_smem.at[slot, t, :, pl.ds(g * facts.group, facts.group)].T

            def product(acc, x=x, i=i, codes=codes):
                self._wgmma(acc, codes, x, SIDES * pair + side)
                following = (None, None)
                if i + 1 < len(groups):  # while the tensor cores are at it
                    following = self._operands(facts, slot, side, *groups[i + 1])
                return acc[...], *following

            acc, following, codes = pl.run_scoped(product, plgpu.ACC((64, s.token_tile), jnp.float32))
            total = total + acc * lax.broadcast_in_dim(scales, acc.shape, [0])
            scales = following
        return total

    def _operands(self, facts: StreamSegment, slot, side, t: int, g: int):
        """(scales [64], code - zero [64, group]) of group g of tile t of a stage."""
        interpret = self.s.interpret
        base = t * facts.rows

        def row_pairs(plane: int):
            row = base + 2 * facts.code_rows + g * facts.group_rows + plane
            return plgpu.load(self.w_smem.at[slot, row, pl.ds(side * 32, 32)], layout=ROW_PAIRS)

        if facts.wide_scales:
            scales = scales_of_words(row_pairs(0), row_pairs(1), interpret)
        else:
            scales = scales_of_pairs(row_pairs(0), interpret)
        zeros = row_pairs(facts.group_rows - 1) if facts.zeros else None
        rows = pl.ds(base + side * facts.code_rows, facts.code_rows)
        words = plgpu.load(self.w_smem.at[slot, rows], layout=words_layout(facts))
        count = facts.group // 8
        return scales, unpack_columns(words, zeros, facts, g * count, count, interpret)

    def _wgmma(self, acc, codes: Array, x_ref, warpgroup):
        if self.staging is None:
            plgpu.wgmma(acc, codes, x_ref)
            return
        staged = self.staging.at[warpgroup, :, pl.ds(0, codes.shape[1])]
        plgpu.wgmma_wait(0)
        staged[...] = codes
        plgpu.commit_smem()
        plgpu.wgmma(acc, staged, x_ref)

    def _store(self, total, pair, side, share: _Share):
        """`total` [64, tokens], transposed, to the block's plane; the second of two pairs hands its to the first."""
        s = self.s
        mine = self.out_smem.at[side]
        if s.pairs == 1:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self._send(total, mine, side, share)
            return

        @pl.when(pair == 1)
        def _():
            @pl.when(share.count > 0)
            def _():
                plgpu.barrier_wait(self.taken.at[side])

            store_transposed(total, mine, s.interpret)
            plgpu.barrier_arrive(self.handed.at[side])

        @pl.when(pair == 0)
        def _():
            plgpu.barrier_wait(self.handed.at[side])
            other = load_transposed(mine, s.token_tile, s.interpret)
            self._send(total + other, mine, side, share)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.taken.at[side])

    def _send(self, total, buffer, side, share: _Share):
        s = self.s
        store_transposed(total.astype(s.out_dtype), buffer, s.interpret)
        plgpu.commit_smem()
        rows = pl.ds(share.tokens * s.out_rows, s.out_rows)
        channels = pl.ds(share.strip * TILE + side * 64, 64)
        plgpu.copy_smem_to_gmem(buffer.at[pl.ds(0, s.out_rows)], self.out_gmem.at[share.plane, rows, channels])

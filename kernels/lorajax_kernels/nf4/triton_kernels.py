"""Triton kernel that dequantises NF4; triton.py beside this one launches it.

The flat weight is read as little-endian words of 4 packed bytes. A thread makes the 8 elements of a word: 16
bytes of bfloat16 or float16, so that the threads of a warp store 512 bytes side by side.
"""

import triton
import triton.language as tl

# Elements of a word, words of a block, blocks of a group.
_PER_WORD = tl.constexpr(8)
_PER_BLOCK = tl.constexpr(8)
_PER_GROUP = tl.constexpr(256)
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def dequantize_kernel(
    packed_ptr,
    code_ptr,
    absmax_ptr,
    absmax2_ptr,
    absmax_code_ptr,
    offset_ptr,
    out_ptr,
    TOTAL: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS: tl.constexpr,
):
    """The elements of WORDS words out of TOTAL; grid (cdiv(TOTAL, WORDS),).

    absmax is float32; if NESTED uint8, and only then are the float32 absmax2, absmax_code and offset read.
    WORDS is a power of two of at most _PER_BLOCK * _PER_GROUP: a program's blocks belong to one group.
    """
    first = tl.program_id(0).to(tl.int64) * WORDS  # a weight may have more elements than 32 bits count
    word = tl.arange(0, WORDS)
    is_real = word < tl.minimum(TOTAL - first, WORDS).to(tl.int32)
    packed_ptr = tl.multiple_of((packed_ptr + 4 * first).to(tl.pointer_type(tl.uint32)), 16)
    words = tl.load(packed_ptr + word, mask=is_real, other=0)

    absmax_ptr += first // _PER_BLOCK
    scale = tl.load(absmax_ptr + word // _PER_BLOCK, mask=is_real, other=0)
    if NESTED:
        absmax2 = tl.load(absmax2_ptr + first // (_PER_BLOCK * _PER_GROUP))
        product = tl.load(absmax_code_ptr + scale.to(tl.int32)) * absmax2
        # The maximum changes nothing. It keeps product and sum from being fused, which would round only once.
        scale = tl.maximum(product, _LOWEST) + tl.load(offset_ptr)

    element = tl.arange(0, _PER_WORD)
    shift = 4 * (element ^ 1)  # the high nibble of a byte is first
    index = (words[:, None] >> shift[None, :]) & 15  # [WORDS, _PER_WORD]
    # The 16 values stay in the L1 cache, where a warp finds all of its 32 in one access.
    values = tl.load(code_ptr + index) * scale[:, None]
    out_ptr = tl.multiple_of(out_ptr + _PER_WORD * first, 16)
    place = _PER_WORD * word[:, None] + element[None, :]
    tl.store(out_ptr + place, values.to(out_ptr.dtype.element_ty), mask=is_real[:, None])

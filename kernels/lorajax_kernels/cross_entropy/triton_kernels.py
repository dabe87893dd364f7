"""Triton kernel of the softmax's loss and gradient; triton.py beside this one launches it.

A program owns a row and visits it twice: first for its log-sum-exp, then for the gradient, which takes the
logits' place. A thread writes only where it has read itself, and the target's logit is read before.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# Below every logit yet finite: places after the end of a row are exp2(LOWEST - top) = 0.
_LOWEST = tl.constexpr(-1e30)


@triton.jit
def loss_and_gradient_kernel(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of WIDTH logits; grid (rows,). Those from VOCAB on get a gradient of 0.

    A row of weight 0 stays as it is.
    """
    row = tl.program_id(0)
    weight = tl.load(weights_ptr + row)
    if weight == 0:
        tl.store(losses_ptr + row, 0.0)
    else:
        logits_ptr += row.to(tl.int64) * WIDTH
        target = tl.load(targets_ptr + row)
        is_index = (target >= 0) & (target < VOCAB)
        at_target = _capped(tl.load(logits_ptr + tl.where(is_index, target, 0)).to(tl.float32), SOFTCAP)
        place = tl.arange(0, BLOCK)

        top = tl.full([], _LOWEST, tl.float32)
        totals = tl.full([BLOCK], 0.0, tl.float32)  # added up across threads once, at the end
        for start in tl.range(0, WIDTH, BLOCK):
            z = _load(logits_ptr, start + place, VOCAB, WIDTH, SOFTCAP)
            new_top = tl.maximum(top, tl.max(z, 0))
            totals = totals * tl.exp2(top - new_top) + tl.exp2(z - new_top)
            top = new_top
        lse = top + tl.log2(tl.sum(totals, 0))

        loss = (lse - at_target) * _LN_2 * weight
        tl.store(losses_ptr + row, tl.where(is_index, loss, float("nan")))
        for start in tl.range(0, WIDTH, BLOCK):
            column = start + place
            z = _load(logits_ptr, column, VOCAB, WIDTH, SOFTCAP)
            gradient = tl.exp2(z - lse) - tl.where(column == target, 1.0, 0.0)
            if SOFTCAP is not None:
                tanh = z / (SOFTCAP * _LOG2_E)
                gradient *= 1 - tanh * tanh
            if WIDTH != VOCAB:
                gradient = tl.where(column < VOCAB, gradient, 0.0)
            gradient = gradient.to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + column, gradient, mask=column < WIDTH)


@triton.jit
def loss_and_gradient_kernel_for_0_3(
    logits_ptr,
    targets_ptr,
    weights_ptr,
    losses_ptr,
    gradient_ptr,
    VOCAB: tl.constexpr,
    WIDTH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The same for releases of jax-triton that pass gradient_ptr, which is logits_ptr, too."""
    loss_and_gradient_kernel(logits_ptr, targets_ptr, weights_ptr, losses_ptr, VOCAB, WIDTH, SOFTCAP, BLOCK)


@triton.jit
def _load(logits_ptr, column, VOCAB: tl.constexpr, WIDTH: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits to base 2, capped; _LOWEST from VOCAB on.

    Read to the end of the row: a mask that ends at an odd place would have each logit read by itself.
    """
    z = tl.load(logits_ptr + column, mask=column < WIDTH, other=0).to(tl.float32)
    return tl.where(column < VOCAB, _capped(z, SOFTCAP), _LOWEST)


@triton.jit
def _capped(logits, SOFTCAP: tl.constexpr):
    """Times log2(e), after the cap if there is one."""
    if SOFTCAP is None:
        z = logits * _LOG2_E
    else:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        tanh = 1 - 2 / (tl.exp2(logits * (2 * _LOG2_E / SOFTCAP)) + 1)
        z = tanh * (SOFTCAP * _LOG2_E)
    return z

"""What an attention mask shows, bool (True: visible) or additive."""

import triton
import triton.language as tl

VERY_LOW = tl.constexpr(-1e30)
"""An additive mask hides with -inf or with the lowest finite value of some dtype."""


@triton.jit
def mask_bias(mask_ptr, offsets, inside):
    """What the mask adds to the scores, in f32: -inf where it hides and where there is nothing."""
    if mask_ptr.dtype.element_ty == tl.int1:
        return tl.where(tl.load(mask_ptr + offsets, inside, other=0) != 0, 0.0, float("-inf"))
    else:
        return tl.load(mask_ptr + offsets, inside, other=float("-inf")).to(tl.float32)


@triton.jit
def visible_blocks(
    mask_ptr, stride, length, split, splits, count, lowest, BLOCK: tl.constexpr, SCAN: tl.constexpr
):  # fmt: skip
    """First and last of a split's `count` blocks with a position whose bias is above `lowest`, and the end of the last
    such position; (count, -1, 0) if there is none."""
    first, last, end = count, -1, 0
    for start in range(0, count, SCAN):
        n = start + tl.arange(0, SCAN)
        position = ((split + n * splits) * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        bias = mask_bias(mask_ptr, position.to(tl.int64) * stride, position < length)
        seen = tl.max((bias > lowest).to(tl.int32), 1) > 0
        first = tl.minimum(first, tl.min(tl.where(seen, n, count)))
        last = tl.maximum(last, tl.max(tl.where(seen, n, -1)))
        end = tl.maximum(end, tl.max(tl.where(bias > lowest, position + 1, 0)))
    return first, last, end


@triton.jit
def any_visible(mask_ptr, stride, length, WIDTH: tl.constexpr):
    """Whether the row of the mask shows any position. Usually the first load tells."""
    start, found = 0, 0
    while (start < length) & (found == 0):
        position = start + tl.arange(0, WIDTH)
        bias = mask_bias(mask_ptr, position.to(tl.int64) * stride, position < length)
        found = tl.max((bias > VERY_LOW).to(tl.int32))
        start += WIDTH
    return found

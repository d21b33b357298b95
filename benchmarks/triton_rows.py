"""The kernel of `elementwise.by_triton`, in a file of its own: it needs Triton."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = 8192


@triton.jit
def rows_kernel(  # type: ignore[no-untyped-def]
    logits, others, labels, ce, value, entropy, correct, gradient, size, hard, soft,
    WITH_REFERENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of [C, size] per program."""
    row = tl.program_id(0).to(tl.int64)
    at, there = logits + row * size, others + row * size
    label = tl.load(labels + row)
    low = float("-inf")
    top, total, weighted = low, 0.0, 0.0  # largest logit; sums of exp(l - top) and exp(l - top) l
    top_other, total_other, apart = low, 0.0, 0.0  # the reference's; sum of exp(l - top) (l - r)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        x = tl.load(at + columns, mask=inside, other=low)
        new = tl.maximum(top, tl.max(x, 0))
        e = tl.exp(x - new)
        shrink = tl.exp(top - new)
        total = total * shrink + tl.sum(e, 0)
        weighted = weighted * shrink + tl.sum(tl.where(inside, e * x, 0.0), 0)
        if WITH_REFERENCE:
            r = tl.load(there + columns, mask=inside, other=low)
            apart = apart * shrink + tl.sum(tl.where(inside, e * (x - r), 0.0), 0)
            new_other = tl.maximum(top_other, tl.max(r, 0))
            total_other = total_other * tl.exp(top_other - new_other) + tl.sum(tl.exp(r - new_other), 0)
            top_other = new_other
        top = new
    over = top + tl.log(total)
    of_label = tl.load(at + label)
    tl.store(ce + row, over - of_label)
    tl.store(entropy + row, over - weighted / total)
    tl.store(correct + row, tl.where(of_label >= top, 1.0, 0.0))
    shift = 0.0
    mean = 0.0
    if WITH_REFERENCE:
        shift = over - (top_other + tl.log(total_other))
        mean = apart / total - shift
    precise, lowest = 0.0, 0.0
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < size
        x = tl.load(at + columns, mask=inside, other=low)
        p = tl.exp(x - over)
        slope = hard * tl.where(columns == label, p - 1.0, p)
        if WITH_REFERENCE:
            r = tl.load(there + columns, mask=inside, other=0.0)
            d = tl.where(inside, x - r - shift, 0.0)
            precise += tl.sum(p * (libdevice.expm1(-d) + d), 0)
            lowest = tl.minimum(lowest, tl.min(d, 0))
            slope += soft * p * (d - mean)
        tl.store(gradient + row * size + columns, slope.to(gradient.dtype.element_ty), mask=inside)
    if WITH_REFERENCE:
        tl.store(value + row, tl.where(lowest < -80.0, mean, precise))

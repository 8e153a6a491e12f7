"""Exact selection of the k smallest: of every row in one pass over memory (a Triton kernel), of a whole tensor (plain torch).

Scores are not negative, so their bit patterns order as integers ("keys"), and a selection is a search for an integer: the
largest key with no more than k keys below it. All below it are taken, and of its ties the first ones.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import triton.language as tl

SPAN = 512  # words (of 32 bits) in a tile: one load of 16 bytes for each of a program's 128 threads
HELD = 32  # tiles that stay in registers: rows of up to 32,768 bfloat16 or 16,384 float32. The rest is read at every count
PAIRED = 2 * 0xFFFF  # longest row of bfloat16 that is read two keys to a word: counts fit in half a word
ROWS = 256  # that are sorted at once without a kernel
DIGIT = 16  # bits that one histogram of a whole tensor tells apart
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


# The kernel. A word holds two keys of 15 bits (bfloat16: ONES = 0x10001, BITS = 15) or one of 31 (float32: ONES = 1, BITS = 31).
def load(row_ptr, tile, WORDS, SPAN, ONES, BITS):
    """Words [S] of a tile, zeros beyond the row. The bit above each key (its sign, so -0.0 is 0.0) is set as a flag."""
    at_S = tile * SPAN + tl.arange(0, SPAN)
    return tl.load(row_ptr + at_S, mask=at_S < WORDS, other=0).to(tl.uint32, bitcast=True) | (ONES << BITS)


def not_below(words_S, key, ONES, BITS):
    """Flags [S] of the keys that are at least `key`: one subtraction clears the flag of every smaller one."""
    return (words_S - tl.cast(key, tl.uint32) * ONES) & (ONES << BITS)


def counts(flags_S, ONES, BITS):
    """Flags [S] as numbers to add up, one for each key of a word."""
    return (flags_S >> BITS) & ONES


def total(counts_S, BITS):
    """The sum of counts [S], over both keys of a word."""
    both = tl.sum(counts_S, axis=0)
    return ((both & 0xFFFF) + (both >> 16) if BITS == 15 else both).to(tl.int32)


def leave(words_S, key, need, seen, ONES, BITS):
    """Mask [S] of a tile, a byte for each key, and the ties of `key` up to its end: the first `need` ties of the row leave."""
    upper_S = not_below(words_S, key, ONES, BITS)
    leaves_S = upper_S ^ (ONES << BITS)
    if seen < need:
        tied_S = upper_S ^ not_below(words_S, key + 1, ONES, BITS)
        upto = seen + total(counts(tied_S, ONES, BITS), BITS)
        if upto <= need:
            leaves_S |= tied_S
        else:
            high_S = (tied_S >> 31).to(tl.int32)
            ties_S = high_S + ((tied_S >> 15) & 1).to(tl.int32) if BITS == 15 else high_S
            upto_S = tl.cumsum(ties_S, axis=0) + seen
            leaves_S |= tl.where(upto_S <= need, tied_S, 0)
            if BITS == 15:
                leaves_S |= tl.where(upto_S - high_S <= need, tied_S & 0x8000, 0)
        seen = upto
    if BITS == 15:
        return ((leaves_S >> 15) & 1 | (leaves_S >> 23) & 0x100).to(tl.int16), seen
    else:
        return (leaves_S >> 31).to(tl.int8), seen


def select(
    scores_ptr,
    count_ptr,
    mask_ptr,
    WORDS: tl.constexpr,
    SPAN: tl.constexpr,
    HELD: tl.constexpr,
    ONES: tl.constexpr,
    BITS: tl.constexpr,
):
    """One row, held in registers: read once, searched, and its mask written once. Kernels take pointers and sizes one by one.

    Why counts and no histograms: arithmetic, not memory, sets the pace, so what matters is instructions per key. Counting the
    keys below a threshold takes 1.75 per bfloat16 key, two sharing each subtraction. A histogram (`tl.histogram`, 8 bits, twice)
    takes 54 in Triton 3.6 (votes) and 3 in 3.9, one a shared-memory atomic, of which a multiprocessor has one unit; the keys of a
    row share a few exponents and would contend for a few bins. Bit by bit 15 counts would be needed, but the row's first tile
    tells nearly where to look: 11 counts of that tile, then about 6 of the row for bfloat16, 10 for float32, which ends at the
    first threshold with exactly `count` keys below. These numbers are from the code compiled for sm_90; it was not yet timed.
    """
    TILES: tl.constexpr = (WORDS + SPAN - 1) // SPAN
    KEPT: tl.constexpr = TILES if TILES < HELD else HELD
    KEYS: tl.constexpr = WORDS * (2 if BITS == 15 else 1)
    SAMPLE: tl.constexpr = KEYS if TILES == 1 else SPAN * (2 if BITS == 15 else 1)
    row = tl.program_id(0).to(tl.int64)
    row_ptr, out_ptr = scores_ptr + row * WORDS, mask_ptr + row * WORDS
    count = tl.load(count_ptr + row).to(tl.int32)
    kept = ()
    for tile in tl.static_range(KEPT):
        kept += (load(row_ptr, tile, WORDS, SPAN, ONES, BITS),)

    guess, wanted = 0, (count.to(tl.int64) * SAMPLE // KEYS).to(tl.int32)
    for bit in tl.static_range(11):
        key = guess + (1 << (BITS - 1 - bit))
        smaller = SAMPLE - total(counts(not_below(kept[0], key, ONES, BITS), ONES, BITS), BITS)
        guess = tl.where(smaller <= wanted, key, guess)

    # The answer is in [low, low + span) and `below` keys are below low. Steps from the guess double until it is between two
    # thresholds; from then on they halve what is between.
    low, below, span, step = 0, 0, (1 << BITS) - 1, 1 << (BITS - 12)
    key = guess + step
    while (span > 1) & (below < count):
        upper_S = tl.zeros([SPAN], tl.uint32)
        for tile in tl.static_range(KEPT):
            upper_S += counts(not_below(kept[tile], key, ONES, BITS), ONES, BITS)
        for far in range(KEPT, TILES):
            upper_S += counts(not_below(load(row_ptr, far, WORDS, SPAN, ONES, BITS), key, ONES, BITS), ONES, BITS)
        smaller = KEYS - total(upper_S, BITS)
        if smaller <= count:
            span -= key - low
            low, below = key, smaller
            key += tl.minimum(step, span // 2)
        else:
            span = key - low
            key -= tl.minimum(step, span // 2)
        step = tl.minimum(step, 1 << (BITS - 3)) * 2

    seen, need = 0, count - below
    at_S = tl.arange(0, SPAN)
    for tile in tl.static_range(KEPT):
        leaves_S, seen = leave(kept[tile], low, need, seen, ONES, BITS)
        tl.store(out_ptr + tile * SPAN + at_S, leaves_S, mask=tile * SPAN + at_S < WORDS)
    for far in range(KEPT, TILES):
        leaves_S, seen = leave(load(row_ptr, far, WORDS, SPAN, ONES, BITS), low, need, seen, ONES, BITS)
        tl.store(out_ptr + far * SPAN + at_S, leaves_S, mask=far * SPAN + at_S < WORDS)


@functools.cache
def kernel():
    """`select` for Triton, which is imported here: it is no dependency, torch's CUDA wheels bring it.

    Triton looks the names that a kernel uses up in its module, so that is where the compiled helpers and `tl` go.
    """
    import triton

    helpers = {function.__name__: triton.jit(function) for function in (load, not_below, counts, total, leave)}
    globals().update(helpers, tl=triton.language)
    return triton.jit(select)


@functools.cache
def cannot_compile(device: torch.device) -> str:
    """Why the kernel cannot be compiled for a GPU here, or "": Triton needs a C compiler and Python's headers, which slim images
    lack."""
    row_D = torch.arange(8.0, device=device)[None]
    try:
        _by_kernel(row_D, torch.tensor([4], device=device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # for each thing that is missing another one
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def smallest_per_row_gpu(scores_OD: torch.Tensor, count_O: torch.Tensor) -> torch.Tensor:
    """Mask [O, D], true for the count_O[i] smallest entries of row i, ties to the lower column.

    Scores are bfloat16 or float32 and neither negative nor NaN; counts are integers from 0 to D on the same GPU. D has no
    limit; above HELD * SPAN words it is slower, as it is without a compiler (`cannot_compile`).
    """
    return (_by_sort if cannot_compile(scores_OD.device) else _by_kernel)(scores_OD, count_O)


def _by_sort(scores_OD: torch.Tensor, count_O: torch.Tensor) -> torch.Tensor:
    mask_OD, place_D = torch.empty_like(scores_OD, dtype=torch.bool), torch.arange(scores_OD.shape[1], device=scores_OD.device)
    # By some rows at a time: a sort takes many bytes a number.
    for mask_RD, scores_RD, count_R in zip(*(part.split(ROWS) for part in (mask_OD, scores_OD, count_O)), strict=True):
        mask_RD.scatter_(1, keys(scores_RD).sort(dim=1, stable=True).indices, place_D < count_R[:, None])
    return mask_OD


def _by_kernel(scores_OD: torch.Tensor, count_O: torch.Tensor) -> torch.Tensor:
    rows, columns = scores_OD.shape
    paired = scores_OD.dtype == torch.bfloat16 and columns % 2 == 0 and columns <= PAIRED
    scores_OD = scores_OD.contiguous() if paired else scores_OD.float().contiguous()
    scores_OD = scores_OD.clone() if scores_OD.data_ptr() % 16 else scores_OD
    mask_OD = torch.empty(rows, columns, dtype=torch.bool, device=scores_OD.device)
    if mask_OD.numel():
        words_OW, bytes_OW = scores_OD.view(torch.int32), mask_OD.view(torch.int16 if paired else torch.int8)
        layout = {"ONES": 0x10001, "BITS": 15} if paired else {"ONES": 1, "BITS": 31}
        settings = {"WORDS": words_OW.shape[1], "SPAN": SPAN, "HELD": HELD, "num_warps": 4, "num_stages": 1}
        with torch.cuda.device_of(scores_OD):
            kernel()[(rows,)](words_OW, count_O.contiguous(), bytes_OW, **layout, **settings)
    return mask_OD


def keys(scores: torch.Tensor) -> torch.Tensor:
    """The scores' bits as integers, which sort like the scores, with NaN at the end."""
    bits = scores.view(INTEGERS[scores.dtype])
    return bits & torch.iinfo(bits.dtype).max  # -0.0 is 0.0


def kth_smallest(keys_N: torch.Tensor, k: int) -> tuple[int, int]:
    """The k-th smallest of N integers, none negative, and how many are smaller. k counts from 1."""
    key, rank = 0, k
    for shift in range(keys_N.element_size() * 8 - DIGIT, -1, -DIGIT):
        digits_N = (keys_N >> shift).int() & ((1 << DIGIT) - 1)
        # A GPU is waited for once: neither bincount nor an index that is a tensor of one number would do.
        bins = torch.zeros(1 << DIGIT, dtype=torch.int64, device=keys_N.device)
        bins.index_add_(0, digits_N, bins.new_ones(1).expand(len(digits_N)))
        upto = bins.cumsum(0)
        place = torch.searchsorted(upto, rank)
        digit, smaller = torch.stack([place, (upto - bins).take(place)]).tolist()
        rank -= smaller
        keys_N, key = keys_N[digits_N == digit], key << DIGIT | digit
    return key, k - rank


def smallest_overall(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask, true for the `count` smallest of all entries, ties to the lower flat index. The same on every device.

    Scores are bfloat16, float32 or float64 of any shape and neither negative nor NaN.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    keys_N = keys(scores.reshape(-1))
    key, smaller = kth_smallest(keys_N, count)
    mask_N = keys_N < key
    mask_N[(keys_N == key).nonzero()[: count - smaller, 0]] = True
    return mask_N.view(scores.shape)

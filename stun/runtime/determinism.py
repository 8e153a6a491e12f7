"""Operations whose last bits do not depend on the number of threads.

torch splits a large tensor into one piece per thread. It computes each with vector instructions and the remainder at its end
with scalar ones, whose exponential differs in the last bit. Products add up in an order that depends on the number of threads:
those of bfloat16 everywhere; those of few float32 rows on some CPUs although MKL is told not to (see stun/__init__; 173 of 1,493
shapes on an AMD EPYC, all with at most 32 rows). Sums run along rows and are not affected.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stun.runtime.threads import Workers, one_thread

_aten = torch.ops.aten
_NAMES = "silu gelu sigmoid tanh exp exp2 expm1 erf log log2 log1p softplus mish hardswish elu sin cos pow rsqrt reciprocal"
_UNSTEADY = {getattr(_aten, name + suffix) for name in _NAMES.split() for suffix in ("", "_") if hasattr(_aten, name + suffix)}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm}
_ROWS, _BATCH = 512, 8  # rows, or matrices of a batch, per piece of a product


class Steady(TorchDispatchMode):
    """Dispatch mode for CPUs: elementwise functions run on one thread (a thousandth of a layer's work), and products in pieces
    whose size does not depend on the number of threads."""

    def __init__(self, workers: Workers):
        super().__init__()
        self.workers = workers

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would keep torch.compile, which nothing here uses, away from every operation, at the cost of a small one."""
        return False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        packet, keywords = function.overloadpacket, keywords or {}
        if packet is _aten._scaled_dot_product_flash_attention_for_cpu and arguments[0].dtype is torch.bfloat16:
            return self._attention(function, *arguments, **keywords)
        if packet in _PRODUCTS:
            return self._product(function, *arguments, **keywords)
        # A square is a plain product: vector and scalar instructions give the same bits.
        is_square = packet is _aten.pow and isinstance(arguments[1], (int, float)) and arguments[1] == 2
        # All threads compute a single head together; several, one each.
        is_one_head = packet is _aten._scaled_dot_product_flash_attention_for_cpu and arguments[0].shape[:2].numel() == 1
        is_convolution = packet is _aten.convolution and arguments[0].dtype is torch.bfloat16
        if (packet in _UNSTEADY and not is_square) or is_one_head or is_convolution:
            with one_thread():
                return function(*arguments, **keywords)
        return function(*arguments, **keywords)

    def _attention(self, function, query_BHTD, key_BHTD, value_BHTD, *others, attn_mask=None, **keywords):
        """Attention, one sample at a time: the kernel packs its products by the number of threads."""
        has_mask_per_sample = attn_mask is not None and attn_mask.dim() == 4 and len(attn_mask) > 1

        def attend(sample: int):
            one = slice(sample, sample + 1)
            mask = attn_mask[one] if has_mask_per_sample else attn_mask
            return function(query_BHTD[one], key_BHTD[one], value_BHTD[one], *others, attn_mask=mask, **keywords)

        return tuple(map(torch.cat, zip(*self.workers.map(attend, range(len(query_BHTD))), strict=True)))

    def _product(self, function, *arguments, **keywords) -> torch.Tensor:
        """Matrix product by pieces of rows; of columns where there are few rows; of matrices where it is a batch."""
        *added, left, right = arguments
        is_batch = left.dim() == 3
        is_wide = not is_batch and len(left) <= _ROWS
        size, step = (right.shape[1], _ROWS) if is_wide else (len(left), _BATCH if is_batch else _ROWS)
        if size <= step:
            with one_thread():
                return function(*arguments, **keywords)
        output = left.new_empty(*left.shape[:-1], right.shape[-1])
        added = [term.expand_as(output) for term in added]

        def multiply(start: int) -> None:
            piece = slice(start, start + step)
            part = (slice(None), piece) if is_wide else piece
            factors = (left, right[:, piece]) if is_wide else (left[piece], right[piece] if is_batch else right)
            output[part] = function(*(term[part] for term in added), *factors, **keywords)

        self.workers.map(multiply, range(0, size, step))
        return output


def steady(device: torch.device, workers: Workers) -> AbstractContextManager:
    """Context for a layer. One thread needs it too, to match several; GPUs need none."""
    return Steady(workers) if device.type == "cpu" else nullcontext()

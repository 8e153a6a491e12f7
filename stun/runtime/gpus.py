"""The device of a rank: the CPU, or a GPU of its own."""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from stun.config import Device, StunError
from stun.runtime.units import count

_FILES = Path("/dev")  # where the driver puts a file for every GPU
_CPU = "device=cpu computes on the CPU"


# Words of CUDA's, cuBLAS' and NCCL's errors, which have no type of their own.
# The last: a part of a GPU (MIG), where torch fails to ask NVML who took the memory before it says that there is none.
_OUT_OF_MEMORY = re.compile(
    r"(CUDA|Cuda|NCCL).*out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|NVML_SUCCESS == .*CUDACachingAllocator", re.S
)


def is_out_of_gpu_memory(error: Exception) -> bool:
    """Whether a GPU ran out of memory, in torch's allocator, or in a library beside it."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU, Python, torch's CPU allocator or the kernel ran out; the last two have no error type of their own."""
    is_kernel = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_allocator = any(words in str(error) for words in ("not enough memory", "can't allocate memory"))
    return isinstance(error, MemoryError) or is_out_of_gpu_memory(error) or is_kernel or is_allocator


def own_device(wanted: Device, local: int, local_world: int, has_one: bool) -> torch.device:
    """Device of rank `local` of the `local_world` ranks on this node. `has_one` says whether every rank may see one GPU, its own
    (a task of srun --gpus-per-task=1). Raises StunError where a GPU is there, or asked for, and cannot be used, and for more
    ranks than GPUs."""
    if wanted is Device.cpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        file = _gpu_file()
        if file:
            raise _unusable(wanted, f"torch {torch.__version__} cannot use the GPU {file}")
        if wanted is Device.cuda:
            raise StunError(f"device=cuda: there is no GPU here, or none is visible; {_CPU}")
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    is_bound = has_one and visible == 1
    if max(local_world, local + 1) > visible and not is_bound:
        place = f"{count(local_world, 'rank')} on a node with {count(visible, 'visible GPU')}"
        raise StunError(f"{place}: each rank needs its own; start fewer ranks, or device=cpu")
    number = 0 if is_bound else local
    try:
        torch.cuda.set_device(number)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(wanted, str(error).partition("\n")[0].rstrip(".")) from error
    return torch.device("cuda", number)


def set_arithmetic() -> None:
    """Make torch compute on this process' GPU what it computes on every other of its kind, whatever the image it runs in says:
    images of NVIDIA's turn TF32 on for all products of float32. cuDNN may choose convolutions whose sums have no fixed order. Its
    attention, torch's first choice on some GPUs, is planned anew for every length, which is every generated token, and has given
    wrong text for few key-value heads (pytorch #193893)."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    # By torch's older settings and the newer ones: other libraries may ask by either, and a general newer one may say TF32.
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"


def _unusable(wanted: Device, why: str) -> StunError:
    needed = f"a driver for CUDA {torch.version.cuda}" if torch.version.cuda else "torch with CUDA"
    return StunError(f"device={wanted.name}: {why}; install {needed} (nvidia-smi shows the driver); {_CPU}")


def _gpu_file() -> str:
    """File of a GPU that this process may open; "" if there is none, or the user hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1", "NoDevFiles"):
        return ""
    for file in sorted(_FILES.glob("nvidia[0-9]*")):
        with suppress(OSError):  # a job that was given no GPU of its node
            os.close(os.open(file, os.O_RDWR))
            return str(file)
    return ""

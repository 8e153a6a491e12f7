"""Choice of a rank's device, with the driver's and torch's answers put in."""

from __future__ import annotations

import pytest
import torch

from stun.config import Device, StunError
from stun.runtime import gpus
from stun.runtime.gpus import is_out_of_gpu_memory, own_device, set_arithmetic
from stun.runtime.matmul import tf32


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """`cuda(visible, error)`: torch sees so many GPUs, a driver's error comes with their use."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(gpus, "_FILES", tmp_path)
    used = []

    def give(visible: int, error: str = "") -> list[int]:
        def set_device(number: int) -> None:
            if error:
                raise RuntimeError(error)
            used.append(number)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", set_device)
        return used

    return give


@pytest.mark.parametrize(
    "local, ranks, visible, has_one, number", [(0, 1, 1, False, 0), (3, 4, 8, False, 3), (1, 2, 1, True, 0), (1, 2, 2, True, 1)]
)
def test_a_rank_takes_its_own_gpu(cuda, local, ranks, visible, has_one, number):
    used = cuda(visible)
    assert own_device(Device.auto, local, ranks, has_one) == torch.device("cuda", number) and used == [number]


@pytest.mark.parametrize("local, ranks, visible, has_one", [(0, 2, 1, False), (1, 2, 1, False), (3, 4, 3, True), (2, 8, 4, True)])
def test_more_ranks_than_gpus_are_refused_on_every_rank(cuda, local, ranks, visible, has_one):
    cuda(visible)
    with pytest.raises(StunError, match=f"{ranks} ranks on a node with {visible} visible GPU"):
        own_device(Device.auto, local, ranks, has_one)


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_compute_on_the_cpu(cuda, tmp_path, monkeypatch):
    cuda(0)
    assert own_device(Device.auto, 0, 1, False).type == "cpu"
    (tmp_path / "nvidia0").touch()
    with pytest.raises(StunError, match=r"device=auto: torch .* cannot use the GPU .*nvidia0; install .*; device=cpu computes"):
        own_device(Device.auto, 0, 1, False)
    assert own_device(Device.cpu, 0, 1, False).type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert own_device(Device.auto, 0, 1, False).type == "cpu"


def test_a_driver_that_is_too_old_is_named(cuda):
    cuda(1, "The NVIDIA driver on your system is too old (found version 11040).\nMore lines.")
    with pytest.raises(StunError, match=r"device=auto: The NVIDIA driver .* too old \(found version 11040\); install") as error:
        own_device(Device.auto, 0, 1, False)
    assert "\n" not in str(error.value)


def test_cuda_that_is_not_there_is_an_error(cuda):
    cuda(0)
    with pytest.raises(StunError, match="device=cuda: there is no GPU here"):
        own_device(Device.cuda, 0, 1, False)


@pytest.mark.parametrize(
    "message, is_memory",
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("NCCL error in: ProcessGroupNCCL.cpp:3699, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'", True),
        ('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016', True),
        ("NCCL error: ncclInternalError\nLast error:\nDuplicate GPU detected", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`", False),
    ],
)
def test_errors_for_want_of_memory_are_known(message, is_memory):
    assert is_out_of_gpu_memory(RuntimeError(message)) == is_memory
    assert is_out_of_gpu_memory(torch.OutOfMemoryError("x"))


def test_an_image_does_not_choose_the_arithmetic(monkeypatch):
    """As images of NVIDIA's set it (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1), and as torch does by itself."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    cuda.enable_cudnn_sdp(True)
    cuda.matmul.fp32_precision = "tf32"
    try:
        set_arithmetic()
        assert cuda.matmul.fp32_precision == "ieee" and cudnn.conv.fp32_precision == "ieee"
        assert cudnn.deterministic and not cuda.cudnn_sdp_enabled()
        with tf32():
            assert cuda.matmul.fp32_precision == "tf32"
        assert cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "highest" and not cudnn.allow_tf32  # neither asks in vain
    finally:
        cuda.enable_cudnn_sdp(True)
        cudnn.allow_tf32 = True

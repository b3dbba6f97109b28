"""Memory of vLLM Ascend's sleep mode: unmapped while it sleeps, and what NetLoader keeps is not."""

import os
import signal

import torch
import torch_npu  # noqa: F401
from cases import case, run_cases_apart
from vllm_ascend.device_allocator.camem import CaMemAllocator

from vllm_ascend.model_loader.netloader.executor.devices import rowsums
from vllm_ascend.model_loader.netloader.executor.devices.npu import npu_device

HOST = torch.arange(3 << 20, dtype=torch.int32)


def weights():
    """Returns a tensor in the memory that an engine loads its weights into, and the allocator."""
    torch.npu.set_device(0)
    allocator = CaMemAllocator.get_instance()
    with allocator.use_memory_pool("weights"):
        tensor = HOST.to("npu:0")
    return tensor, allocator


def ending(do):
    """Returns how a process ends that does something."""
    child = os.fork()
    if child == 0:
        do()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@case
def after_level_1_the_contents_are_back():
    tensor, allocator = weights()
    address = tensor.data_ptr()
    allocator.sleep(("weights",))
    assert torch.npu.mem_get_info()[0] >= torch.npu.mem_get_info()[1] - (4 << 20)
    allocator.wake_up()
    assert tensor.data_ptr() == address
    assert torch.equal(tensor.cpu(), HOST)


@case
def after_level_2_the_contents_are_lost():
    tensor, allocator = weights()
    allocator.sleep(())
    allocator.wake_up()
    assert not torch.equal(tensor.cpu(), HOST)


@case
def a_copy_from_memory_that_is_unmapped_ends_the_process():
    def touch():
        tensor, allocator = weights()
        allocator.sleep(("weights",))
        tensor.cpu()

    assert ending(touch) == -signal.SIGABRT


@case
def an_operator_on_memory_that_is_unmapped_ends_the_process():
    def touch():
        tensor, allocator = weights()
        allocator.sleep(("weights",))
        tensor.add_(1)
        torch.npu.synchronize()

    assert ending(touch) == -signal.SIGSEGV


@case
def digests_are_right_after_level_2():
    """What computes them was made when the weights were loaded, and is none of them."""
    device = npu_device(0, 32)
    torch.npu.set_device(0)
    allocator = CaMemAllocator.get_instance()
    with allocator.use_memory_pool("weights"):
        tensor = HOST.to("npu:0")
        before = device.digests([tensor])
    allocator.sleep(())
    allocator.wake_up()
    tensor.copy_(HOST)
    assert before == device.digests([tensor]) == rowsums.digests([HOST])


if __name__ == "__main__":
    run_cases_apart()

"""What the simulator lacks must end a process at once, and be named."""

import signal

BEGINNING = (
    "import torch, torch_npu; x = torch.ones(4, 4, device='npu:0'); torch.npu.synchronize()\n"
)
END = "\ntorch.npu.synchronize(); print('went on')"


def test_operator_of_torch_npu(simulator):
    result = simulator.run_code(f"{BEGINNING}torch_npu.npu_gelu(x){END}")
    assert result.code == -signal.SIGABRT, result
    assert "npusim: aclnnGeluV2 is not simulated" in result.output
    assert "went on" not in result.output


def test_operator_of_the_older_kind(simulator):
    result = simulator.run_code(f"{BEGINNING}torch_npu.npu_transpose(x, (1, 0)){END}")
    assert result.code == -signal.SIGABRT, result
    assert "npusim: aclop Transpose is not simulated" in result.output
    assert "went on" not in result.output


def test_operator_of_pytorch(simulator):
    code = "torch.ops.aten._cudnn_init_dropout_state(0.5, True, 1, device='npu:0')"
    result = simulator.run_code(f"{BEGINNING}{code}{END}")
    assert result.code == 1, result
    assert "NotImplementedError" in result.output
    assert "aten::_cudnn_init_dropout_state" in result.output
    assert "went on" not in result.output

"""How the operator's commands are called."""

import pytest

from vllm_ascend.model_loader.netloader import cli


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "nonsense"],
        ["probe", "127.0.0.1:1", "--connections", "0"],
        ["probe", "127.0.0.1:1", "--seconds", "0"],
        ["pull", "127.0.0.1:1"],
        ["diff", "127.0.0.1:1"],
        ["nothing"],
        [],
    ],
)
def test_wrong_usage_has_a_status_of_its_own(arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == cli.USAGE


def test_a_wrong_key_is_wrong_usage(capsys):
    assert cli.main(["status", "127.0.0.1:1", "--config", '{"PROGRESS_TIMEOUT": 0}']) == cli.USAGE
    assert "PROGRESS_TIMEOUT is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [[], ["status"], ["probe"], ["pull"], ["fetch"], ["hold"], ["diff"]]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    assert "usage: netloader" in capsys.readouterr().out

"""What operators of vLLM Ascend have to bring themselves to reload weights."""

from typing import Any


class Reloading:
    """A `--worker-extension-cls`: vLLM's reload, for which vLLM Ascend's worker has no method."""

    model_runner: Any

    def reload_weights(self, **how: Any) -> None:
        """Reloads in place."""
        self.model_runner.reload_weights(**how)

"""The `vllm_ascend` namespace of NetLoader: the hook that vLLM's plugin system calls."""


def register_model_loader() -> None:
    """Make `--load-format netloader` known to vLLM.

    vLLM calls this in each of its processes, possibly more than once.
    """
    from vllm_ascend.model_loader.netloader import register_netloader

    register_netloader()

"""NetLoader: weights out of the memory of a running vLLM instance, instead of from storage."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .utils import LOAD_FORMAT, logger, one_line
from .version import __version__ as __version__

_VLLM_LOADERS = "vllm.model_executor.model_loader"


def register_netloader() -> None:
    """Register the load format, at once or as soon as vLLM imports its model loaders.

    vLLM runs plugins in every process, and its loaders take most of a second to import. A
    process that never loads a model (the API server, any other load format) must not pay that.
    """
    if _VLLM_LOADERS in sys.modules:
        _try_to_register(sys.modules[_VLLM_LOADERS])
    elif not any(isinstance(finder, _RegisterOnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterOnImport())


def _try_to_register(vllm_loaders: ModuleType) -> None:
    """Register, but let what prevents it not end a process that may use another load format."""
    try:
        _register(vllm_loaders)
    except Exception as error:
        logger.debug("NetLoader: not registered", exc_info=True)
        logger.error(
            "NetLoader: registering load format %s failed: %s: %s",
            LOAD_FORMAT,
            type(error).__name__,
            one_line(error),
        )


def _register(vllm_loaders: ModuleType) -> None:
    from vllm_ascend.model_loader.netloader.compat import is_cpu_platform
    from vllm_ascend.model_loader.netloader.executor.devices.amx import request_amx_tiles

    # vLLM's attention on CPUs uses AMX tiles, and nobody has asked for them: the first request ends
    # the worker with SIGILL, unless oneDNN has happened to ask. This is early enough in all
    # processes that load a model, whatever the load format.
    if is_cpu_platform():
        request_amx_tiles()
    # This registers the loader, too. Where it is what imports vLLM's loaders, it does so later.
    module = importlib.import_module("vllm_ascend.model_loader.netloader.netloader")
    loader = getattr(module, "ModelNetLoaderElastic", None)
    registered = vllm_loaders._LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT)
    if loader is not None and registered is not loader:  # another one has come since
        vllm_loaders.register_model_loader(LOAD_FORMAT)(loader)


class _RegisterOnImport(MetaPathFinder):
    """Finds vLLM's loader package as anybody would, and registers when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _VLLM_LOADERS:
            return None
        place = sys.meta_path.index(self)
        del sys.meta_path[place]
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(place, self)  # whoever asks for a spec need not import it
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """A module's own loader, followed by the registration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path[:] = [
            finder for finder in sys.meta_path if not isinstance(finder, _RegisterOnImport)
        ]
        _try_to_register(module)

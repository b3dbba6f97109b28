"""`ModelNetLoaderElastic`: the face towards vLLM."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.util import Finalize

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.utils.network_utils import get_ip

from . import register_if_put_off
from .compat import (
    can_reload_from_sources,
    feed_reload,
    groups_to_come,
    identity_of,
    name_of,
    remember_registrations,
    why_no_reload,
)
from .config import KEYS, Int8Cache, NetLoaderConfig, Sources, parse_config
from .errors import ConfigError, LayoutUnsupported, LoadFailed, NetLoaderError
from .executor.devices import Device, device_of
from .executor.digest import digest_model
from .executor.manifest import PROCESSED, RAW, Manifest, Scalar, allocate
from .executor.processed import (
    capture_processed,
    changed_scalars,
    defined_memory,
    processed_tensors,
)
from .executor.weight_cache import (
    after_processing,
    apply_attributes,
    before_loading,
    capture_loaded,
    copy_int8,
    raw_tensors,
    scalars,
)
from .executor.weights import Weights
from .identity import ModelIdentity
from .interaction.protocol import DRAFT_GROUP
from .load import Loaded, elastic_load
from .serve import Offer, WeightServer
from .utils import Address, logger, one_line


@dataclass(frozen=True)
class _InUse:
    """A model that inference runs on.

    Attributes:
        server: where others pull it from; None: nowhere.
        identity: who it is.
        path: the `model_config.model` it was loaded for.
        manifest: its raw tensors, with which a reload has to fill it; None if that is not known.
    """

    server: WeightServer | None
    identity: ModelIdentity
    path: str
    manifest: Manifest | None


# Reloads come with a loader of their own, so what belongs to a model outlives the loader.
_in_use: "weakref.WeakKeyDictionary[nn.Module, _InUse]" = weakref.WeakKeyDictionary()
# A target and its draft are served on one port.
_servers: dict[tuple[int | None, str | None, int], WeightServer] = {}


class ModelNetLoaderElastic(BaseModelLoader):
    """Loads weights from running instances, or from disk, and lets others load from this one.

    Args:
        load_config: vLLM's; its `model_loader_extra_config` is NetLoader's configuration.

    Raises:
        ConfigError: the configuration is wrong.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._config = parse_config(load_config.model_loader_extra_config)
        self._disk = _disk_loader(load_config, self._config)
        self._vllm_config: VllmConfig | None = None
        self._known: ModelIdentity | None = None
        self._from_disk = False
        self._to_fill = False
        self._scalars: Mapping[str, Scalar] = {}
        self._manifest: Manifest | None = None
        self._weights: Weights | None = None
        self._copies: dict[int, torch.Tensor] = {}
        self._unserved = ""

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the checkpoint, unless the weights are to come from other instances."""
        if any(sources.addresses for sources in self._config.source.values()):
            logger.info("NetLoader: nothing downloaded, the weights come from other instances")
        else:
            self._disk.download_model(model_config)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Load a model from the first sources that have it, else from disk, and offer it.

        Raises:
            LoadFailed: neither a source nor the disk has the weights; the message says both.
        """
        self._vllm_config = vllm_config
        if not self._supported():
            return self._disk.load_model(vllm_config, model_config, prefix)
        # Now: vLLM changes a draft's configuration while it makes the model. And a wrong MODEL is
        # an error, and no reason to go to disk.
        self._known = self._identify(model_config)
        restore_registrations = remember_registrations(vllm_config)
        failure = ""
        try:
            model = self._load_from_sources(vllm_config, model_config, prefix)
        except NetLoaderError as error:
            failure = str(error)
        # Outside the handler: there the exception would keep the half-filled model alive.
        if failure:
            logger.warning(
                "NetLoader rank %d: loading from disk, as no source gave the weights: %s",
                _rank(),
                failure,
            )
            restore_registrations()
            gc.collect()
            model = self._load_from_disk(vllm_config, model_config, prefix, failure)
        self._offer(model, model_config)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load weights into a model, new or in use, from the sources, or from disk without any."""
        if not self._supported():
            self._disk.load_weights(model, model_config)
            return
        if model in _in_use:
            weights = self.get_all_weights(model_config, model)
            initialize_layerwise_reload(model)
            model.load_weights(weights)
            finalize_layerwise_reload(model, model_config)
            return
        self._unserved = ""  # what an attempt before this one has met
        device, identity = self._device(), self._identity(model_config)
        sources = () if self._from_disk else self._of_rank(identity.rank).addresses
        serving = self._config.port_for(identity.rank) is not None
        if identity.layout == PROCESSED:
            self._scalars, self._to_fill = scalars(model), bool(sources)
            if not sources:
                self._disk.load_weights(model, model_config)
            return
        if sources:
            tensors, required = raw_tensors(model)
            loaded = self._pull(tensors, required, sources, identity, device)
            apply_attributes(model, loaded.manifest.attributes)
            self._manifest = loaded.manifest
            self._weights = _weights(loaded, device) if serving else None
        else:
            before = before_loading(model, device)
            self._disk.load_weights(model, model_config)
            self._weights = None
            if serving:
                with self._preparing_to_serve():
                    self._weights = capture_loaded(model, before, self._config.chunk_bytes, device)
        if self._weights is not None:
            with self._preparing_to_serve():
                self._copies = copy_int8(
                    self._weights, self._config.int8_cache, self._config.int8_cache_name
                )

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Reload a model in use: return its checkpoint, or nothing where the sources fill it.

        This is what vLLM's `reload_weights` asks a loader for before it prepares the model. Sources
        have no checkpoint to give; they fill the model's layers directly once that is done.

        Raises:
            LayoutUnsupported: this model cannot be reloaded in place; it is left as it is.
        """
        if not self._supported():
            return self._disk.get_all_weights(model_config, model)
        if reason := why_no_reload(model, self._device_name()):
            raise LayoutUnsupported(reason)
        in_use = _in_use.get(model)
        if in_use is not None and in_use.path == model_config.model and in_use.manifest is not None:
            try:
                if sources := self._sources(in_use.identity.rank):
                    return self._renewed(model, in_use, in_use.manifest, sources)
            except LoadFailed as error:
                logger.warning(
                    "NetLoader rank %d: reloading from disk, as no source gave the weights: %s",
                    in_use.identity.rank,
                    error,
                )
        # Now, as vLLM takes the old weights away before it reads the first of the new ones.
        self._disk.download_model(model_config)
        if in_use is not None and in_use.server is not None and in_use.server.listening:
            logger.info(
                "NetLoader rank %d: reloading from disk; this instance is no source from now on",
                in_use.identity.rank,
            )
            in_use.server.withdraw(in_use.identity.group)
        return self._disk.get_all_weights(model_config, model)

    def _renewed(
        self, model: nn.Module, in_use: _InUse, manifest: Manifest, sources: Sequence[Address]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Pull now, into memory of its own, and fill the model when the iterator is consumed."""
        device = self._device()
        with self._device_name():
            tensors = allocate(manifest)
        loaded = self._pull(tensors, tensors.keys(), sources, in_use.identity, device)
        if in_use.server is not None:
            in_use.server.withdraw(in_use.identity.group)

        def fill() -> Iterator[tuple[str, torch.Tensor]]:
            feed_reload(model, tensors)
            apply_attributes(model, loaded.manifest.attributes)
            if in_use.server is not None and in_use.server in _servers.values():
                in_use.server.offer(Offer(in_use.identity, _weights(loaded, device), device))
                _open(in_use.server, self._config, in_use.identity.rank)
            yield from ()

        return fill()

    def _load_from_sources(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> nn.Module:
        """Load from the sources; where none are configured, vLLM's own steps load from disk.

        In the processed layout `load_weights` has left the model empty. It has been post-processed
        since, so that its tensors are those that inference uses, and they are filled now.
        """
        identity = self._identity(model_config)
        sources = self._sources(identity.rank)
        if identity.layout == RAW or not sources:
            return self._follow_vllm(vllm_config, model_config, prefix)
        try:
            with defined_memory():
                model = super().load_model(vllm_config, model_config, prefix)
        except Exception as error:
            if not self._to_fill:
                raise
            # Loading from disk does not depend on what post-processing makes of an empty model.
            raise LayoutUnsupported(
                f"an empty model cannot be post-processed: {type(error).__name__}: {error}"
            ) from None
        device, tensors = self._device(), processed_tensors(model)
        loaded = self._pull(tensors, tensors.keys(), sources, identity, device)
        apply_attributes(model, loaded.manifest.attributes)
        if self._config.port_for(identity.rank) is not None:
            self._weights = _weights(loaded, device)
        return model

    def _load_from_disk(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str, failure: str
    ) -> nn.Module:
        self._from_disk = True
        try:
            return self._follow_vllm(vllm_config, model_config, prefix)
        except Exception as error:
            raise LoadFailed(
                f"no source gave the weights ({failure}), and they cannot be loaded from disk "
                f"either ({type(error).__name__}: {error})"
            ) from error
        finally:
            self._from_disk = False

    def _follow_vllm(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> nn.Module:
        """Make, load and post-process a model in vLLM's own steps."""
        # A draft may have tensors that no checkpoint fills, as it uses the target's in their place;
        # what instances offer should be the same in all of them. A target would take longer for it.
        draft = self._identity(model_config).group == DRAFT_GROUP
        with defined_memory() if draft else contextlib.nullcontext():
            return super().load_model(vllm_config, model_config, prefix)

    def _pull(
        self,
        tensors: dict[str, torch.Tensor],
        required: Iterable[str],
        sources: Sequence[Address],
        identity: ModelIdentity,
        device: Device,
    ) -> Loaded:
        try:
            return elastic_load(
                tensors,
                set(required),
                sources,
                identity,
                self._config,
                device,
                show_progress=identity.rank == 0 and bool(self.load_config.use_tqdm_on_load),
            )
        except LoadFailed as error:
            malformed = _malformed(self._of_rank(identity.rank))
            raise LoadFailed("; ".join((*malformed, str(error)))) from None

    def _offer(self, model: nn.Module, model_config: ModelConfig) -> None:
        device, identity = self._device(), self._identity(model_config)
        weights, copies = self._weights, self._copies
        self._weights, self._copies = None, {}
        with self._preparing_to_serve():
            if identity.layout == PROCESSED:
                if weights is None and self._config.port_for(identity.rank) is not None:
                    attributes = changed_scalars(self._scalars, scalars(model))
                    weights = capture_processed(model, attributes, self._config.chunk_bytes, device)
            elif weights is not None and not self._unserved:
                dram = self._config.int8_cache is Int8Cache.DRAM
                in_use = processed_tensors(model) if dram else {}
                weights = after_processing(weights, copies, device, in_use)
        if self._unserved:
            weights = None
            logger.warning(
                "NetLoader rank %d: this model cannot be a source: %s",
                identity.rank,
                self._unserved,
            )
        assert self._vllm_config is not None
        to_come = groups_to_come(self._vllm_config, identity)
        server = _serve(self._config, Offer(identity, weights, device, self._unserved), to_come)
        manifest = self._manifest if weights is None else weights.manifest
        if not can_reload_from_sources(self._device_name()):
            manifest = None
        _in_use[model] = _InUse(server, identity, model_config.model, manifest)
        if server is not None:
            # At exit the server stops by itself, and in a forked child it is not to be stopped.
            weakref.finalize(model, _retire, server, identity.group).atexit = False

    @contextlib.contextmanager
    def _preparing_to_serve(self) -> Iterator[None]:
        """Let nothing that keeps an instance from being a source keep it from starting."""
        try:
            yield
        except LayoutUnsupported as error:
            self._unserved = str(error)
        except (RuntimeError, MemoryError) as error:  # torch's, above all for want of memory
            logger.debug("NetLoader: no source", exc_info=True)
            self._unserved = f"preparing it failed: {type(error).__name__}: {one_line(error)}"

    def _of_rank(self, rank: int) -> Sources:
        return self._config.source.get(rank, Sources())

    def _sources(self, rank: int) -> Sequence[Address]:
        """Return where a rank can get its weights, and warn of what SOURCE lacks for it.

        Raises:
            LoadFailed: there are malformed addresses only.
        """
        sources = self._of_rank(rank)
        malformed = _malformed(sources)
        for reason in malformed:
            logger.warning("NetLoader rank %d: %s", rank, reason)
        if malformed and not sources.addresses:
            raise LoadFailed("; ".join(malformed))
        if not sources.addresses and rank in self._config.source:
            logger.warning(
                "NetLoader rank %d: loading from disk, as SOURCE has no sources for this rank", rank
            )
        elif not sources.addresses and self._config.source:
            logger.warning(
                "NetLoader rank %d: loading from disk, as SOURCE has entries for rank %s only",
                rank,
                ", ".join(map(str, sorted(self._config.source))),
            )
        return sources.addresses

    def _identity(self, model_config: ModelConfig) -> ModelIdentity:
        return self._known or self._identify(model_config)

    def _identify(self, model_config: ModelConfig) -> ModelIdentity:
        vllm_config = self._vllm_config or get_current_vllm_config()
        config = self._config.with_model(name_of(model_config))
        assert config.model is not None
        layout = self._device().layout if self._config.int8_cache is Int8Cache.NO else RAW
        return identity_of(vllm_config, model_config, config.model, _rank(), layout)

    def _supported(self) -> bool:
        try:
            self._device()
        except LayoutUnsupported as error:
            logger.warning("NetLoader rank %d: loading from disk: %s", _rank(), error)
            return False
        return True

    def _device(self) -> Device:
        return device_of(self._device_name(), self._config.hccl_buffer_size)

    def _device_name(self) -> torch.device:
        vllm_config = self._vllm_config or get_current_vllm_config()
        return torch.device(self.load_config.device or vllm_config.device_config.device)


def _disk_loader(load_config: LoadConfig, config: NetLoaderConfig) -> DefaultModelLoader:
    disk = copy.copy(load_config)
    disk.load_format = "auto"
    disk.model_loader_extra_config = dict(config.disk)
    try:
        return DefaultModelLoader(disk)
    except ValueError as error:
        if not config.disk:
            raise
        raise ConfigError(
            f"--model-loader-extra-config has {', '.join(map(repr, sorted(config.disk)))} for "
            f"vLLM's default loader, which refuses it: {one_line(error)}; NetLoader's own keys: "
            f"{', '.join(KEYS)}"
        ) from None


def _malformed(sources: Sources) -> list[str]:
    return [f"malformed source {reason}" for reason in sources.malformed]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _weights(loaded: Loaded, device: Device) -> Weights:
    manifest, plan, tensors = loaded.manifest, loaded.plan, loaded.tensors
    digests = loaded.digests or digest_model(manifest, plan, tensors, device)
    return Weights(manifest, tensors, plan, digests)


def _retire(server: WeightServer, group: str) -> None:
    """Let a model that is gone be served no more, and close a server that has none left."""
    if not any(
        known.server is server and known.identity.group == group for known in _in_use.values()
    ):
        server.withdraw(group)
    if not any(known.server is server for known in _in_use.values()):
        server.stop()
        for key in [key for key, known in _servers.items() if known is server]:
            del _servers[key]


def _serve(
    config: NetLoaderConfig, offer: Offer, to_come: Iterable[str] = ()
) -> WeightServer | None:
    """Offer a model on this process's server for a configuration, started if need be.

    With nothing to give it is not started. The offer is kept for its reason: a draft that comes
    later, or a reload, may start the server.
    """
    rank = offer.identity.rank
    if config.port_for(rank) is None:
        logger.info(
            "NetLoader rank %d: no server, as LISTEN_PORT %s is outside 1024-65535",
            rank,
            config.listen_port,
        )
        return None
    key = (config.listen_port, config.output_prefix, rank)
    if (server := _servers.get(key)) is None:
        server = WeightServer(config, rank, config.announced_host or get_ip())
        _servers[key] = server
    server.offer(offer)  # before anybody can ask for it
    for group in to_come:
        server.expect(group)
    if offer.declined or _open(server, config, rank):
        return server
    del _servers[key]
    return None


def _open(server: WeightServer, config: NetLoaderConfig, rank: int) -> bool:
    """Listen, if the server does not yet; return whether it does."""
    port = config.port_for(rank)
    if server.listening or port is None:
        return server.listening
    try:
        server.start(port)
    except OSError as error:
        logger.error(
            "NetLoader rank %d: cannot listen on port %d, so this instance is no source: %s",
            rank,
            port,
            error,
        )
        return False
    # Worker processes do not run atexit handlers; multiprocessing's own are run in all.
    Finalize(None, server.stop, exitpriority=100)
    return True


# vLLM's loaders are there by now. Where this module was the first to import them, they have not
# got this one yet.
register_if_put_off()

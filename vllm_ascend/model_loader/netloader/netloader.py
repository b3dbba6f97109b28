"""`ModelNetLoaderElastic`: the face towards vLLM."""

import contextlib
import copy
import gc
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.utils.network_utils import get_ip

from . import metrics, registry
from .agreement import AS_CONFIGURED, DISK, Attempt, Order, Ranks, RankWeights, load_together
from .changes import After, Change
from .compat import (
    default_dtype_kept,
    feed_reload,
    folder_of,
    groups_to_come,
    has_checkpoint,
    identity_of,
    instance_of,
    load_watched,
    meaning_of,
    modules_without_files,
    name_of,
    places_of,
    ranks_of,
    read_through,
    register_weight_transfer,
    remember_state,
    take_over_load,
    watch,
    why_experts_move,
    why_no_checkpoint,
    why_no_reload,
    why_no_reload_from_sources,
    why_weights_move,
    worker_of,
)
from .config import KEYS, Int8Cache, NetLoaderConfig, Sources, parse_config
from .errors import ChosenToRead, ConfigError, LayoutUnsupported, LoadFailed, NetLoaderError
from .executor.chunks.digests import is_of_instance, is_one_of, of_instance
from .executor.chunks.manifest import PROCESSED, RAW, Sample, Scalar
from .executor.devices import Device, start_prefault
from .executor.devices.choose import device_of
from .executor.model.processed import (
    changed_scalars,
    defined_memory,
    processed_tensors,
)
from .executor.model.raw import (
    after_processing,
    apply_attributes,
    before_loading,
    capture_loaded,
    copy_int8,
    owners_of,
    raw_tensors,
    samples_of,
    scalars,
    viewed_through,
    weights_outside,
    without_doubles,
)
from .executor.model.trace import Trace
from .executor.store import BlockStore, make_store
from .executor.view.boxes import Unmapped
from .executor.view.offered import Viewed
from .executor.view.records import Records
from .identity import ModelIdentity
from .interaction.api import DRAFT_GROUP, Code
from .interaction.cold_start import Choice, Phase
from .interaction.discovery import Own
from .load import elastic_load
from .loading.target import ColdStart
from .loading.view import (
    Instance,
    find_instance,
    load_through_view,
    records_by_name,
    whole_checkpoint,
)
from .serve import Offer, Relay
from .utils import LOAD_FORMAT, Address, Name, logger, one_line, parse_address, rate, size

# Seconds to wait at most for sources that have the weights of the instance's other ranks.
_WAIT_AGAIN = 30.0

T = TypeVar("T")

_instances = itertools.count(1)


@dataclass
class _Load:
    """One load of one model, from what vLLM asks for to what others can pull.

    Attributes:
        identity: who the model is.
        device: where it is.
        ranks: those of the instance that load it together.
        serving: whether others may pull it, if it turns out to be possible.
        hashing: whether its weights digest is needed, even if it is loaded from disk.
        from_disk: whether the sources are out of the question.
        wanted: the weights that go with those of the instance's other ranks, if that is known.
        store: its weights, as far as others can pull them.
        copies: of raw tensors that post-processing may change.
        scalars: the plain attributes before loading, in the processed layout.
        to_fill: whether the model is still empty, as it is filled after post-processing.
        worker: number of this process among all workers of the instance, also in the log.
        process: see `Own`, unless another server listens by then.
        unserved: why others cannot pull it.
        loaded_from: where the weights came from.
        weights: their digest, if known.
        lists: see `load.Loaded`.
        instance: the one whose view of the checkpoint is read in the place of the disk.
        records: how the weights came from a checkpoint, if that was seen.
        view: the checkpoint as others see it through the store.
        why_no_view: why they cannot.
    """

    identity: ModelIdentity
    device: Device
    ranks: Ranks
    serving: bool
    hashing: bool = False
    from_disk: bool = False
    wanted: str | None = None
    worker: int = 0
    process: str = ""
    store: BlockStore | None = None
    copies: dict[int, torch.Tensor] = field(default_factory=dict)
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    to_fill: bool = False
    unserved: str = ""
    loaded_from: str = DISK
    weights: str | None = None
    lists: Sequence[RankWeights] = ()
    instance: Instance | None = None
    records: Records | None = None
    view: Viewed | None = None
    why_no_view: str = Offer.why_no_view

    @contextlib.contextmanager
    def seeing(self) -> Iterator[None]:
        """Go without a view of the checkpoint where it cannot be had, whatever the reason."""
        try:
            yield
        except Exception as error:
            logger.debug("NetLoader: noting where weights come from failed", exc_info=True)
            known = isinstance(error, Unmapped | NetLoaderError)
            kind = "" if known else f"{type(error).__name__}: "
            self.why_no_view = f"{kind}{one_line(error)}"

    @contextlib.contextmanager
    def preparing_to_serve(self) -> Iterator[None]:
        """Record why this instance cannot serve instead of failing the start."""
        try:
            yield
        except LayoutUnsupported as error:
            self.unserved = str(error)
        except RuntimeError as error:  # torch's, such as a device that is out of memory
            logger.debug("NetLoader: preparing to be a source failed", exc_info=True)
            self.unserved = f"preparing it failed: {type(error).__name__}: {one_line(error)}"


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint that has come for a reload.

    Attributes:
        source: where it came from.
        instance: digest of the instance that it was seen through.
        weights: its tensors, in memory of their own.
    """

    source: str
    instance: str
    weights: Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Renewal:
    """New weights for a model in use, from sources.

    Attributes:
        load: how they came.
        tensors: name -> raw tensor, for all places of the model.
        outside: name -> the model's tensor and the new one, of modules outside the module tree.
        store: the weights.
    """

    load: _Load
    tensors: Mapping[str, torch.Tensor]
    outside: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    store: BlockStore


@register_model_loader(LOAD_FORMAT)
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
        self._disk = disk_loader(load_config, self._config)
        self._vllm_config: VllmConfig | None = None
        self._load: _Load | None = None
        self._relay: Relay | None = None
        self._cold: ColdStart | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the checkpoint, unless the weights are to come from other instances."""
        if any(sources.addresses for sources in self._config.source.values()):
            logger.info("NetLoader: no weights downloaded, as SOURCE has sources for them")
        else:
            self._disk.download_model(model_config)

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Load a model from the first sources that have it, else from disk, and offer it.

        Raises:
            LoadFailed: neither a source nor the disk has the weights; the message says both. Or no
                source has them, and FALLBACK is false. Or the instance's ranks cannot all get
                weights that belong together; see `agreement`.
            LayoutUnsupported: FALLBACK is false, and this instance cannot load from its sources.
        """
        self._vllm_config = vllm_config
        if not self._supported():
            disk: Any = copy.copy(self._disk)
            disk.load_weights = self._read_alone
            return disk.load_model(vllm_config, model_config, prefix)
        # Now: vLLM changes a draft's configuration while it makes the model. And a wrong MODEL is
        # an error, and no reason to go to disk.
        identity = self._identify(model_config)
        restore_state = remember_state(vllm_config, model_config)
        # The processes of all ranks make their instances in the same order.
        ranks = replace(ranks_of(vllm_config, identity), instance=next(_instances))

        def start_over() -> None:
            self._load = None
            restore_state()
            gc.collect()

        def attempt(order: Order) -> Attempt[tuple[_Load, nn.Module]]:
            began = time.monotonic()
            if order.weights is not None:
                start_over()
            failure = "the ranks of this instance had different weights" if order.disk else ""
            reason = "ranks_differ"
            others: Sequence[str] = ()
            if not failure:
                load = self._load = self._new_load(identity, model_config, order)
                try:
                    with default_dtype_kept():
                        model = self._load_from_sources(load, vllm_config, model_config, prefix)
                except NetLoaderError as error:
                    others = error.others if isinstance(error, LoadFailed) else ()
                    if order != AS_CONFIGURED or not (self._config.fallback or others):
                        raise
                    failure, reason = str(error), _reason(error)
            # Outside the handler: there the exception would keep the half-filled model alive.
            if failure:
                start_over()
                if self._relay is not None:
                    self._relay.announce(Phase.READING)
            if others:
                try:
                    load, model = self._load_through_views(
                        others, identity, vllm_config, model_config, prefix, start_over, began
                    )
                except LoadFailed as error:
                    failure = f"{failure}; {error}"
                    if not self._config.fallback:
                        raise LoadFailed(failure) from None
                else:
                    failure = ""
            if failure:
                metrics.count(metrics.FALLBACKS, reason)
                if reason not in ("chosen", "ranks_differ"):
                    logger.warning(
                        "NetLoader rank %d: trying the disk, as no source gave the weights: %s",
                        self._worker(),
                        failure,
                    )
                load = self._load = replace(self._new_load(identity, model_config), from_disk=True)
                with default_dtype_kept():
                    model = self._load_from_disk(load, vllm_config, model_config, prefix, failure)
            self._finish(load, model)
            view = load.instance.digest if load.instance is not None else ""
            return Attempt((load, model), load.loaded_from, load.weights, load.lists, view)

        with self._listening(identity, model_config, ranks):
            (load, model), agreed = self._together(identity, attempt)
            self._load = None
            self._compare_with_pin(load, agreed)
            self._offer(load, model, model_config, agreed, ranks)
        return model

    @contextlib.contextmanager
    def _listening(
        self, identity: ModelIdentity, model_config: ModelConfig, ranks: Ranks
    ) -> Iterator[None]:
        """Let others ask while a model is loaded, and have what has come of it from sources."""
        load, vllm_config = self._new_load(identity, model_config), self._vllm_config
        sources = self._config.sources_of(identity.rank).addresses
        names = any(isinstance(source, Name) for source in sources)
        can_read = names and self._config.fallback and has_checkpoint(model_config)
        if names:
            ranks.publish_can_read(can_read)
        all_can_read = partial(ranks.can_read, can_read)
        if load.serving and vllm_config is not None:
            phase = Phase.WAITING if names else Phase.LOADING if sources else Phase.READING
            self._relay = registry.begin_load(
                self._member(load, ranks),
                Offer(
                    identity,
                    None,
                    "the weights are being loaded",
                    endpoints=ranks.endpoints,
                    code=Code.LOADING,
                    phase=phase,
                    can_read=all_can_read,
                ),
            )
        relay = self._relay
        if names and ranks.chooses and relay is None:  # nobody sees what this instance does
            ranks.publish_choice(Choice.LEAVE)
        elif names:
            announce = relay.announce if relay is not None else lambda phase: None
            told = None if ranks.chooses else ranks.choice
            self._cold = ColdStart(all_can_read, announce, ranks.publish_choice, told)
        try:
            yield
        except BaseException:
            if self._relay is not None:
                registry.give_up_load(self._relay)
            raise
        finally:
            self._relay = self._cold = None

    def _together(
        self, identity: ModelIdentity, attempt: Callable[[Order], Attempt[T]]
    ) -> tuple[T, RankWeights]:
        """Load until the instance's ranks have weights that belong together."""
        vllm_config = self._vllm_config or get_current_vllm_config()
        ranks = ranks_of(vllm_config, identity)
        ranks.publish_host(self._host())
        loaded, digests = load_together(
            ranks,
            attempt,
            sources=bool(self._config.sources_of(identity.rank).addresses),
            fallback=self._config.fallback,
        )
        if digests and identity.rank == ranks.all[0]:
            logger.info(
                "NetLoader rank %d: instance digest %s, from the weights digests of %d of %d ranks",
                self._worker(),
                of_instance(digests),
                len(digests),
                len(ranks.all),
            )
        return loaded, digests

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load weights into a model, new or in use, from the sources, or from disk without any."""
        if not self._supported():
            self._read_alone(model, model_config)
            return
        if registry.in_use(model) is not None:
            with registry.changing(model, Change("reload", After.WHOLE, at_once=False)):
                weights = self.get_all_weights(model_config, model)
                initialize_layerwise_reload(model)
                model.load_weights(weights)
                finalize_layerwise_reload(model, model_config)
            return
        load = self._load or self._new_load(self._identify(model_config), model_config)
        sources = () if load.from_disk else self._config.sources_of(load.identity.rank).addresses
        if load.identity.layout == PROCESSED:
            load.scalars, load.to_fill = scalars(model), bool(sources)
            if not sources:
                self._read_disk(load, model, model_config)
        elif sources:
            tensors, required = raw_tensors(model)
            meaning, made = meaning_of(model, RAW), samples_of(model)
            store = self._pull(load, model, tensors, required, sources, meaning, made)
            apply_attributes(model, store.manifest.attributes)
            load.store = store if load.serving else None
        else:
            before = None
            if load.serving or load.hashing:
                with load.preparing_to_serve():
                    before = before_loading(model, load.device)
            self._read_disk(load, model, model_config, trace=before is not None and load.serving)
            if before is not None:
                with load.preparing_to_serve():
                    meaning = meaning_of(model, RAW)
                    load.store = _hashed(
                        load, lambda: capture_loaded(model, before, load.device, meaning)
                    )
        if load.store is not None:
            with load.preparing_to_serve():
                load.copies = copy_int8(
                    load.store, self._config.int8_cache, self._config.int8_cache_name
                )

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Reload a model in use: return its checkpoint, or nothing where the sources fill it.

        This is what vLLM's `reload_weights` asks a loader for before it prepares the model. Sources
        fill the model's layers directly once that is done. Where they cannot, as the layers have
        other parts of the weights or other names than theirs, they give the checkpoint instead.

        Raises:
            LayoutUnsupported: this model cannot be reloaded in place; it is left as it is.
        """
        return self.new_weights(model_config, model, from_disk=True)

    def new_weights(
        self, model_config: ModelConfig, model: nn.Module, *, from_disk: bool
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Do what `get_all_weights` does.

        Args:
            model_config: the model's.
            model: the model in use.
            from_disk: whether the disk may be read, which another path than before asks for.

        Raises:
            LayoutUnsupported: see `get_all_weights`.
            LoadFailed: no source gave the weights, and the disk is not to be read.
        """
        if not self._supported():
            return self._disk.get_all_weights(model_config, model)
        known = registry.in_use(model)
        reason = why_no_reload(model, self._device_name())
        identity = known.identity if known else self._identify(model_config)
        same_path = not from_disk or known is None or known.path == model_config.model
        failure = ""
        # Before the ranks meet: afterwards one may have new weights already.
        ranks, pinned = known.ranks if known else None, self._config.weights_digest
        had = ranks.present({}) if ranks is not None else {}

        def attempt(order: Order) -> Attempt[_Renewal | _Checkpoint | None]:
            nonlocal failure
            began = time.monotonic()
            if reason:
                raise LayoutUnsupported(reason)
            try:
                use = same_path and not order.disk
                if use and (sources := self._sources(identity.rank, self._worker())):
                    if unable := why_no_reload_from_sources(self._device_name()):
                        raise LayoutUnsupported(unable)
                    load = self._new_load(identity, model_config, order)
                    try:
                        renewal = self._renewal(load, model, sources)
                    except LoadFailed as error:
                        if order != AS_CONFIGURED:
                            raise
                        if unable := why_no_checkpoint(model):
                            raise LoadFailed(f"{error}; {unable}") from None
                        seen = self._seen_through(identity, error, began)
                        return Attempt(seen, seen.source, view=seen.instance)
                    return Attempt(renewal, load.loaded_from, load.weights, load.lists)
            except (LoadFailed, LayoutUnsupported) as error:
                if not self._config.fallback or order != AS_CONFIGURED:
                    raise
                failure = str(error)
                metrics.count(metrics.FALLBACKS, _reason(error))
                logger.warning(
                    "NetLoader rank %d: reloading from disk, as no source gave the weights: %s",
                    self._worker(),
                    failure,
                )
            if not from_disk:
                raise LoadFailed("no instance is named for this rank")
            return Attempt(None)

        renewal, agreed = self._together(identity, attempt)
        if isinstance(renewal, _Checkpoint):
            registry.loaded_from(model, renewal.source)
            return renewal.weights
        if renewal is not None:
            return self._renewed(model, model_config, renewal, agreed)
        # Now, as vLLM takes the old weights away before it reads the first of the new ones.
        try:
            self._disk.download_model(model_config)
        except Exception as error:
            if not failure:
                raise
            raise _neither(failure, error) from error
        compare = None
        if pinned is not None and ranks is not None:
            compare = partial(_compare_reloaded, pinned, self._worker(), ranks.all, had)
        registry.loaded_from(model, DISK, compare)
        return self._disk.get_all_weights(model_config, model)

    def _seen_through(
        self, identity: ModelIdentity, error: LoadFailed, began: float
    ) -> "_Checkpoint":
        """Return the checkpoint as it is seen through the first instance that has a view.

        Args:
            identity: of this rank.
            error: why the sources have not given weights by name.
            began: when they were asked first; SOURCE_WAIT counts from then.

        Raises:
            LoadFailed: there is none; says that, too.
        """
        worker, addresses = self._worker(), map(parse_address, [*error.others, *error.known])
        try:
            instance = find_instance(addresses, identity, self._config, worker, began=began)
            with metrics.load_from(metrics.PEERS):
                weights = whole_checkpoint(instance, identity, self._config, worker, _world_size())
        except LoadFailed as problem:
            raise LoadFailed(f"{error}; {problem}") from None
        return _Checkpoint(str(instance), instance.digest, weights)

    def _renewal(
        self, load: _Load, model: nn.Module, sources: Sequence[Address | Name]
    ) -> "_Renewal":
        """Pull new weights into memory of their own.

        A source whose tensors have not exactly the places that this model has is refused before
        anything of the model is taken away.
        """
        with self._device_name():
            tensors, required = places_of(model)
        outside = {
            name: (own, torch.empty_like(own)) for name, own in weights_outside(model).items()
        }
        store = self._pull(
            load,
            model,
            tensors | {name: new for name, (_, new) in outside.items()},
            required | outside.keys(),
            sources,
            meaning_of(model, RAW),
        )
        return _Renewal(load, tensors, outside, store)

    def _renewed(
        self, model: nn.Module, model_config: ModelConfig, renewal: "_Renewal", agreed: RankWeights
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Fill the model when it is to load the iterator."""
        load, records = renewal.load, renewal.load.records
        registry.loaded_from(model, load.loaded_from)

        def fill() -> set[str]:
            came = {entry.name for entry in renewal.store.manifest.tensors}
            with registry.changing(model, Change("reload", After.WHOLE)):
                tensors = renewal.tensors
                feed_reload(model, {name: tensors[name] for name in tensors if name in came})
                for own, new in renewal.outside.values():
                    own.copy_(new)
                apply_attributes(model, renewal.store.manifest.attributes)
                if records is not None:
                    registry.came_with(model, records)
            if load.serving and not registry.is_renewable(model):
                load.store = without_doubles(renewal.store, model)
                if records is not None:
                    with load.seeing():
                        load.view = viewed_through(load.store, records)
                self._offer(load, model, model_config, agreed)
            return came

        weights: Iterator[tuple[str, torch.Tensor]] = iter(())
        take_over_load(model, weights, fill)
        return weights

    def _load_from_sources(
        self, load: _Load, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> nn.Module:
        """Load from the sources; where none are configured, vLLM's own steps load from disk.

        In the processed layout `load_weights` has left the model empty. It has been post-processed
        since, so that its tensors are those that inference uses, and they are filled now.
        """
        sources = self._sources(load.identity.rank, load.worker)
        if not sources:
            return self._follow_vllm(load, vllm_config, model_config, prefix)
        if load.identity.layout == RAW:
            with modules_without_files():
                return self._follow_vllm(load, vllm_config, model_config, prefix)
        try:
            with defined_memory(), modules_without_files():
                model = super().load_model(vllm_config, model_config, prefix)
        except Exception as error:
            if not load.to_fill:
                raise
            # Loading from disk does not depend on what post-processing makes of an empty model.
            raise LayoutUnsupported(
                f"an empty model cannot be post-processed: {type(error).__name__}: {error}"
            ) from None
        tensors = processed_tensors(model)
        meaning = meaning_of(model, PROCESSED)
        load.device.synchronize()  # what post-processing still writes is not to come last
        store = self._pull(load, model, tensors, tensors.keys(), sources, meaning)
        apply_attributes(model, store.manifest.attributes)
        load.store = store if load.serving else None
        return model

    def _load_through_views(
        self,
        others: Sequence[str],
        identity: ModelIdentity,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
        prefix: str,
        start_over: Callable[[], None],
        began: float,
    ) -> tuple[_Load, nn.Module]:
        """Load from the first instance of another placement that has what this rank needs.

        SOURCE_WAIT counts from when the load `began`.

        Raises:
            LoadFailed: there is none; says what is wrong with each.
        """
        worker, addresses = self._worker(), [parse_address(other) for other in others]
        tried: list[Instance] = []
        reasons: list[str] = []
        while True:
            try:
                instance = find_instance(addresses, identity, self._config, worker, tried, began)
            except LoadFailed as error:
                raise LoadFailed("; ".join([*reasons, str(error)])) from None
            tried.append(instance)
            load = replace(
                self._new_load(identity, model_config), from_disk=True, instance=instance
            )
            self._load = load
            try:
                with default_dtype_kept(), modules_without_files():
                    return load, self._follow_vllm(load, vllm_config, model_config, prefix)
            except Exception as error:  # there is the disk, and it fails in the same way if need be
                said = "" if isinstance(error, LoadFailed) else f"{type(error).__name__}: "
                reasons.append(f"{said}{one_line(error)}")
                logger.warning(
                    "NetLoader rank %d: loading through a view failed: %s", worker, reasons[-1]
                )
            start_over()

    def _load_from_disk(
        self,
        load: _Load,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
        prefix: str,
        failure: str,
    ) -> nn.Module:
        try:
            return self._follow_vllm(load, vllm_config, model_config, prefix)
        except Exception as error:
            raise _neither(failure, error) from error

    def _follow_vllm(
        self, load: _Load, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str
    ) -> nn.Module:
        """Make, load and post-process a model in vLLM's own steps."""
        # A draft may have tensors that no checkpoint fills, as it uses the target's in their place;
        # what instances offer should be the same in all of them. A target would take longer for it.
        draft = load.identity.group == DRAFT_GROUP
        with defined_memory() if draft else contextlib.nullcontext():
            return super().load_model(vllm_config, model_config, prefix)

    def _read_disk(
        self, load: _Load, model: nn.Module, model_config: ModelConfig, *, trace: bool = False
    ) -> None:
        """Let vLLM's default loader fill a model from disk or a view, and say so in one line.

        Args:
            load: the load.
            model: the model, still empty.
            model_config: vLLM's.
            trace: whether to take note of where the weights come from.
        """
        if load.instance is not None:
            self._read_view(load, load.instance, model, model_config)
            return
        with _reading_disk(load.worker, model):
            if trace:
                seen = Trace()
                with load_watched(model, seen, seen.watch):
                    self._disk.load_weights(model, model_config)
                with load.seeing():
                    load.records = seen.records(model)
            else:
                self._disk.load_weights(model, model_config)

    def _read_alone(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Let vLLM's default loader fill a model in which NetLoader has no part but one line."""
        with _reading_disk(self._worker(), model):
            self._disk.load_weights(model, model_config)

    def _read_view(
        self, load: _Load, instance: Instance, model: nn.Module, model_config: ModelConfig
    ) -> None:
        """Let vLLM's default loader fill a model with what an instance's ranks have."""
        if outside := sorted(weights_outside(model)):
            raise LoadFailed(f"{outside[0]} is not loaded like the model's other weights")
        over = threading.Event()
        prefaulting = start_prefault(load.device, [*model.parameters()], over)
        try:
            with metrics.load_from(metrics.PEERS):
                load.records = load_through_view(
                    instance,
                    model,
                    partial(read_through, self._disk, model, model_config),
                    load.identity,
                    self._config,
                    load.worker,
                    in_place=load.device.accelerator is None,
                )
        finally:
            over.set()
            if prefaulting is not None:
                prefaulting.join()
        load.loaded_from = str(instance)

    def _pull(
        self,
        load: _Load,
        model: nn.Module,
        tensors: dict[str, torch.Tensor],
        required: Iterable[str],
        sources: Sequence[Address | Name],
        meaning: Mapping[str, str],
        made: Mapping[str, Sample] | None = None,
    ) -> BlockStore:
        if load.unserved:
            raise LayoutUnsupported(load.unserved)
        rank, config = load.identity.rank, self._config
        if load.wanted is not None:
            # A source that another rank has loaded from is there, or gone for good.
            config = replace(config, source_wait=min(config.source_wait, _WAIT_AGAIN))
        try:
            with metrics.load_from(metrics.PEERS):
                loaded = elastic_load(
                    tensors,
                    set(required),
                    sources,
                    load.identity,
                    config,
                    load.device,
                    worker=load.worker,
                    wanted=load.wanted,
                    meaning=meaning,
                    made=made,
                    own=self._own(load),
                    relay=self._relay,
                    # What goes with other ranks' weights is with an instance that has weights.
                    cold=self._cold if load.wanted is None else None,
                    show_progress=rank == 0 and bool(self.load_config.use_tqdm_on_load),
                    check=partial(owners_of, model),
                )
        except ChosenToRead:
            raise
        except LoadFailed as error:
            malformed = _malformed(self._config.sources_of(rank))
            raise LoadFailed(
                "; ".join((*malformed, str(error))), error.others, error.known
            ) from None
        load.loaded_from, load.lists = loaded.sources, loaded.lists
        store = loaded.store
        if load.serving and load.identity.layout == RAW:
            with load.seeing():
                load.records = records_by_name(loaded.givers, config, store.digests.weights)
        if load.serving and not self._config.verify:
            store = store.hashed_anew()  # these have to be right
        load.weights = store.digests.weights
        return store

    def _finish(self, load: _Load, model: nn.Module) -> None:
        """Make the store that others can pull from, once the model is as inference uses it."""
        with load.preparing_to_serve():
            if load.identity.layout == PROCESSED:
                if load.store is None and (load.serving or (load.hashing and not load.weights)):
                    attributes = changed_scalars(load.scalars, scalars(model))
                    meaning = meaning_of(model, PROCESSED)
                    what = processed_tensors(model), PROCESSED, attributes, load.device, meaning
                    load.store = _hashed(load, lambda: make_store(*what))
            elif load.store is not None and not load.unserved:
                dram = self._config.int8_cache is Int8Cache.DRAM
                used = processed_tensors(model) if dram else {}
                load.store = after_processing(load.store, load.copies, used)
                if load.records is not None:
                    with load.seeing():
                        load.view = viewed_through(load.store, load.records)
        if load.store is not None:
            load.weights = load.store.digests.weights

    def _compare_with_pin(self, load: _Load, agreed: RankWeights) -> None:
        """Warn if the disk has other weights than those that may come from sources."""
        if load.weights is not None and load.instance is None:
            _warn_unless_pinned(self._config.weights_digest, load.worker, load.weights, agreed)

    def _offer(
        self,
        load: _Load,
        model: nn.Module,
        model_config: ModelConfig,
        agreed: RankWeights,
        ranks: Ranks | None = None,
    ) -> None:
        """Let others pull the model if they can, and know it as one in use from now on."""
        vllm_config = self._vllm_config or get_current_vllm_config()
        store = load.store
        if load.unserved:
            store = None
            logger.warning(
                "NetLoader rank %d: this model cannot be a source: %s", load.worker, load.unserved
            )
        known = registry.in_use(model)
        ranks = (known and known.ranks) or ranks
        if ranks is None:
            ranks = replace(ranks_of(vllm_config, load.identity), instance=next(_instances))
        present = partial(ranks.present, agreed)
        offer = Offer(
            load.identity,
            store,
            load.unserved,
            load.loaded_from,
            present,
            ranks.endpoints,
            folder=folder_of(model_config),
            view=load.view if store is not None else None,
            why_no_view=load.why_no_view,
        )
        watched = watch(
            vllm_config, model, registry.changing, registry.reading, registry.processing
        )
        if known is not None:
            registry.offer_again(model, offer, watched)
            return
        ranks.publish(agreed.get(load.identity.rank))
        member = self._member(load, ranks)
        registry.put_in_use(model, model_config.model, member, offer, watched)

    def _member(self, load: _Load, ranks: Ranks) -> registry.Member:
        vllm_config = self._vllm_config or get_current_vllm_config()
        return registry.Member(
            self._config,
            self._host(),
            groups_to_come(vllm_config, load.identity),
            load.worker,
            instance_of(vllm_config),
            ranks,
        )

    def _own(self, load: _Load) -> Own:
        """Return what belongs to this instance, as far as it is known before its ranks listen."""
        ports = [self._config.port_for(worker) for worker in load.ranks.workers]
        own = self._relay.peer.instance if self._relay is not None else load.process
        return Own(own, [port for port in ports if port], load.ranks.hosts)

    def _host(self) -> str:
        """Return the address of this machine that others reach."""
        return self._config.announced_host or get_ip()

    def _sources(self, rank: int, worker: int) -> Sequence[Address | Name]:
        """Return where a rank can get its weights, and warn of what SOURCE lacks for it.

        Raises:
            LoadFailed: there are malformed addresses only.
        """
        sources = self._config.sources_of(rank)
        malformed = _malformed(sources)
        for reason in malformed:
            logger.warning("NetLoader rank %d: %s", worker, reason)
        if malformed and not sources.addresses:
            raise LoadFailed("; ".join(malformed))
        listed = {listed for listed in self._config.source if listed is not None}
        if not sources.addresses and rank in listed:
            logger.warning(
                "NetLoader rank %d: loading from disk, as SOURCE has no sources for this rank",
                worker,
            )
        elif not sources.addresses and listed:
            logger.warning(
                "NetLoader rank %d: loading from disk, as SOURCE has entries for rank %s only",
                worker,
                ", ".join(map(str, sorted(listed))),
            )
        return sources.addresses

    def _new_load(
        self, identity: ModelIdentity, model_config: ModelConfig, order: Order = AS_CONFIGURED
    ) -> _Load:
        vllm_config = self._vllm_config or get_current_vllm_config()
        worker = self._worker()
        unserved = why_experts_move(vllm_config, model_config)
        serving = not unserved and self._config.port_for(worker) is not None
        ranks = ranks_of(vllm_config, identity)
        # A rank that reads the disk is compared with those that have other sources.
        compared = bool(self._config.source) and ranks.several
        return _Load(
            identity,
            self._device(),
            ranks,
            serving,
            hashing=self._config.weights_digest is not None or compared,
            wanted=order.weights[identity.rank] if order.weights is not None else None,
            worker=worker,
            process=registry.process_of(instance_of(vllm_config)),
            unserved=unserved,
        )

    def _worker(self) -> int:
        return worker_of(self._vllm_config or get_current_vllm_config(), _rank())

    def _identify(self, model_config: ModelConfig) -> ModelIdentity:
        vllm_config = self._vllm_config or get_current_vllm_config()
        config = self._config.with_model(name_of(model_config))
        assert config.model is not None
        layout = self._device().layout if self._config.int8_cache is Int8Cache.NO else RAW
        return identity_of(vllm_config, model_config, config.model, _rank(), layout)

    def _supported(self) -> bool:
        """Return whether this instance takes part; where it does not, it reads the disk.

        Raises:
            LayoutUnsupported: it does not, and may not read the disk in the place of its sources.
        """
        reason = why_weights_move(self._vllm_config or get_current_vllm_config())
        try:
            self._device()
        except LayoutUnsupported as error:
            reason = str(error)
        if not reason:
            return True
        if any(sources.addresses or sources.malformed for sources in self._config.source.values()):
            if not self._config.fallback:
                raise LayoutUnsupported(
                    f"no source is asked, as {reason}; and FALLBACK is false, so the disk is not "
                    "read either"
                )
            metrics.count(metrics.FALLBACKS, "unsupported")
        logger.warning("NetLoader rank %d: loading from disk: %s", self._worker(), reason)
        return False

    def _device(self) -> Device:
        return device_of(self._device_name(), self._config.hccl_buffer_size)

    def _device_name(self) -> torch.device:
        vllm_config = self._vllm_config or get_current_vllm_config()
        return torch.device(self.load_config.device or vllm_config.device_config.device)


def _pull_update(
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    model: nn.Module,
    keys: Mapping[str, object],
) -> None:
    """Fill a model in use from the sources that a weight update names, and never from disk.

    Args:
        vllm_config: the instance's configuration.
        model_config: the model's.
        model: what is filled.
        keys: SOURCE and WEIGHTS_DIGEST, in the place of the instance's own.

    Raises:
        ConfigError: they are wrong.
        LoadFailed: no source gave the weights; the model has those from before.
    """
    update, load_config = parse_config(keys), copy.copy(vllm_config.load_config)
    if load_config.load_format != LOAD_FORMAT:
        load_config.model_loader_extra_config = {}
    loader = ModelNetLoaderElastic(load_config)
    loader._config = replace(
        loader._config, source=update.source, weights_digest=update.weights_digest, fallback=False
    )
    if not any(sources.addresses for sources in update.source.values()):
        raise ConfigError(f"source is {keys['SOURCE']!r} and names no instance")
    weights = loader.new_weights(model_config, model, from_disk=False)
    initialize_layerwise_reload(model)
    model.load_weights(weights)
    finalize_layerwise_reload(model, model_config)


def disk_loader(load_config: LoadConfig, config: NetLoaderConfig) -> DefaultModelLoader:
    """Return vLLM's default loader with the keys that are its own.

    Raises:
        ConfigError: it refuses them.
    """
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


@contextlib.contextmanager
def _reading_disk(worker: int, model: nn.Module) -> Iterator[None]:
    """Say in one line what vLLM's default loader has filled meanwhile, and in which time."""
    started = time.monotonic()
    try:
        named, required = raw_tensors(model)
    except LayoutUnsupported:  # said where the model is made ready for others
        named = dict(model.named_parameters())
        required = {*named}
    tensors = {named[name].data_ptr(): named[name] for name in required}
    with metrics.load_from(metrics.DISK):
        yield
    seconds = time.monotonic() - started
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    logger.info(
        "NetLoader rank %d: loaded %d tensors, %s in %.2f s (%s) from disk",
        worker,
        len(tensors),
        size(nbytes),
        seconds,
        rate(nbytes, seconds),
    )


def _hashed(load: _Load, make: Callable[[], BlockStore]) -> BlockStore:
    """Return the store of weights that no source gave by name, and say which they are."""
    started = time.monotonic()
    store = make()
    logger.info(
        "NetLoader rank %d: the weights from %s have the weights digest %s, hashed in %.2f s",
        load.worker,
        load.loaded_from,
        store.digests.weights,
        time.monotonic() - started,
    )
    return store


def _warn_unless_pinned(
    pinned: Collection[str] | None, worker: int, weights: str, ranks: RankWeights
) -> None:
    if not is_one_of(pinned, weights, ranks):
        logger.warning(
            "NetLoader rank %d: the weights from disk are %s of %s and WEIGHTS_DIGEST is %s",
            worker,
            weights,
            of_instance(ranks),
            ", ".join(pinned or ()),
        )


def _compare_reloaded(
    pinned: Collection[str],
    worker: int,
    everyone: Collection[int],
    had: RankWeights,
    weights: str,
    ranks: RankWeights,
) -> None:
    """Warn if a reload has brought other weights from disk than those that may come from sources.

    Args:
        pinned: WEIGHTS_DIGEST.
        worker: number of this process among all workers of the instance.
        everyone: the instance's ranks.
        had: what they had before, as far as it is known.
        weights: what this one has now.
        ranks: what they have now, as far as it is known. Where only some have others, the rest may
            not be ready. An instance digest is then left to the last one that is, and to nobody if
            the rest stay as they were.
    """
    changed = {had.get(rank) != ranks.get(rank) for rank in everyone}
    settled = ranks.keys() >= {*everyone} and len(changed) == 1
    if settled or not any(map(is_of_instance, pinned)):
        _warn_unless_pinned(pinned, worker, weights, ranks)


def _malformed(sources: Sources) -> list[str]:
    return [f"malformed source {reason}" for reason in sources.malformed]


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _reason(error: NetLoaderError) -> str:
    """Return why a load goes to disk, as the metrics name it."""
    if isinstance(error, ChosenToRead):
        return "chosen"
    return "no_source" if isinstance(error, LoadFailed) else "unsupported"


def _neither(failure: str, error: Exception) -> LoadFailed:
    return LoadFailed(
        f"no source gave the weights ({failure}), and they cannot be loaded from disk "
        f"either ({type(error).__name__}: {error})"
    )


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


register_weight_transfer(_pull_update)

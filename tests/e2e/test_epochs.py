"""Weights that change in a living worker: by vLLM's own methods, on real models."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.utils import replace
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from tests.e2e.loading import assert_same, load, make_config, worker
from tests.e2e.views import not_seen_through
from tools.make_model import copy_without_weights, make_model
from vllm_ascend.model_loader.netloader import registry
from vllm_ascend.model_loader.netloader.compat import instance_of
from vllm_ascend.model_loader.netloader.errors import LoadFailed, SourceRefused

pytestmark = pytest.mark.core

NO_SERVER = {"LISTEN_PORT": 1}


class Engine:
    """Transfers weights as vLLM's engines do that get them in the form of a checkpoint."""

    supports_draft_weight_update = False

    def __init__(self, model: nn.Module, config: VllmConfig) -> None:
        self.model = model
        self.config = config

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: Any) -> None:
        self.model.load_weights(update_info["weights"])

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.config.model_config)

    def reset_weight_update_target(self) -> None:
        pass


class Living:
    """An instance that has loaded from disk, is a source, and has the worker that vLLM gives it."""

    def __init__(self, folder: Path, tmp_path: Path) -> None:
        prefix = tmp_path / "rank_"
        self.folder = folder
        self.config = make_config(folder / "0", MODEL="m", OUTPUT_PREFIX=str(prefix))
        self.model = load(self.config)
        self.address = Path(f"{prefix}0.txt").read_text()
        self.worker: Any = object.__new__(CPUWorker)
        runner: Any = object.__new__(CPUModelRunner)
        runner.__dict__ |= {
            "vllm_config": self.config,
            "model_config": self.config.model_config,
            "load_config": self.config.load_config,
            "lora_config": None,
            "model": self.model,
            "encoder_cache": {},
            "mm_budget": None,
            "late_interaction_runner": SimpleNamespace(clear=lambda: None),
            "reset_lora_state": lambda: None,
        }
        self.worker.__dict__ |= {
            "vllm_config": self.config,
            "model_runner": runner,
            "weight_transfer_engine": Engine(self.model, self.config),
            "_weight_update_active": False,
            "_weight_update_is_draft": False,
        }
        self.seen: list[str] = []

    @property
    def status(self) -> Any:
        known = registry.in_use(self.model)
        assert known is not None and known.server is not None
        [status] = known.server.status(0).models
        return status

    def look(self) -> None:
        """Note what clients are told while weights change."""
        self.seen.append(self.status.state)

    def checkpoint(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of another checkpoint."""
        for file in sorted((self.folder / "1").glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                yield name, tensor
                self.look()

    def client(self, **extra: Any) -> VllmConfig:
        source = [{"device_id": 0, "sources": [self.address]}]
        return make_config(self.folder / "bare", MODEL="m", SOURCE=source, **NO_SERVER, **extra)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        make_model(folder / str(seed), "llama", "tiny", seed)
    copy_without_weights(folder / "0", folder / "bare")
    return folder


@pytest.fixture
def living(folder: Path, tmp_path: Path) -> Living:
    return Living(folder, tmp_path)


def reload_another_path(living: Living) -> None:
    living.worker.reload_weights(weights_path=str(living.folder / "1"))


def reload_an_iterator(living: Living) -> None:
    living.worker.reload_weights(weights_iterator=living.checkpoint())


def reload_kernel_format(living: Living) -> None:
    def halves() -> Iterator[tuple[str, torch.Tensor]]:
        living.look()
        for name, parameter in living.model.named_parameters():
            if parameter.numel():
                yield name, parameter.detach() / 2

    living.worker.reload_weights(weights_iterator=halves(), is_checkpoint_format=False)


def transfer(living: Living) -> None:
    tensors = [*living.checkpoint()]
    living.seen.clear()
    living.worker.start_weight_update()
    living.look()
    for one in tensors:
        living.worker.update_weights({"weights": [one]})
        living.look()
    living.worker.finish_weight_update()


def apply(living: Living) -> None:
    def change(model: nn.Module) -> None:
        living.look()
        model.get_parameter("model.norm.weight").data.add_(1)

    living.worker.apply_model(change)


def test_a_draft_with_a_configuration_of_its_own_is_of_the_same_instance(folder: Path) -> None:
    target = make_config(folder / "0")
    draft = replace(target, load_config=copy.copy(target.load_config))
    assert draft.load_config is not target.load_config
    assert instance_of(draft) == instance_of(target) != instance_of(make_config(folder / "0"))


WAYS = [reload_another_path, reload_an_iterator, reload_kernel_format, transfer, apply]


@pytest.mark.parametrize("change", WAYS, ids=lambda way: way.__name__)
def test_weights_changed_by_a_method_of_the_worker_are_withdrawn_first_and_offered_anew(
    change: Callable[[Living], None], living: Living
) -> None:
    before = living.status
    with worker(living.config), torch.inference_mode():
        change(living)
    registry.wait_for_renewal()
    after = living.status
    assert set(living.seen) <= {"changing"}, living.seen
    assert (after.state, after.epoch) == ("serving", before.epoch + 1)
    assert after.weights != before.weights
    assert_same(living.model, load(living.client()))
    if change in (reload_kernel_format, apply):
        with pytest.raises(SourceRefused, match=r"no_view: .* the weights are others since"):
            not_seen_through(living.address, living.folder / "1")
    else:
        assert not_seen_through(living.address, living.folder / "1") == []


def test_a_sleeping_instance_offers_nothing_and_the_same_weights_when_it_is_awake(
    living: Living,
) -> None:
    before = living.status
    living.worker.sleep(1)
    assert (living.status.state, living.status.reason) == (
        "asleep",
        "the source sleeps (sleep level 1)",
    )
    living.worker.wake_up(["kv_cache"])
    registry.wait_for_renewal()
    assert living.status.state == "asleep"
    living.worker.wake_up(["weights"])
    registry.wait_for_renewal()
    assert (living.status.state, living.status.weights) == ("serving", before.weights)


def test_after_sleep_level_2_nothing_is_offered_before_new_weights_are_in(living: Living) -> None:
    living.worker.sleep(2)
    living.worker.wake_up()
    registry.wait_for_renewal()
    assert living.status.state == "changing"
    assert "sleep level 2 has dropped the weights" in living.status.reason
    with worker(living.config), torch.inference_mode():
        living.worker.reload_weights(weights_iterator=living.checkpoint())
    registry.wait_for_renewal()
    assert living.status.state == "serving"
    assert_same(living.model, load(living.client()))


def test_weights_pushed_in_part_by_other_means_are_not_offered_until_they_are_known_to_be_whole(
    living: Living,
) -> None:
    with set_current_vllm_config(living.config), torch.inference_mode():
        living.model.load_weights([])
    with pytest.raises(LoadFailed, match="cannot_serve: load_weights has changed weights"):
        load(living.client())
    with worker(living.config), torch.inference_mode():
        living.worker.reload_weights(weights_iterator=living.checkpoint())
    registry.wait_for_renewal()
    assert living.status.state == "serving"


def test_a_reload_that_fails_before_it_changes_anything_changes_no_offer(living: Living) -> None:
    before = living.status
    with worker(living.config), pytest.raises(RuntimeError):
        living.worker.reload_weights(weights_path=str(living.folder / "bare"))
    registry.wait_for_renewal()
    assert living.status == before


def test_a_reload_that_fails_half_way_leaves_no_source(living: Living) -> None:
    def half() -> Iterator[tuple[str, torch.Tensor]]:
        for number, tensor in enumerate(living.checkpoint()):
            if number == 10:
                raise ZeroDivisionError
            yield tensor

    with worker(living.config), torch.inference_mode(), pytest.raises(ZeroDivisionError):
        living.worker.reload_weights(weights_iterator=half())
    registry.wait_for_renewal()
    assert living.status.state == "cannot_serve"


def test_a_client_gets_what_somebody_has_written_into_a_source_behind_its_back(
    living: Living, log: list[str]
) -> None:
    before = living.status
    living.model.get_parameter("model.norm.weight").data.add_(1)
    client = load(living.client(SOURCE_WAIT=60))
    assert_same(living.model, client)
    assert any("changed: the source's weights have changed" in line for line in log)
    assert any("no longer a source" in line and "without notice" in line for line in log)
    assert living.status.epoch == before.epoch + 1

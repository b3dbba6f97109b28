"""Proves on simulated NPUs what tests/proof/cuts.py proves on a CPU; arguments are names of rows.

Instances of one rank keep raw tensors in NPU memory, and those of two keep them in host memory.
Each rank is a worker of vLLM Ascend, without an engine, in a process forked from this one, which
has imported everything. What two instances have is equal if inference uses equal tensors, too.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
# Last: the installed vllm_ascend is all of it, and the repository's is not.
sys.path.append(str(Path(__file__).parents[3]))

from vllm.config import set_current_vllm_config
from vllm_ascend.worker.worker import NPUWorker

from tests.e2e.loading import _bytes, _is_address, make_config
from tests.proof.cuts import Proof, Refused, digests_at, make, print_head, prove
from tests.proof.npu_rows import ROWS
from tools.netloader_view import read_address
from vllm_ascend.model_loader.netloader import registry
from vllm_ascend.model_loader.netloader.executor.model.processed import processed_tensors

WAYS = [("TP 1", "TP 2"), ("TP 2", "TP 1")]
CACHES = {1: "hbm", 2: "dram"}


class OnNpus:
    """Starts instances of one row, each rank of which is a process."""

    def __init__(self, folder):
        self._folder = folder
        self._processes = []

    def __call__(self, path, how):
        """See `Start`: what ranks have is their digests, of raw tensors and of those in use."""
        ranks = how.get("tp", 1)
        name = self._folder / f"i{len(self._processes)}-"
        how |= {"MODEL": "m", "OUTPUT_PREFIX": str(name), "INT8_CACHE": CACHES[ranks]}
        pipes = [self._fork(path, how, rank, f"{name}meet") for rank in range(ranks)]
        answers = [json.loads(pipe.readline() or '{"error": "died"}') for pipe in pipes]
        for answer in answers:
            if answer["error"]:
                raise Refused(answer["error"])
        address = read_address(name)
        return address, (digests_at(address), [answer["has"] for answer in answers])

    def _fork(self, path, how, rank, meeting):
        mine, other = os.pipe()
        process = os.fork()
        if not process:
            model, answer = be_a_rank(path, how, rank, meeting)
            os.write(other, f"{json.dumps(answer)}\n".encode())
            while model is not None:
                signal.pause()
            os._exit(1)
        os.close(other)
        self._processes.append(process)
        return os.fdopen(mine)

    def close(self):
        for process in self._processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def be_a_rank(path, how, rank, meeting):
    """Loads a model, and returns it with what there is to say of it."""
    try:
        config = make_config(path, **how)
        worker = NPUWorker(config, rank, rank, f"file://{meeting}", is_driver_worker=rank == 0)
        with set_current_vllm_config(config):
            worker.init_device()
        worker.load_model()
        registry.wait_for_renewal()
        return worker, {"error": "", "has": contents(worker.get_model())}
    except Exception as error:
        return None, {"error": f"{type(error).__name__}: {error}"}


def contents(model):
    """Returns a digest of all tensors that inference uses."""
    whole = hashlib.sha256()
    for name, tensor in sorted(processed_tensors(model).items()):
        if not _is_address(tensor):
            whole.update(name.encode())
            whole.update(_bytes(tensor).numpy().tobytes())
    return whole.hexdigest()


def main(names):
    """Proves the rows of these names, or all that have raw tensors."""
    print_head()
    wrong = 0
    for row in ROWS:
        if row.config and (row.name in names or not names):
            with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
                # vLLM looks at models in processes that take modules from where they begin.
                folder = Path(place)
                maker = os.fork()  # so that this process has no threads
                if not maker:
                    make(row, folder)
                    os._exit(0)
                assert os.waitpid(maker, 0)[1] == 0
                instances = OnNpus(folder)
                wrong += prove(Proof(row, folder, instances), row.name, WAYS)
                instances.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The hook in this project's own `vllm_ascend`, in whichever order vLLM's modules are imported."""

from importlib.metadata import entry_points

import vllm_ascend
from tests.ut.model_loader.netloader.support import python

# Each order in a child of its own.
_ORDERS = """
import logging, os, sys
logging.disable()
package, name = "vllm.model_executor.model_loader", "vllm_ascend.model_loader.netloader.netloader"
def ours():
    return [finder for finder in sys.meta_path if "vllm_ascend" in type(finder).__module__]
def loaders():
    import vllm.model_executor.model_loader
def base():
    import vllm.model_executor.model_loader.base_loader
def plugins():
    import vllm.plugins
    vllm.plugins.load_general_plugins()
def hook():
    import vllm_ascend
    vllm_ascend.register_model_loader()
def find():
    import importlib.util
    assert importlib.util.find_spec(package).loader is not None
    assert package not in sys.modules  # looking for a module is not importing it
def face():
    from vllm_ascend.model_loader.netloader.netloader import ModelNetLoaderElastic
def lost():
    sys.modules[name] = None
import vllm_ascend.model_loader.netloader as netloader
errors = []
netloader.logger.error = lambda *line: errors.append(line)
assert package not in sys.modules and name not in sys.modules and not ours()
for order in sys.argv[1:]:
    if os.fork() == 0:
        for step in order.split():
            globals()[step]()
        loaders = sys.modules[package]
        formats = loaders._LOAD_FORMAT_TO_MODEL_LOADER
        theirs = getattr(sys.modules[name], "ModelNetLoaderElastic", None)
        there = formats.get("netloader") is theirs is not None
        assert loaders.__spec__.loader is loaders.__loader__
        assert type(loaders.__loader__).__name__ == "SourceFileLoader"
        print(order, there, len(errors), "auto" in formats, ours(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_the_load_format_is_there_in_whichever_order_things_are_imported(forks):
    orders = [
        "plugins face",
        "hook hook find loaders",
        "hook hook face hook",
        "plugins loaders face",
        "plugins base face",
        "face plugins",
        "loaders plugins face",
        "face face plugins plugins",
        # Who imports it wants it, also where VLLM_PLUGINS keeps the hook from being called.
        "loaders face",
        "face",
    ]
    # Where it cannot be registered, the other load formats are there all the same.
    failing = ["lost hook loaders", "lost loaders hook"]
    done = forks.run(_ORDERS, *orders, *failing)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *(f"{order} True 0 True []" for order in orders),
        *(f"{order} False 1 True []" for order in failing),
    ]


_HOOK = """
import sys, vllm_ascend
vllm_ascend.register_model_loader()
ours = [finder for finder in sys.meta_path if "vllm_ascend" in type(finder).__module__]
print("torch" in sys.modules, "vllm.model_executor.model_loader" in sys.modules, len(ours))
"""


def test_the_hook_imports_neither_torch_nor_the_loaders_of_vllm():
    process = python("-c", _HOOK)
    output, _ = process.communicate(timeout=200)
    assert output.split() == ["False", "False", "1"]


def test_vllm_finds_the_plugin_by_its_entry_point():
    [plugin] = entry_points(group="vllm.general_plugins", name="ascend_model_loader")
    assert plugin.load() is vllm_ascend.register_model_loader

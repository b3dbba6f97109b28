import shutil
import threading

import pytest

from . import simulator
from .cann import build as compiler
from .cann.build import CANN_NAMES, SOURCES
from .simulator import build


@pytest.fixture
def fast_build(monkeypatch, tmp_path):
    """An empty cache, and a build of one file that waits for all builders at work."""
    monkeypatch.setattr(simulator, "CACHE", tmp_path / "cache")
    working = threading.Barrier(2, timeout=10)

    def build_into(folder, scratch):
        folder.mkdir()
        working.wait()
        (folder / "library").write_text("built")

    monkeypatch.setattr(simulator, "build_into", build_into)
    return working


def test_the_libraries_that_torch_npu_asks_for():
    names = {path.name for path in build().iterdir()}
    expected = (*CANN_NAMES, "npusim", "opapi", "atb", "npusim_fallback")
    assert names == {f"lib{name}.so" for name in expected}


def test_builders_at_once_do_not_disturb_each_other(fast_build):
    folders = []
    builders = [threading.Thread(target=lambda: folders.append(build())) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert len(folders) == 2 and folders[0] == folders[1]
    assert (folders[0] / "library").read_text() == "built"
    assert list(folders[0].parent.iterdir()) == [folders[0]]


def test_the_next_builder_finds_what_is_there(monkeypatch):
    monkeypatch.setattr(simulator, "build_into", lambda *_: pytest.fail("it builds"))
    assert build().is_dir()


def test_a_changed_source_is_built_anew(monkeypatch, tmp_path):
    before = build()
    changed = shutil.copytree(SOURCES, tmp_path / "cann")
    (changed / "hccl.cpp").write_text("// changed")
    monkeypatch.setattr(simulator, "SOURCES", changed)
    monkeypatch.setattr(simulator, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(simulator, "build_into", lambda folder, _: folder.mkdir())
    assert build().name != before.name


def test_a_failed_build_leaves_nothing_and_shows_the_compiler_s_words(monkeypatch, tmp_path):
    changed = shutil.copytree(SOURCES, tmp_path / "cann")
    for source in changed.glob("*.cpp"):
        source.write_text("#error no such luck")
    for module in (simulator, compiler):
        monkeypatch.setattr(module, "SOURCES", changed)
    monkeypatch.setattr(simulator, "CACHE", tmp_path / "cache")
    with pytest.raises(RuntimeError, match="no such luck"):
        build()
    assert list((tmp_path / "cache").iterdir()) == []

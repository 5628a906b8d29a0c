"""The first look-up fills a registry: also for a thread that asks while another one is still filling it."""

import sys
import threading
import types

import pytest

from hub_mpq.core.registry import Registry

HOME = """
import slow_home_registry, time
slow_home_registry.things.register("first", 1)
slow_home_registry.entered.set()
time.sleep(0.2)
slow_home_registry.things.register("second", 2)
"""


def test_a_second_thread_waits_for_the_first(tmp_path, monkeypatch):
    (tmp_path / "slow_home.py").write_text(HOME)
    monkeypatch.syspath_prepend(str(tmp_path))
    holder = types.ModuleType("slow_home_registry")
    holder.things, holder.entered = Registry("thing", "slow_home"), threading.Event()
    monkeypatch.setitem(sys.modules, "slow_home_registry", holder)
    first = threading.Thread(target=holder.things.names)
    first.start()
    try:
        assert holder.entered.wait(10)
        assert holder.things.names() == ["first", "second"]
    finally:
        first.join()
        sys.modules.pop("slow_home", None)


def test_a_class_of_the_package_is_registered_without_the_others():
    """Its file may be imported first, and the home imports that file."""
    things = Registry("thing", "no_such_module")
    things.register("own", type("Own", (), {"__module__": "hub_mpq.search.own"}))
    with pytest.raises(ModuleNotFoundError):
        things.register("mine", type("Mine", (), {"__module__": "mine"}))

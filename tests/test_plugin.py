"""The post-import hook, and what ``import tutelage`` costs."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import subprocess
import sys

import pytest

import tutelage
from tutelage import _plugin

HEAVY = ("transformers", "sklearn", "pandas", "datasets", "scipy", "pyarrow", "safetensors", "rich")

FRESH = f"""
import json, sys
import tutelage
heavy = [name for name in {HEAVY!r} if name in sys.modules]
finders = [type(f).__name__ for f in sys.meta_path if type(f).__module__ == "tutelage._plugin"]
tutelage._plugin.install()
again = [type(f).__name__ for f in sys.meta_path if type(f).__module__ == "tutelage._plugin"]
tutelage.Scheme.preset("ternary-a8")
tutelage.quantizers.TernaryQuantizer()
late = [name for name in {HEAVY!r} if name in sys.modules]
import transformers.quantizers.auto as auto
gone = [type(f).__name__ for f in sys.meta_path if type(f).__module__ == "tutelage._plugin"]
print(json.dumps([
    heavy, late, finders, again, gone,
    "tutelage" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
    "tutelage" in auto.AUTO_QUANTIZER_MAPPING,
    type(auto.__spec__.loader).__module__,
]))
"""


def test_a_fresh_import_is_light_and_waits_for_transformers() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", FRESH],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    heavy, late, finders, again, gone, config, quantizer, loader = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert heavy == late == []
    assert finders == again == ["_Finder"]
    assert gone == []
    assert config
    assert quantizer
    assert loader != "tutelage._plugin"  # the real loader is put back


def test_registers_at_once_where_transformers_is_loaded() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    from tutelage.artefacts._huggingface import PackedConfig, PackedQuantizer

    before = list(sys.meta_path)
    _plugin.install()
    _plugin.install()
    assert sys.meta_path == before
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["tutelage"] is PackedConfig
    assert AUTO_QUANTIZER_MAPPING["tutelage"] is PackedQuantizer


class TestFinder:
    def test_leaves_other_modules_alone(self) -> None:
        assert _plugin._Finder().find_spec("json", None) is None

    def test_runs_the_real_loader_then_registers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        target, order = "json.tool", []
        monkeypatch.setattr(_plugin, "_TARGET", target)
        monkeypatch.setattr(
            _plugin, "_register", lambda: order.append(hasattr(sys.modules[target], "main"))
        )
        monkeypatch.delitem(sys.modules, target, raising=False)
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        _plugin.install()
        _plugin.install()
        assert [type(finder) for finder in sys.meta_path].count(_plugin._Finder) == 1
        module = importlib.import_module(target)
        assert order == [True]
        assert module.__spec__ is not None
        assert isinstance(module.__spec__.loader, importlib.machinery.SourceFileLoader)
        assert module.__loader__ is module.__spec__.loader
        assert not any(isinstance(finder, _plugin._Finder) for finder in sys.meta_path)

    def test_a_missing_target_is_the_usual_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_plugin, "_TARGET", "json.nothing_here")
        monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
        _plugin.install()
        with pytest.raises(ModuleNotFoundError, match="nothing_here"):
            importlib.import_module("json.nothing_here")


class TestLazyNames:
    def test_save_load_and_trainer(self) -> None:
        from tutelage.artefacts import load, save

        assert tutelage.save is save
        assert tutelage.load is load

    @pytest.mark.parametrize("module", [tutelage, importlib.import_module("tutelage.artefacts")])
    def test_an_unknown_name_is_the_usual_error(self, module: object) -> None:
        with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
            module.nonsense  # type: ignore[attr-defined]  # noqa: B018

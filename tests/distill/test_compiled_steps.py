"""A student that went through torch.compile trains as it does without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tutelage.intervention import stages
from tutelage.kernels._native import native
from tutelage.sites._compiled import heed_hooks


def run(what: str, backend: str) -> Any:
    script = Path(__file__).with_name("compiled_steps.py")
    done = subprocess.run(
        [sys.executable, str(script), what, backend], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_traced_steps_equal_plain_ones_bit_for_bit() -> None:
    found = run("steps", "eager")
    assert found["largest"] == 0
    assert found["moved"] > 0
    # One of evaluation and one of each stage, whole, and found again when a stage comes back.
    assert found["graphs"] >= len(stages())
    assert found["anew"] == 0
    assert found["breaks"] == 0


@pytest.mark.skipif(not native().active, reason="there is no C++ compiler")
def test_generated_code_is_close_over_a_hundred_steps() -> None:
    found = run("steps", "inductor")
    assert found["largest"] < 1e-3
    assert found["moved"] > 0
    assert found["graphs"] == 1
    assert found["anew"] == 0


def test_the_trainer_takes_torch_compile() -> None:
    found = run("trainer", "eager")
    assert found["evaluations"] >= 4
    assert found["losses"]
    assert found["names"]
    assert found["weights"]
    assert found["graphs"] >= 4


def test_the_compiler_is_not_imported_for_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    heed_hooks()
    assert "torch._dynamo" not in sys.modules

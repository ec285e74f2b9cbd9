"""What the doctor says, and that it is true."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tutelage import _doctor
from tutelage.kernels import Native, native


def test_the_report_names_what_is_active(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.subject: finding for finding in _doctor.examine()}
    assert found["torch"].state == torch.__version__
    kernels = found["CPU kernels"]
    assert kernels.state == (f"compiled, {native().isa}" if native().active else kernels.state)
    monkeypatch.setattr(_doctor, "native", lambda: Native((), 0, "no C++ compiler was found"))
    found = {finding.subject: finding for finding in _doctor.examine()}
    assert found["CPU kernels"].state.startswith("torch, ")
    assert found["CPU kernels"].reason == "no C++ compiler was found"
    assert found["fused encoder blocks"].state == "not available"
    assert "kernel cache" not in found


def test_missing_libraries_come_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "_LIBRARIES", ("surely-not-installed",))
    last = _doctor.examine()[-1]
    assert (last.state, last.reason) == ("not installed", "pip install surely-not-installed")


def test_the_command_prints_a_table_or_json() -> None:
    command = [sys.executable, "-m", "tutelage.cli", "doctor"]
    environment = {**os.environ, "TUTELAGE_NATIVE": "0"}
    run = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, check=True
    )
    told = {finding["subject"]: finding for finding in json.loads(run.stdout)}
    assert "TUTELAGE_NATIVE=0" in told["CPU kernels"]["reason"]
    table = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "CPU kernels" in table.stdout

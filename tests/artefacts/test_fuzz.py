"""A part of the fuzzing in the suite, and that it would see what it looks for."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from fuzz import Fuzzer, Hang, Peak, is_bad, run_cases, summary
from mutations import MUTATIONS

import tutelage
from tutelage.errors import ArtefactError, TutelageError

CASES = 40 * len(MUTATIONS)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Fuzzer:
    return Fuzzer(tmp_path_factory.mktemp("fuzz"), seed=1)


@pytest.mark.slow
def test_spoilt_students_load_alike_or_are_refused() -> None:
    rows = run_cases(CASES, seed=20230223)
    assert len(rows) == CASES
    found = summary(rows)
    assert found["bad"] == []
    outcomes = found["outcomes"]
    assert outcomes["refused"] > CASES / 2
    assert outcomes["equal"] > CASES / 50  # the harness can load at all
    assert all("refused" in counts for counts in found["by_mutation"].values())


def test_cases_are_determined_by_seed_and_number(fuzzer: Fuzzer) -> None:
    for number in (0, 7, 13):
        one, other = fuzzer.run(number), fuzzer.run(number)
        assert [one[key] for key in ("mutation", "original", "outcome", "detail")] == [
            other[key] for key in ("mutation", "original", "outcome", "detail")
        ]


def tried(fuzzer: Fuzzer, load: Any) -> dict[str, Any]:
    return fuzzer._try(load, fuzzer.originals[0], 0, TutelageError)


class TestHarness:
    def test_an_untouched_student_is_equal(self, fuzzer: Fuzzer) -> None:
        assert tried(fuzzer, tutelage.load)["outcome"] == "equal"

    def test_other_weights_are_seen(self, fuzzer: Fuzzer) -> None:
        def other(folder: Path) -> Any:
            model = tutelage.load(folder)
            with torch.no_grad():
                model.classifier.bias[0] += 1e-6
            return model

        assert tried(fuzzer, other)["outcome"] == "WRONG"

    def test_an_exception_of_another_kind_is_seen(self, fuzzer: Fuzzer) -> None:
        def fails(_: Path) -> Any:
            raise KeyError("x")

        def refuses(_: Path) -> Any:
            raise ArtefactError("x")

        assert tried(fuzzer, fails)["outcome"] == "ESCAPED"
        assert tried(fuzzer, refuses)["outcome"] == "refused"

    def test_a_hang_is_seen(self, fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
        def waits(_: Path) -> Any:
            try:
                time.sleep(10)
            except Exception as error:
                raise ArtefactError("swallowed") from error

        monkeypatch.setattr(fuzz, "SECONDS", 0.05)
        assert tried(fuzzer, waits)["outcome"] == "HANG"
        assert not issubclass(Hang, Exception)

    @pytest.mark.skipif(not Peak().works, reason="needs /proc")
    def test_memory_is_seen(self, fuzzer: Fuzzer) -> None:
        def allocates(_: Path) -> Any:
            torch.ones(2**23)  # 32 MiB, freed at once
            raise ArtefactError("x")

        assert tried(fuzzer, allocates)["outcome"] == "MEMORY"

    def test_a_crash_is_named(self) -> None:
        row = fuzz._crashed(5, -11)
        assert is_bad(row)
        assert row["mutation"] == list(MUTATIONS)[5]
        assert Counter(summary([row])["outcomes"]) == {"CRASH": 1}

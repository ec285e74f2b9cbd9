"""Figures of classes and their errors, against loops written from the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.report._measures import confusion, paired_errors, proportion_errors, scores_of

answers = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40
)


@given(answers)
def test_scores_are_those_of_a_loop(rows: list[tuple[int, int, int]]) -> None:
    labels, given_, _ = (np.array(column) for column in zip(*rows, strict=True))
    found = scores_of(labels, given_, 4)
    counts = confusion(labels, given_, 4)
    for index, scores in enumerate(found):
        right = sum(a == b == index for a, b, _ in rows)
        support = sum(a == index for a, _, _ in rows)
        predicted = sum(b == index for _, b, _ in rows)
        precision = right / predicted if predicted else 0.0
        recall = right / support if support else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        assert (scores.support, scores.predicted) == (support, predicted)
        assert scores.precision == pytest.approx(precision)
        assert scores.recall == pytest.approx(recall)
        assert scores.f1 == pytest.approx(f1)
        for other in range(4):
            assert counts[index, other] == sum((a, b) == (index, other) for a, b, _ in rows)


@given(answers)
def test_errors_of_shares_are_those_of_a_loop(rows: list[tuple[int, int, int]]) -> None:
    labels, one, other = (np.array(column) for column in zip(*rows, strict=True))
    found = proportion_errors(one == labels, other == labels)
    n = len(rows)
    teacher = [float(a == b) for a, b, _ in rows]
    student = [float(a == c) for a, _, c in rows]
    apart = [s - t for s, t in zip(student, teacher, strict=True)]
    for values, error in (
        (teacher, found.teacher),
        (student, found.student),
        (apart, found.difference),
    ):
        mean = sum(values) / n
        variance = sum((v - mean) ** 2 for v in values) / n
        assert error == pytest.approx(math.sqrt(variance / n), abs=1e-12)


def test_the_bootstrap_finds_the_error_of_a_mean() -> None:
    random = np.random.default_rng(1)
    teacher = random.random(400) < 0.9
    student = np.where(random.random(400) < 0.1, ~teacher, teacher)
    found = paired_errors(lambda some: (teacher[some].mean(), student[some].mean()), 400)
    exact = proportion_errors(teacher, student)
    assert found.teacher == pytest.approx(exact.teacher, rel=0.15)
    assert found.student == pytest.approx(exact.student, rel=0.15)
    assert found.difference == pytest.approx(exact.difference, rel=0.15)
    assert found == paired_errors(lambda some: (teacher[some].mean(), student[some].mean()), 400)

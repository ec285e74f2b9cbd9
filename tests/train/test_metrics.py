from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tutelage.errors import DataError, NonFiniteLossError
from tutelage.train.metrics import METRICS, agreement, evaluate_metrics, kl_divergence

SHAPES = array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6)
FINITE = st.floats(-50, 50, width=32)


def logits_for(classes: list[int], count: int) -> np.ndarray[Any, Any]:
    return np.eye(count, dtype=np.float32)[classes] * 4 - 1


def two_outputs(elements: st.SearchStrategy[float] = FINITE) -> st.SearchStrategy[Any]:
    return SHAPES.flatmap(
        lambda shape: st.tuples(
            arrays(np.float32, shape, elements=elements),
            arrays(np.float32, shape, elements=elements),
        )
    )


def kl_by_loop(teacher: np.ndarray[Any, Any], student: np.ndarray[Any, Any]) -> float:
    total = 0.0
    for t_row, s_row in zip(teacher.tolist(), student.tolist(), strict=True):
        t_sum = sum(math.exp(v - max(t_row)) for v in t_row)
        s_sum = sum(math.exp(v - max(s_row)) for v in s_row)
        for t, s in zip(t_row, s_row, strict=True):
            log_p = t - max(t_row) - math.log(t_sum)
            log_q = s - max(s_row) - math.log(s_sum)
            total += math.exp(log_p) * (log_p - log_q)
    return total / len(teacher)


def test_binary_metrics_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    labels = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    predicted = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    result = evaluate_metrics("classification", logits_for(predicted, 2), labels)
    assert result["accuracy"] == pytest.approx(0.7)
    assert result["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert result["macro_f1"] == pytest.approx((2 / 3 + 8 / 11) / 2)
    assert result["matthews"] == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert set(result) == {"accuracy", "f1", "macro_f1", "matthews"}


def test_many_classes_have_macro_f1_only() -> None:
    labels = np.array([0, 1, 2, 2])
    result = evaluate_metrics("pair", logits_for([0, 1, 2, 1], 3), labels)
    assert result["accuracy"] == 0.75
    assert result["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert "f1" not in result


@pytest.mark.parametrize("kind", ["regression", "pair_regression"])
@pytest.mark.parametrize("columns", ["flat", "one column"])
def test_regression_by_hand(kind: str, columns: str) -> None:
    predicted = np.array([1.0, 2.0, 4.0, 3.0], dtype=np.float32)
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    result = evaluate_metrics(kind, predicted if columns == "flat" else predicted[:, None], labels)
    assert result == pytest.approx({"pearson": 0.8, "spearman": 0.8, "correlation": 0.8})


def test_correlation_is_the_mean() -> None:
    result = evaluate_metrics("regression", np.array([1.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0]))
    assert result["spearman"] == pytest.approx(1.0)
    assert result["pearson"] < 0.95
    assert result["correlation"] == pytest.approx((1.0 + result["pearson"]) / 2)


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "zero"),
    [
        pytest.param("classification", logits_for([1, 1], 2), [0, 1], ["matthews"], id="matthews"),
        pytest.param("classification", logits_for([0, 0], 2), [0, 0], ["f1"], id="one-class-data"),
        pytest.param("regression", np.ones(3), [1.0, 2.0, 3.0], ["pearson", "spearman"], id="flat"),
        pytest.param("regression", np.arange(3.0), [2.0] * 3, ["correlation"], id="flat-labels"),
        pytest.param("regression", np.ones(1), [2.0], ["correlation"], id="one-example"),
        pytest.param("regression", 1 + np.arange(3) * 1e-16, [1.0, 2, 3], [], id="nearly-flat"),
    ],
)
def test_undefined_values_are_zero(
    kind: str, logits: np.ndarray[Any, Any], labels: list[float], zero: list[str]
) -> None:
    result = evaluate_metrics(kind, logits, np.array(labels))
    assert [result[name] for name in zero] == [0.0] * len(zero)
    assert all(math.isfinite(value) for value in result.values())


@pytest.mark.parametrize(
    ("kind", "logits", "labels", "message"),
    [
        pytest.param("spans", np.ones((2, 2)), [0, 1], "unknown task kind 'spans'", id="kind"),
        pytest.param("pair", np.ones((2, 1)), [0, 1], "do not fit a pair task", id="columns"),
        pytest.param("regression", np.ones((2, 2)), [0, 1], "do not fit", id="regression-columns"),
        pytest.param("pair", np.ones((2, 2)), [0], r"\(1,\) do not fit", id="rows"),
        pytest.param("pair", np.ones((0, 2)), [], "no examples to evaluate", id="empty"),
    ],
)
def test_refuses_what_does_not_fit(
    kind: str, logits: np.ndarray[Any, Any], labels: list[int], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_metrics(kind, logits, np.array(labels))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_outputs_that_are_not_finite(value: float) -> None:
    broken = np.array([[0.0, 1.0], [value, 0.0]])
    fine = np.zeros((2, 2))
    for call in (
        lambda: evaluate_metrics("classification", broken, np.array([0, 1])),
        lambda: agreement(broken, fine),
        lambda: kl_divergence(fine, broken),
    ):
        with pytest.raises(NonFiniteLossError, match="infinite for 1 of 2 examples; train again"):
            call()


@given(two_outputs())
def test_agreement_is_a_symmetric_fraction(pair: tuple[Any, Any]) -> None:
    value = agreement(*pair)
    assert 0.0 <= value <= 1.0
    assert value == agreement(pair[1], pair[0])
    assert agreement(pair[0], pair[0]) == 1.0


def test_agreement_by_hand() -> None:
    assert agreement(logits_for([0, 1, 2, 2], 3), logits_for([0, 1, 1, 2], 3)) == 0.75


@given(two_outputs())
def test_kl_equals_an_independent_loop(pair: tuple[Any, Any]) -> None:
    value = kl_divergence(*pair)
    assert value >= 0.0
    assert value == pytest.approx(kl_by_loop(*pair), rel=1e-9, abs=1e-12)
    assert kl_divergence(pair[0], pair[0]) == 0.0


def test_kl_of_certain_and_uniform_outputs_is_finite() -> None:
    certain, uniform = np.array([[0.0, 3e4]]), np.array([[0.0, 0.0]])
    assert kl_divergence(certain, uniform) == pytest.approx(math.log(2))
    assert kl_divergence(uniform, certain) == pytest.approx(1.5e4, rel=1e-3)


@pytest.mark.parametrize("shapes", [((2, 2), (2, 3)), ((2, 1), (2, 1)), ((4,), (4,))], ids=str)
@pytest.mark.parametrize("compare", [agreement, kl_divergence])
def test_comparing_needs_classes(compare: Any, shapes: tuple[Any, Any]) -> None:
    with pytest.raises(DataError, match="cannot be compared as classes"):
        compare(np.zeros(shapes[0]), np.zeros(shapes[1]))


def test_every_metric_is_described() -> None:
    assert all(metric.description and metric.kinds for metric in METRICS.values())

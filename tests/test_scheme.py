"""Schemes: validated when made, plain data, one sentence per mistake."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import SchemeError
from tutelage.quantizers import (
    BinaryQuantizer,
    FourLevelQuantizer,
    TernaryQuantizer,
    UniformQuantizer,
    UnsignedQuantizer,
)
from tutelage.scheme import (
    WEIGHT_QUANTIZERS,
    ActivationSpec,
    AttentionSpec,
    ModuleSpec,
    Rule,
    Scheme,
    WeightSpec,
)

PRESETS = ("ternary-a8", "ternary-a4", "binary-a8", "binary-a4", "w2-a8", "reference")


def test_the_presets() -> None:
    assert Scheme.presets() == PRESETS
    for name in PRESETS:
        scheme = Scheme.preset(name)
        assert scheme.name == name
        assert scheme.rules == ()
        assert scheme.embedding is not None
        assert scheme.attention is not None


@pytest.mark.parametrize(
    ("name", "kind", "bits"),
    [
        ("ternary-a8", "ternary", 8),
        ("ternary-a4", "ternary", 4),
        ("binary-a8", "binary", 8),
        ("binary-a4", "binary", 4),
        ("w2-a8", "four-level", 8),
    ],
)
def test_presets_scale_per_row_and_per_token(name: str, kind: str, bits: int) -> None:
    scheme = Scheme.preset(name)
    row = WeightSpec(kind=kind, granularity="row", clip=None)
    token = ActivationSpec(bits=bits, granularity="row", clip=None)
    assert scheme.weight == scheme.embedding == row
    assert scheme.input == token
    assert scheme.attention == AttentionSpec(
        query=token,
        key=token,
        value=token,
        attention_map=ActivationSpec(bits=bits, signed=False),
    )
    assert scheme.arithmetic == "integer"


def test_the_reference_preset_is_the_published_code() -> None:
    scheme = Scheme.preset("reference")
    tensor = ActivationSpec(bits=8, granularity="tensor", clip=2.5, reciprocal=True)
    assert scheme.weight == WeightSpec(kind="ternary", granularity="tensor", clip=2.5)
    assert scheme.embedding == WeightSpec(kind="ternary", granularity="row", clip=2.5)
    assert scheme.input == tensor
    assert scheme.attention == AttentionSpec(
        query=tensor, key=tensor, value=tensor, attention_map=tensor
    )
    assert scheme.arithmetic == "float"


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("ternery-a8", "ternary-a8"), ("binary_a4", "binary-a4"), ("referense", "reference")],
)
def test_an_unknown_preset_is_refused_with_a_hint(wrong: str, near: str) -> None:
    with pytest.raises(
        SchemeError, match=rf"no scheme '{wrong}'; use one of .*Did you mean '{near}'\?"
    ):
        Scheme.preset(wrong)


# Specs build the quantizers they describe.


@pytest.mark.parametrize(
    ("kind", "cls", "bits"),
    [
        ("ternary", TernaryQuantizer, 2),
        ("binary", BinaryQuantizer, 1),
        ("four-level", FourLevelQuantizer, 2),
    ],
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("clip", [None, 2.5])
def test_weight_specs_build(
    kind: str, cls: type, bits: int, granularity: Any, clip: float | None
) -> None:
    spec = WeightSpec(kind=kind, granularity=granularity, clip=clip)
    made = spec.build()
    assert type(made) is cls
    assert (made.granularity, made.clip) == (granularity, clip)
    assert spec.bits == bits


def test_activation_specs_build() -> None:
    made = ActivationSpec(bits=4, granularity="tensor", clip=2.5, reciprocal=True).build()
    assert type(made) is UniformQuantizer
    assert (made.granularity, made.clip, made.grid.hi) == ("tensor", 2.5, 7)
    made = ActivationSpec(bits=8, signed=False).build()
    assert type(made) is UnsignedQuantizer
    assert (made.grid.lo, made.grid.hi) == (0, 255)


# Mistakes.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: WeightSpec(kind="ternari"),
            r"^WeightSpec: .*'ternari'.*'ternary', 'binary', 'four-level'.*mean 'ternary'\?",
            id="kind",
        ),
        pytest.param(
            lambda: WeightSpec(kind="binary", granularity="column"),  # type: ignore[arg-type]
            r"^WeightSpec: granularity: Input should be 'tensor' or 'row'",
            id="granularity",
        ),
        pytest.param(
            lambda: WeightSpec(kind="binary", clip=0),
            r"^WeightSpec: clip: .*greater than 0",
            id="clip",
        ),
        pytest.param(
            lambda: WeightSpec(kind="binary", clip=-1.0), r"^WeightSpec: clip: ", id="negative-clip"
        ),
        pytest.param(
            lambda: WeightSpec(),  # type: ignore[call-arg]
            r"^WeightSpec: kind: Field required",
            id="missing",
        ),
        pytest.param(
            lambda: WeightSpec(kind="binary", granularty="row"),  # type: ignore[call-arg]
            r"^WeightSpec: granularty: .*Did you mean 'granularity'\?",
            id="unknown-field",
        ),
        pytest.param(
            lambda: ActivationSpec(bits=1),
            r"^ActivationSpec: bits: .*greater than or equal to 2",
            id="1",
        ),
        pytest.param(
            lambda: ActivationSpec(bits=9),
            r"^ActivationSpec: bits: .*less than or equal to 8",
            id="9",
        ),
        pytest.param(
            lambda: ActivationSpec(bits="many"),  # type: ignore[arg-type]
            r"^ActivationSpec: bits: .*valid integer",
            id="type",
        ),
        pytest.param(
            lambda: ActivationSpec(signed=False, clip=1.0),
            r"^ActivationSpec: .*clip and reciprocal need signed=True",
            id="unsigned-clip",
        ),
        pytest.param(
            lambda: ActivationSpec(signed=False, reciprocal=True),
            "need signed=True",
            id="unsigned-rec",
        ),
        pytest.param(
            lambda: Rule(pattern="layer.("),
            r"^Rule: .*'layer\.\(' is no regular expression",
            id="pattern",
        ),
        pytest.param(
            lambda: Rule(pattern="x", input=ActivationSpec()),
            r"^Rule: .*input without weight; give both, or neither",
            id="input-alone",
        ),
        pytest.param(
            lambda: Scheme(weight=WeightSpec(kind="binary"), arithmetic="exact"),  # type: ignore[arg-type]
            r"^Scheme: arithmetic: Input should be 'integer' or 'float'",
            id="arithmetic",
        ),
        pytest.param(
            lambda: Scheme(weigth=WeightSpec(kind="binary")),  # type: ignore[call-arg]
            r"^Scheme: weig",
            id="typo",
        ),
        pytest.param(
            lambda: Scheme(weight={"kind": "ternery"}),  # type: ignore[arg-type]
            r"^Scheme: weight.*'ternery'.*Did you mean 'ternary'\?",
            id="nested-kind",
        ),
        pytest.param(
            lambda: ModuleSpec(kind="conv"),  # type: ignore[arg-type]
            r"^ModuleSpec: kind: Input should be 'linear'",
            id="module-kind",
        ),
    ],
)
def test_mistakes_are_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(SchemeError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
    assert "https://" not in str(error.value)
    assert error.value.__cause__ is None


def test_a_misspelt_required_field_is_hinted_at() -> None:
    with pytest.raises(SchemeError) as error:
        Scheme(weigth=WeightSpec(kind="binary"))  # type: ignore[call-arg]
    # Either the missing field or the unknown one may be told; it must name 'weight'.
    assert "weight" in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: WeightSpec(kind="ternari"), id="kind"),
        pytest.param(lambda: Rule(pattern="a("), id="pattern"),
    ],
)
def test_a_mistake_is_told_in_a_clean_sentence(make: Any) -> None:
    with pytest.raises(SchemeError) as error:
        make()
    text = str(error.value)
    assert text.count(text.split(":")[0]) == 1
    assert "?." not in text


def test_specs_are_frozen() -> None:
    scheme = Scheme.preset("binary-a8")
    with pytest.raises(ValueError, match="frozen"):
        scheme.name = "other"  # type: ignore[misc]
    assert hash(scheme) == hash(Scheme.preset("binary-a8"))
    assert scheme != Scheme.preset("binary-a4")


# Rules.


def test_rules_match_whole_names() -> None:
    rule = Rule(pattern=r"encoder\.layer\.1\..*")
    assert rule.matches("encoder.layer.1.output.dense")
    assert not rule.matches("bert.encoder.layer.1.output.dense")
    assert not rule.matches("encoder.layer.10.output.dense")


def test_the_first_rule_that_matches_decides() -> None:
    binary, token = WeightSpec(kind="binary"), ActivationSpec(bits=4)
    scheme = Scheme(
        weight=WeightSpec(kind="ternary"),
        input=ActivationSpec(),
        embedding=WeightSpec(kind="ternary"),
        arithmetic="float",
        rules=(
            Rule(pattern=".*key"),
            Rule(pattern=".*(key|query)", weight=binary, input=token),
            Rule(pattern=".*words", weight=binary),
            Rule(pattern=".*value", weight=binary),
        ),
    )
    assert scheme.linear("a.key") is None
    assert scheme.linear("a.query") == ModuleSpec(
        kind="linear", weight=binary, input=token, arithmetic="float"
    )
    # A rule says everything about its module: without an input spec the input is not quantized.
    assert scheme.linear("a.value") == ModuleSpec(kind="linear", weight=binary, arithmetic="float")
    assert scheme.linear("a.other") == ModuleSpec(
        kind="linear", weight=scheme.weight, input=scheme.input, arithmetic="float"
    )
    assert scheme.word_embedding("words") is not None
    assert scheme.word_embedding("the.words") == ModuleSpec(kind="embedding", weight=binary)
    assert scheme.word_embedding("a.key") is None
    assert scheme.word_embedding("other") == ModuleSpec(kind="embedding", weight=scheme.embedding)


def test_what_only_a_rule_can_quantize() -> None:
    binary, token = WeightSpec(kind="binary"), ActivationSpec(bits=4)
    rules = (Rule(pattern="kept"), Rule(pattern="patches|kept", weight=binary, input=token))
    scheme = Scheme(weight=WeightSpec(kind="ternary"), arithmetic="float", rules=rules)
    assert scheme.rule_for("kept") == rules[0]
    assert scheme.rule_for("patches") == rules[1]
    assert scheme.rule_for("other") is None
    assert scheme.by_rule("other", "linear") is None
    assert scheme.by_rule("kept", "conv2d") is None
    assert scheme.by_rule("patches", "conv2d") == ModuleSpec(
        kind="conv2d", weight=binary, input=token, arithmetic="float"
    )
    for kind in ("linear", "conv1d"):
        assert scheme.linear("patches", kind).kind == scheme.linear("x", kind).kind == kind  # type: ignore[arg-type, union-attr]


def test_embeddings_stay_where_the_scheme_says_nothing() -> None:
    scheme = Scheme(
        weight=WeightSpec(kind="ternary"),
        rules=(Rule(pattern="special", weight=WeightSpec(kind="binary")),),
    )
    assert scheme.word_embedding("words") is None
    assert scheme.word_embedding("special") == ModuleSpec(
        kind="embedding", weight=WeightSpec(kind="binary")
    )


# Plain data.

_clips = st.none() | st.floats(0.125, 8, width=16)
_weights = st.builds(
    WeightSpec,
    kind=st.sampled_from(sorted(WEIGHT_QUANTIZERS)),
    granularity=st.sampled_from(["row", "tensor"]),
    clip=_clips,
)
_signed = st.builds(
    ActivationSpec,
    bits=st.integers(2, 8),
    granularity=st.sampled_from(["row", "tensor"]),
    clip=_clips,
    reciprocal=st.booleans(),
)
_inputs = _signed | st.builds(ActivationSpec, bits=st.integers(2, 8), signed=st.just(False))
_rules = st.builds(Rule, pattern=st.sampled_from([".*", r"a\.\d+"]), weight=_weights, input=_inputs)
_schemes = st.builds(
    Scheme,
    name=st.text(max_size=8),
    weight=_weights,
    input=st.none() | _inputs,
    embedding=st.none() | _weights,
    attention=st.none()
    | st.builds(AttentionSpec, query=_signed, key=_signed, value=_signed, attention_map=_inputs),
    arithmetic=st.sampled_from(["integer", "float"]),
    rules=st.lists(_rules, max_size=2).map(tuple),
)


@given(scheme=_schemes)
def test_json_round_trip(scheme: Scheme) -> None:
    for defaults in (False, True):
        data = scheme.model_dump(mode="json", exclude_defaults=defaults)
        assert Scheme(**json.loads(json.dumps(data))) == scheme
    assert Scheme.model_validate_json(scheme.model_dump_json()) == scheme
    assert Scheme.model_validate(scheme.model_dump()) == scheme


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name: str) -> None:
    scheme = Scheme.preset(name)
    assert Scheme(**json.loads(scheme.model_dump_json(exclude_defaults=True))) == scheme

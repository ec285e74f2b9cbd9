from __future__ import annotations

import pytest
import transformers

from helpers import make_student, tiny
from tutelage._prepare import prepared
from tutelage.artefacts._hollow import make_hollow
from tutelage.errors import ArtefactError


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (transformers.__version__, r"of another architecture\.$"),
        (None, r"of another architecture\.$"),
        ("5.0.1", r"architecture, or this transformers, .*, names modules otherwise than 5\.0\.1"),
    ],
)
def test_a_module_that_is_not_there(saved: str | None, message: str) -> None:
    state = prepared(make_student())
    assert state is not None
    name, spec = next((n, s) for n, s in state.modules.items() if s.kind == "linear")
    model = tiny("bert")
    model.config.transformers_version = saved
    with pytest.raises(ArtefactError, match=message) as raised:
        make_hollow(model, {f"{name}.renamed": spec})
    assert f"{name}.renamed" in str(raised.value)

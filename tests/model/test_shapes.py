"""The sizes that `lrc info` prints."""

import pytest

from lrc.model.shapes import shape_of
from tiny import tiny_teacher


@pytest.mark.parametrize(
    ("family", "dense", "experts"),
    [
        ("llama", 20, None),
        ("qwen3_moe", 20, 12),
        ("mixtral", None, 20),
        ("gpt_oss", None, 20),
        ("solar_open", None, 12),
        ("granitemoehybrid", 7, 20),
    ],
)
def test_widths_of_dense_ffns_and_of_experts(
    family: str, dense: int | None, experts: int | None
) -> None:
    """In some families every FFN is a mixture, and `intermediate_size` is the experts' width."""
    changes = {"num_local_experts": 4} if family == "granitemoehybrid" else {}
    row = shape_of(tiny_teacher(family, shared_intermediate_size=7, **changes).model).row
    assert row.get("FFN width") == dense
    assert row.get("expert width") == experts
    assert ("experts of a token" in row) == (experts is not None)

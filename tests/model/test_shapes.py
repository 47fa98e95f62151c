"""The sizes that `lrc info` prints."""

from typing import Any

import pytest

from lrc.model.shapes import shape_of
from tiny import tiny_teacher


@pytest.mark.parametrize(
    ("family", "changes", "dense", "experts"),
    [
        ("llama", {}, 20, None),
        ("qwen3_moe", {}, 20, 12),
        ("mixtral", {}, None, 20),
        ("gpt_oss", {}, None, 20),
        ("solar_open", {}, None, 12),
        ("granitemoehybrid", {"num_local_experts": 4, "shared_intermediate_size": 7}, 7, 20),
        ("nemotron_h", {"layer_types": ["linear_attention", "mlp", "full_attention"]}, 20, None),
    ],
)
def test_widths_of_dense_ffns_and_of_experts(
    family: str, changes: dict[str, Any], dense: int | None, experts: int | None
) -> None:
    """In some families every FFN is a mixture, and `intermediate_size` is the experts' width."""
    row = shape_of(tiny_teacher(family, **changes).model).row
    assert row.get("FFN width") == dense
    assert row.get("expert width") == experts
    assert ("experts of a token" in row) == (experts is not None)

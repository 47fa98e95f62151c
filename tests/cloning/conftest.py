"""Fixtures for the method of the paper."""

import pytest

from tiny import TINY_CASES, Case


@pytest.fixture(params=TINY_CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Family, tied embeddings, and changes to the configuration of a tiny teacher."""
    return request.param

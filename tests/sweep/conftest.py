"""What do tests of faults share? A cluster to break, and nothing that outlives a test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import faults
from tests.cluster import Cluster


@pytest.fixture
def stormy(fragile: Cluster) -> Iterator[Cluster]:
    """A cluster to break; launches that a test leaves behind end before it is healed."""
    yield fragile
    faults.end()

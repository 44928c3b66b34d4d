"""What do tests of several packages share? A real Slurm, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import cluster


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A running cluster; tests that need one skip, with the reason, where none can be started."""
    if why := cluster.missing():
        pytest.skip(f"no Slurm: {why}")
    held = cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        held.start()
        yield held
    finally:
        held.stop()

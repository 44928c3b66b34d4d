"""What do tests of several packages share? Real Slurm clusters, each started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import cluster

# the same examples on every machine: a test that passes here passes anywhere
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def running(held: cluster.Cluster) -> Iterator[cluster.Cluster]:
    """A cluster from start to stop; tests that need one skip, with the reason, where none can be started."""
    if why := cluster.missing(held.accounting):
        pytest.skip(f"no Slurm: {why}")
    try:
        held.start()
        yield held
    finally:
        held.stop()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """A cluster that nobody breaks."""
    yield from running(cluster.Cluster(tmp_path_factory.mktemp("slurm"), nodes=2))


@pytest.fixture(scope="session")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cluster.Cluster]:
    """What ``fragile`` hands out; tests ask for that."""
    folder = tmp_path_factory.mktemp("fragile")
    yield from running(cluster.Cluster(folder, preempt=True, settings=cluster.IMPATIENT))


@pytest.fixture
def fragile(breakable: cluster.Cluster) -> Iterator[cluster.Cluster]:
    """A cluster to break: daemons may be killed, nodes lost, settings changed. It is healed after each test."""
    yield breakable
    breakable.heal()

"""Is NVIDIA's MPS started where several processes share a GPU, stopped after them, and missed without harm?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sweep.sharing import CONTROL, sharing

NAMES = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the daemon's control program, which writes down how it is called; the file it writes."""
    told = tmp_path / "told"
    program = tmp_path / "bin" / CONTROL
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@ $CUDA_MPS_PIPE_DIRECTORY" >> {told}\n[ -n "$1" ] || cat >> {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return told


def test_processes_that_share_a_gpu_have_a_daemon_of_their_own_for_as_long_as_they_live(control):
    with sharing(2):
        folder = os.environ[NAMES[0]]
        assert Path(folder).is_dir()
        assert len(folder) < 90  # a socket lies below
        assert control.read_text().split() == ["-d", folder]
    assert control.read_text().splitlines()[-1] == "quit"
    assert not any(name in os.environ for name in NAMES)
    assert not Path(folder).exists()


@pytest.mark.parametrize(("size", "visible"), [(1, "0"), (4, "")])
def test_who_is_alone_or_has_no_gpu_needs_none(control, monkeypatch, size, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with sharing(size):
        assert NAMES[0] not in os.environ
    assert not control.exists()


def test_a_daemon_that_does_not_start_is_said_and_done_without(control, monkeypatch, capsys):
    program = control.parent / "bin" / CONTROL
    program.write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    with sharing(3):
        pass
    assert capsys.readouterr().out == "no MPS, processes take turns: no permission\n"

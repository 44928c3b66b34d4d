"""How do several processes compute on one GPU at the same time? Through NVIDIA's MPS, where it is installed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

CONTROL = "nvidia-cuda-mps-control"


@contextlib.contextmanager
def sharing(size: int) -> Iterator[None]:
    """Let ``size`` processes that start in the block share each GPU; without MPS, or a GPU, they take turns."""
    if size < 2 or os.environ.get("CUDA_VISIBLE_DEVICES") == "" or shutil.which(CONTROL) is None:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:  # of this node; a socket's path has to be short
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        os.environ.update(dict.fromkeys(names, folder))  # for the processes to come
        started = subprocess.run([CONTROL, "-d"], capture_output=True, text=True)
        if started.returncode:
            print(f"no MPS, processes take turns: {started.stderr.strip()}")
        try:
            yield
        finally:
            if not started.returncode:
                subprocess.run([CONTROL], input="quit\n", capture_output=True, text=True)
            for name in names:
                del os.environ[name]

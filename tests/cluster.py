"""How does a real Slurm run on this machine? Daemons of Debian's packages, in a temporary folder.

As root (munge and slurmd want it), without systemd. Several nodes share the host, each with fake GPUs and a port of
its own. Settings trade robustness under load for seconds: see the comments.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun", "sinfo")


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "munge and slurmd want root"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def _ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in held]
    for each in held:
        each.close()
    return ports


@dataclass
class Cluster:
    """munged, slurmctld and one slurmd a node."""

    folder: Path
    nodes: int = 2
    cpus: int = 8
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def names(self) -> list[str]:
        return [f"n{number + 1}" for number in range(self.nodes)]

    def environment(self) -> dict[str, str]:
        """What a command needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.conf), "PATH": f"{self.folder}/bin{os.pathsep}{_path()}"}

    def _write(self) -> None:
        ctld, *ports = _ports(1 + self.nodes)
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        gpus = "/dev/null,/dev/zero"  # any device file will do for a GPU that nobody touches
        (self.folder / "gres.conf").write_text(f"NodeName={','.join(self.names)} Name=gpu File={gpus}\n")
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
            f"SlurmctldPort={ctld}",
            "SlurmUser=root",
            "SlurmdUser=root",
            "AuthType=auth/munge",
            # a requeue waits for credentials to expire: two minutes by default
            f"AuthInfo=socket={self.folder}/munge.socket,cred_expire=5",
            "CryptoType=crypto/munge",
            "MpiDefault=none",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "JobAcctGatherType=jobacct_gather/linux",
            "AccountingStorageType=accounting_storage/none",
            "ReturnToService=2",
            "GresTypes=gpu",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool/%n",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            f"SlurmctldLogFile={self.folder}/log/slurmctld.log",
            f"SlurmdLogFile={self.folder}/log/slurmd-%n.log",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=10000,bf_interval=1",
            "SlurmdParameters=config_overrides",
            "KillWait=2",
            "SlurmdTimeout=10",
            "MinJobAge=60",
            "JobRequeue=1",
            *(
                f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
                "RealMemory=16000 Gres=gpu:2 State=UNKNOWN"
                for name, port in zip(self.names, ports, strict=True)
            ),
            "PartitionName=main Nodes=ALL Default=YES MaxTime=60",
        ]
        self.conf.write_text("\n".join(lines) + "\n")
        # Snakemake's job step starts srun without SLURM_CONF
        srun = self.folder / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.conf} exec {shutil.which("srun", path=_path())} "$@"\n')
        srun.chmod(0o755)

    def start(self) -> None:
        """Start the daemons and wait for the nodes."""
        self._write()
        munge = ["munged", "--foreground", "--force"]
        for name, path in (("key-file", "munge.key"), ("socket", "munge.socket"), ("seed-file", "munge.seed")):
            munge.append(f"--{name}={self.folder / path}")
        munge += [f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/log/munged.log"]
        self._daemon("munged", munge)
        until((self.folder / "munge.socket").exists)
        self._daemon("slurmctld", ["slurmctld", "-D"])
        for name in self.names:
            self._daemon(name, ["slurmd", "-D", "-N", name])
        until(lambda: self.states().count("idle") == self.nodes)

    def _daemon(self, name: str, command: list[str]) -> None:
        log = (self.folder / "log" / f"{name}.out").open("ab")
        env = os.environ | self.environment()
        self.daemons[name] = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        log.close()

    def call(self, *command: str, check: bool = True) -> str:
        env = os.environ | self.environment()
        return subprocess.run(command, env=env, check=check, capture_output=True, text=True, timeout=60).stdout

    def states(self) -> list[str]:
        return self.call("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def stop(self) -> None:
        """End jobs, then daemons; steps of a killed slurmd are left to their job's time limit."""
        try:
            self.call("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        finally:
            for process in self.daemons.values():
                process.kill()
                process.wait(timeout=30)


def until(ready: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError("the cluster did not get there")
        time.sleep(0.05)

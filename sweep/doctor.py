"""What can this cluster do, and what has to be set for it? Findings as sentences, each with the setting it asks for.

    python -m sweep.doctor                       # this machine's Slurm and the folder results/
    python -m sweep.doctor --results /shared/me  # another folder
    python -m sweep.doctor --json

Takes seconds and changes nothing (a few files are made in the results folder and removed). Settings are for a folder of
your own beside ``slurm/`` (see slurm/config.yaml). Exit codes: 0 nothing is in the way, 1 something is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from sweep import slurm

Level = Literal["good", "note", "problem"]
NEEDED = ("sbatch", "squeue", "scontrol", "srun", "scancel")
SKEW_S = 5.0  # between this host's clock and the file system's, beyond which times are hard to read
NETWORK = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "cifs", "panfs", "weka")


@dataclass(frozen=True)
class Finding:
    """One sentence; ``setting`` is a line for the Snakemake profile, where one follows from it."""

    level: Level
    about: str
    sentence: str
    setting: str | None = None


class Site:
    """What is asked once and looked at by several checks."""

    def __init__(self, results: Path) -> None:
        self.results = results
        self.lacking = [name for name in NEEDED if shutil.which(name) is None]
        self.config, self.failed = ({}, "no Slurm") if self.lacking else slurm.configuration()

    def number(self, key: str) -> int | None:
        """The leading number of a setting such as "300 sec"."""
        text = self.config.get(key, "").split(" ")[0]
        return int(text) if text.isdecimal() else None


def commands(site: Site) -> Iterator[Finding]:
    if len(site.lacking) == len(NEEDED):
        yield Finding("note", "Slurm", "There is no Slurm here; stages run on this machine (--cluster local).")
    elif site.lacking:
        yield Finding("problem", "Slurm", f"Commands are missing: {', '.join(site.lacking)}.")
    elif site.failed:
        yield Finding("problem", "Slurm", f"The controller does not answer ({site.failed}).")
    else:
        version = site.config.get("SLURM_VERSION", "of unknown version")
        yield Finding("good", "Slurm", f"Slurm {version}, cluster {site.config.get('ClusterName', '?')}.")


def accounting(site: Site) -> Iterator[Finding]:
    if site.failed:
        return
    status = "slurm-status-command: squeue"
    if site.config.get("AccountingStorageType", "").endswith("none"):
        yield Finding(
            "note", "accounting", "Accounting is off: states come from squeue and the runs' own records.", status
        )
    elif (answer := slurm.ask("sacct", "-n", "-X", "-P", "-o", "JobID")).failed:
        yield Finding(
            "note", "accounting", f"sacct does not answer ({answer.failed}): squeue is asked instead.", status
        )
    else:
        yield Finding("good", "accounting", "sacct answers: how a lost job ended can be looked up.")


def age(site: Site) -> Iterator[Finding]:
    if (kept := site.number("MinJobAge")) is None:
        return
    first = max(5, kept // 3)
    yield Finding(
        "good" if kept >= 60 else "note",
        "MinJobAge",
        f"squeue forgets an ended job after {kept} s; Snakemake has to look sooner than that.",
        f"slurm-init-seconds-before-status-checks: {min(first, 40)}",
    )


def arrays(site: Site) -> Iterator[Finding]:
    if (most := site.number("MaxArraySize")) is None:
        return
    if most < 2:
        yield Finding("problem", "MaxArraySize", "Job arrays are switched off (MaxArraySize 0 or 1).")
    else:
        yield Finding("good", "MaxArraySize", f"Indices of an array go up to {most - 1}.")


def requeue(site: Site) -> Iterator[Finding]:
    if site.config.get("JobRequeue") == "0":
        sentence = (
            "Jobs are not requeued unless they ask for it (JobRequeue 0). Those of sweep.launch do; where that is "
            "forbidden, say requeue=no, and the tasks of an array go on with each other's runs."
        )
        yield Finding("note", "JobRequeue", sentence, "set-resources: {generator: {launch: requeue=no}}")
    elif "JobRequeue" in site.config:
        yield Finding("good", "JobRequeue", "Jobs may be requeued.")


def preemption(site: Site) -> Iterator[Finding]:
    kind = site.config.get("PreemptType", "")
    if not kind or kind.endswith("none"):
        return
    mode = site.config.get("PreemptMode", "?")
    # older versions have it among the controller's parameters, under a longer name
    announced = "send_user_signal" in site.config.get("PreemptParameters", "")
    if announced or "preempt_send_user_signal" in site.config.get("SlurmctldParameters", ""):
        yield Finding(
            "good", "preemption", f"Preemption by {kind} ({mode}) announces itself by a signal: runs save first."
        )
    else:
        sentence = (
            f"Preemption by {kind} ({mode}) sends SIGTERM and kills after the partition's GraceTime: runs save "
            "on SIGTERM; without a GraceTime they lose what came after the last checkpoint."
        )
        yield Finding("note", "preemption", sentence)


def partitions(site: Site) -> Iterator[Finding]:
    if site.failed:
        return
    answer = slurm.ask("sinfo", "-h", "-o", "%P|%a|%l|%D|%G")
    if answer.failed:
        yield Finding("problem", "partitions", f"Partitions cannot be listed ({answer.failed}).")
        return
    rows = [line.split("|") for line in answer.lines()]
    for name, up, limit, nodes, gres in rows:
        what = f"{nodes} nodes, {gres}" if gres != "(null)" else f"{nodes} nodes, no GPU"
        plain = name.rstrip("*")
        default = ", the default" if name.endswith("*") else ""
        level: Level = "good" if up == "up" else "note"
        yield Finding(level, "partition", f"{plain}{default}: {up}, time limit {limit}, {what}.")
    if not any(name.endswith("*") for name, *_ in rows):
        yield Finding(
            "note", "partition", "No partition is the default: name one.", "default-resources: [slurm_partition=NAME]"
        )
    if not any("gpu" in gres for *_, gres in rows):
        yield Finding("note", "GPUs", "No partition has GPUs (gres gpu): stages that ask for them will wait for ever.")


def place(site: Site) -> Iterator[Finding]:
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return
    held = "SLURM_JOB_GPUS" in os.environ or "SLURM_GPUS_ON_NODE" in os.environ
    holds = ", which holds GPUs that it does not use" if held else ""
    yield Finding(
        "note", "launcher", f"This is inside job {job}{holds}; its time limit is that of a launch which waits here."
    )


def configured(site: Site) -> Iterator[Finding]:
    where = os.environ.get("SLURM_CONF")
    if not site.lacking and where and Path(where).parent != Path("/etc/slurm"):
        sentence = (
            f"The configuration is {where}. Snakemake's job step does not hand SLURM_CONF on: jobs of its executor "
            "need an `srun` on PATH that sets it."
        )
        yield Finding("note", "SLURM_CONF", sentence)


def names(site: Site) -> Iterator[Finding]:
    if site.failed:
        return
    answer = slurm.ask("sinfo", "-h", "-N", "-o", "%N")
    unknown = []
    for name in sorted(set(answer.lines()))[:8]:
        try:
            socket.getaddrinfo(name.strip(), None)
        except OSError:
            unknown.append(name.strip())
    if unknown:
        yield Finding(
            "note",
            "addresses",
            f"Names of nodes cannot be resolved here ({', '.join(unknown)}); runs of several nodes meet at NodeAddr.",
        )


def folder(site: Site) -> Iterator[Finding]:
    """What claims, atomic writes and heartbeats need of the file system."""
    results = site.results
    results.mkdir(parents=True, exist_ok=True)
    kind = _file_system(results)
    if not site.lacking and kind not in NETWORK:
        yield Finding("note", "results", f"{results} is on {kind}: make sure that every node sees it.")
    with tempfile.TemporaryDirectory(dir=results, prefix=".doctor-") as scratch:
        here = Path(scratch)
        for name in ("first", "second"):
            (here / name).mkdir()
            (here / name / "holder.json").write_text("{}")
        (here / "first").rename(here / "claim")
        try:
            (here / "second").rename(here / "claim")
        except OSError:
            yield Finding("good", "results", f"{results} ({kind}): a claim is made by one process only.")
        else:
            yield Finding(
                "problem", "results", f"{results} ({kind}): a folder replaces one that is not empty; claims fail."
            )
        skew = time.time() - (here / "claim").stat().st_mtime
        if abs(skew) > SKEW_S:
            yield Finding(
                "note", "clock", f"The clock of {results} is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead'}."
            )
    free = shutil.disk_usage(results).free / 2**30
    yield Finding("good" if free > 10 else "note", "results", f"{free:,.0f} GiB are free.")


def _file_system(path: Path) -> str:
    """Kind of the file system that holds a path (Linux; "unknown" elsewhere)."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    resolved = path.resolve()
    held = [(Path(point), kind) for point, kind in mounts if resolved.is_relative_to(point)]
    return max(held, key=lambda mount: len(mount[0].parts), default=(Path("/"), "unknown"))[1]


CHECKS: tuple[Callable[[Site], Iterator[Finding]], ...] = (
    commands,
    accounting,
    age,
    arrays,
    requeue,
    preemption,
    partitions,
    place,
    configured,
    names,
    folder,
)
WITHOUT_SLURM = (commands, folder)


def examine(results: Path) -> list[Finding]:
    """All findings, in the order of ``CHECKS``; where there is no Slurm, those about this machine."""
    site = Site(results)
    return [found for check in CHECKS if not site.lacking or check in WITHOUT_SLURM for found in check(site)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sweep.doctor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("results"), metavar="DIR", help="where studies will lie")
    parser.add_argument("--json", action="store_true", help="findings for programs")
    options = parser.parse_args(argv)
    try:
        found = examine(options.results)
    except OSError as error:
        print(f"--results: got {options.results}; {error.strerror}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    else:
        for each in found:
            print(f"{each.level:<8} {each.about}: {each.sentence}")
        if settings := [each.setting for each in found if each.setting]:
            print("", "for your profile:", *(f"  {setting}" for setting in settings), sep="\n")
    return 1 if any(each.level == "problem" for each in found) else 0


if __name__ == "__main__":
    sys.exit(main())

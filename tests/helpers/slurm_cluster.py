"""A real Slurm of virtual nodes on this machine: munged, slurmctld and a slurmd a node, in a mount and process namespace of their
own, with all their state in one folder. It ends with the one process that holds the namespace."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

NODES = 3
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare", "setpriv")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port_d}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
CommunicationParameters=NoCtldInAddrAny
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=3
ReturnToService=2
MinJobAge=7200
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=all Nodes=node[1-{count}] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-{count}] MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""

INNER = """
set -e
hostname localhost 2>/dev/null || true
mount --bind {folder}/hosts /etc/hosts
munged --foreground --force --key-file={folder}/munge.key --socket={folder}/run/munge.sock --pid-file={folder}/run/munged.pid \
    --log-file={folder}/log/munged.log --seed-file={folder}/run/munged.seed &
for try in $(seq 50); do [ -S {folder}/run/munge.sock ] && break; sleep 0.1; done
slurmctld -D -c &
sleep 0.5
for node in $(seq {count}); do
    unshare --uts sh -c "hostname node$node; exec slurmd -D -N node$node" &
done
wait
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    absent = [tool for tool in TOOLS if not shutil.which(tool)]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)"
    if os.geteuid():
        return "needs root"
    refused = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "unshare is refused here" if refused.returncode else ""


def free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below those the system gives out."""
    for first in range(21000, 32000, 50):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


class Cluster:
    """Started by `with`; `environment` is what its clients need."""

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
        for name in ("run", "state", "log"):
            (self.folder / name).mkdir()
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        first = free_ports(NODES + 2)
        names = {"localhost": "127.0.0.1"} | {f"node{n}": f"127.0.0.1{n}" for n in range(1, NODES + 1)}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        nodes = "\n".join(
            f"NodeName=node{n} NodeHostname=node{n} NodeAddr=127.0.0.1{n} Port={first + 1 + n} CPUs=4 RealMemory=4000"
            for n in range(1, NODES + 1)
        )
        values = {"folder": self.folder, "port": first, "port_d": first + 1, "nodes": nodes, "count": NODES}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        kept = {k: v for k, v in os.environ.items() if not re.match(r"SLURM_|SBATCH_|SRUN_|RANK$|WORLD_SIZE|LOCAL_|MASTER_", k)}
        self.environment = {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}
        hold = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"]
        log = open(self.folder / "log" / "inner.log", "w")
        inner = INNER.format(**values)
        self.process = subprocess.Popen([*hold, "bash", "-c", inner], env=self.environment, stdout=log, stderr=log)
        for _ in range(100):
            if self.client("sinfo", "-h", "-o", "%t %D").split() == ["idle", str(NODES)]:
                return self
            time.sleep(0.1)
        logs = "\n".join(file.read_text() for file in (self.folder / "log").iterdir())
        self.__exit__()
        raise RuntimeError(f"Slurm did not start:\n{logs}")

    def __exit__(self, *_) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self, *command: str) -> str:
        """What a Slurm command prints; empty where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout if not done.returncode else ""

    def submit(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """The number of a new job."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=cwd, env={**self.environment, **environment}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.client("scontrol", "-o", "show", "job", number)))

    def wait(self, number: str, states: tuple[str, ...], limit: float = 120.0) -> dict[str, str]:
        """The job once it is in one of `states`."""
        deadline = time.monotonic() + limit
        while (job := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < deadline, job
            time.sleep(0.5)
        return job

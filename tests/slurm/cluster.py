"""A SLURM cluster of several nodes on this machine, for the tests and for trying things out.

    python tests/slurm/cluster.py start DIR [--nodes 4] [--accounting] [--slurm FOLDER]
    export SLURM_CONF=DIR/slurm.conf            # now sbatch, squeue … talk to it
    python tests/slurm/cluster.py stop DIR

It needs root (node names are put into /etc/hosts, in a marked block) and these packages of
Debian or Ubuntu, which `make cluster` installs: slurm-wlm munge, and slurmdbd mariadb-server for
`--accounting`. With `--slurm`, its programs are those in a folder that newer.py made. It installs
nothing itself, uses ports, sockets and folders of its own, and ends
only processes that it started.

Partitions: `low` (the default), `high` (preempts the others, which are requeued) and `grace`
(as `low`, but a preempted job has 30 seconds to leave). `gpu` has large nodes that never start, for
scripts that are only tested. Clocks are short, and an array has at most six jobs. Memory is not
enforced, as that takes cgroups, but each node has four fake GPUs.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = "slurm-wlm munge"
ACCOUNTING_PACKAGES = "slurmdbd mariadb-server"
_BASIC = ("slurmctld", "slurmd", "munged", "sbatch", "squeue")
_ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")
# The daemons that end after the nodes', in this order.
_LAST = ("slurmctld", "slurmdbd", "mariadbd", "munged")
_HOSTS = Path("/etc/hosts")

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
KillWait=20
SlurmdTimeout=10
SlurmctldTimeout=10
BatchStartTimeout=10
MessageTimeout=10
MinJobAge=300
MaxArraySize={max_array_size}
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=-1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
{plugins}
{accounting}
{nodes}
NodeName=node[9-13] CPUs=96 RealMemory=1000000 Gres=gpu:8 Feature=h100 State=CLOUD
PartitionName=low Nodes={names} Default=YES PriorityTier=1 MaxTime=60 State=UP
PartitionName=grace Nodes={names} PriorityTier=1 GraceTime=30 MaxTime=60 State=UP
PartitionName=high Nodes={names} PriorityTier=10 PreemptMode=OFF MaxTime=60 State=UP
PartitionName=gpu Nodes=node[9-13] State=UP
"""
_ACCOUNTING_CONF = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={dir}/munge.socket"""
_DBD_CONF = """\
AuthType=auth/munge
AuthInfo=socket={dir}/munge.socket
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser={user}
LogFile={dir}/slurmdbd.log
PidFile={dir}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
"""


def missing_packages(accounting: bool) -> str | None:
    """Return why a cluster cannot be started here, or None."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    programs = _BASIC + (_ACCOUNTING if accounting else ())
    absent = [name for name in programs if shutil.which(name, path=path) is None]
    packages = f"{PACKAGES} {ACCOUNTING_PACKAGES}" if accounting else PACKAGES
    if absent:
        return f"no {', '.join(absent)}: needs the packages {packages}; run `make cluster`"
    return None


class Cluster:
    """One cluster, whose every file is in `folder`."""

    def __init__(
        self,
        folder: str | Path,
        *,
        nodes: int = 4,
        accounting: bool = False,
        slurm: Path | None = None,
        max_array_size: int = 6,
    ) -> None:
        """slurm: a folder of newer.py whose programs it runs; None: those that are installed.
        max_array_size: jobs of its largest array."""
        self.dir = Path(folder).absolute()
        self._max_array_size = max_array_size
        self.slurm = None if slurm is None else slurm.absolute()
        self.n_nodes = nodes
        self.accounting = accounting
        self._children: list[subprocess.Popen[bytes]] = []

    @property
    def conf(self) -> Path:
        return self.dir / "slurm.conf"

    @property
    def env(self) -> dict[str, str]:
        """The environment in which SLURM's clients talk to this cluster."""
        found = os.environ | {"SLURM_CONF": str(self.conf)}
        if self.slurm is not None:
            found["PATH"] = f"{self.slurm}/usr/bin:{self.slurm}/usr/sbin:{found['PATH']}"
        return found

    @property
    def nodes(self) -> list[str]:
        return json.loads((self.dir / "nodes.json").read_text())

    def start(self) -> None:
        """Start all daemons and wait until every node is idle. Raises RuntimeError if not."""
        reason = missing_packages(self.accounting)
        if reason:
            raise RuntimeError(reason)
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        for name in ("", "state", "spool"):
            (self.dir / name).mkdir(parents=True, exist_ok=True)
        self.dir.chmod(0o755)
        try:
            self._write_files()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self._spawn("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)])
            for node in self.nodes:
                self.start_node(node)
            _wait(self._all_idle, 30, "the nodes to be idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the daemons and whatever jobs still run, and take the names out of /etc/hosts."""
        daemons = self._daemons()
        for group in range(len(_LAST) + 1):
            _end([daemons[name] for name in daemons if _order_of_stop(name) == group])
        for pid in self._processes():
            _signal(pid, signal.SIGKILL)
        for child in self._children:
            child.wait(timeout=10)
        (self.dir / "daemons.json").unlink(missing_ok=True)
        self._write_hosts([])

    def client(self, *command: str, check: bool = True) -> str:
        """Run one of SLURM's clients against this cluster and return what it prints."""
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=30, check=False
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        """Start the daemon of one node."""
        (self.dir / "spool" / node).mkdir(exist_ok=True)
        stepd = [] if self.slurm is None else ["-d", f"{self.slurm}/usr/sbin/slurmstepd"]
        self._spawn(node, ["slurmd", "-D", "-N", node, "-f", str(self.conf), *stepd])

    def kill_node(self, node: str) -> None:
        """End a node as a power cut would: its daemon, its steps and their tasks, at once."""
        daemons = self._daemons()
        _signal(daemons[node][0], signal.SIGKILL)
        for pid in self._processes(node):
            _signal(pid, signal.SIGKILL)

    def _write_files(self) -> None:
        ports = _free_ports(self.n_nodes + 3)
        ctld_port, dbd_port, sql_port, *node_ports = ports
        # Names of its own for each cluster: all share /etc/hosts.
        names = [f"lunaris{ctld_port}n{i + 1}" for i in range(self.n_nodes)]
        (self.dir / "nodes.json").write_text(json.dumps(names))
        values = {
            "dir": self.dir, "user": getpass.getuser(), "host": socket.gethostname(),
            "name": f"lunaris{ctld_port}", "ctld_port": ctld_port, "dbd_port": dbd_port,
            "sql_port": sql_port, "names": ",".join(names),
            "max_array_size": self._max_array_size,
        }  # fmt: skip
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=4 RealMemory=4000 Gres=gpu:4 State=UNKNOWN"
            for name, port in zip(names, node_ports, strict=True)
        )
        accounting = _ACCOUNTING_CONF.format(**values) if self.accounting else ""
        plugins = ""
        if self.slurm is not None:
            plugins = f"PluginDir={self.slurm}/usr/lib/x86_64-linux-gnu/slurm-wlm"
            (self.dir / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        self.conf.write_text(
            _SLURM_CONF.format(**values, nodes=nodes, accounting=accounting, plugins=plugins)
        )
        (self.dir / "gres.conf").write_text("Name=gpu File=/dev/tty[0-3]\n")
        dbd = self.dir / "slurmdbd.conf"
        dbd.write_text(_DBD_CONF.format(**values))
        dbd.chmod(0o600)
        (self.dir / "sql_port").write_text(str(sql_port))
        self._write_hosts([f"127.0.0.1 {name}" for name in names])

    def _write_hosts(self, lines: list[str]) -> None:
        """Replace this cluster's block of /etc/hosts by `lines`."""
        begin, end = f"# begin {self.dir}", f"# end {self.dir}"
        text = _HOSTS.read_text()
        if begin in text:
            before, _, rest = text.partition(begin + "\n")
            text = before + rest.partition(end + "\n")[2]
        if lines:
            text += "\n".join([begin, *lines, end]) + "\n"
        # In place: containers mount this file, so it cannot be replaced by another.
        _HOSTS.write_text(text)

    def _start_munge(self) -> None:
        key = self.dir / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        sock = self.dir / "munge.socket"
        self._spawn(
            "munged",
            ["munged", "-F", "--force", f"--socket={sock}", f"--key-file={key}",
             f"--pid-file={self.dir}/munged.pid", f"--log-file={self.dir}/munged.log",
             f"--seed-file={self.dir}/munged.seed"],
        )  # fmt: skip
        _wait(sock.exists, 10, "munged")

    def _start_accounting(self) -> None:
        data, sock = self.dir / "sql", self.dir / "sql.socket"
        user = getpass.getuser()
        subprocess.run(
            ["mariadb-install-db", "--no-defaults", f"--datadir={data}", f"--user={user}",
             "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port = (self.dir / "sql_port").read_text()
        self._spawn(
            "mariadbd",
            ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={sock}",
             f"--port={port}", "--bind-address=127.0.0.1", f"--user={user}",
             f"--pid-file={self.dir}/sql.pid", "--innodb-flush-log-at-trx-commit=0"],
        )  # fmt: skip
        _wait(sock.exists, 30, "mariadbd")
        grant = (
            "CREATE USER 'slurm'@'localhost' IDENTIFIED BY 'slurm';"
            "CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';"
            "GRANT ALL ON slurm_acct.* TO 'slurm'@'localhost';"
            "GRANT ALL ON slurm_acct.* TO 'slurm'@'127.0.0.1';"
        )
        subprocess.run(
            ["mariadb", "--no-defaults", f"--socket={sock}", "-u", "root", "-e", grant], check=True
        )
        self._spawn("slurmdbd", ["slurmdbd", "-D"], MYSQL_UNIX_PORT=str(sock))
        _wait(lambda: not self.client("sacctmgr", "-n", "list", "user", check=False) == "", 60,
              "slurmdbd")  # fmt: skip

    def _spawn(self, name: str, command: list[str], **env: str) -> None:
        with (self.dir / f"{name}.out").open("a") as out:
            process = subprocess.Popen(
                command,
                env=self.env | {"LUNARIS_CLUSTER": str(self.dir), "LUNARIS_NODE": name} | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd=self.dir,
            )
        self._children.append(process)
        self._write_daemons(self._daemons() | {name: [process.pid, _started(process.pid)]})

    def _daemons(self) -> dict[str, list[int]]:
        """Return each daemon's process id and the clock tick at which that process started."""
        path = self.dir / "daemons.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _write_daemons(self, daemons: dict[str, list[int]]) -> None:
        (self.dir / "daemons.json").write_text(json.dumps(daemons))

    def _processes(self, node: str | None = None) -> list[int]:
        """Return what our daemons started and does still run, on one node or on all.

        Known by the environment: a daemon's own for a step's daemon, the job's for its tasks.
        """
        found = []
        ours = {f"SLURM_CONF={self.conf}"}
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                entries = set(path.read_text(errors="replace").split("\0"))
            except OSError:
                continue
            names = {e.partition("=")[2] for e in entries if e.startswith("SLURMD_NODENAME=")}
            if f"LUNARIS_CLUSTER={self.dir}" in entries:
                names |= {e.partition("=")[2] for e in entries if e.startswith("LUNARIS_NODE=")}
            if ours <= entries and (names & ({node} if node else set(self.nodes))):
                found.append(int(path.parent.name))
        return found

    def _all_idle(self) -> bool:
        states = self.client("sinfo", "-h", "-N", "-p", "low", "-o", "%T", check=False).split()
        return states == ["idle"] * self.n_nodes


def _order_of_stop(name: str) -> int:
    return _LAST.index(name) + 1 if name in _LAST else 0


def _started(pid: int) -> int:
    """Return the tick at which a process started: with its id, what tells it from a later one."""
    state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return -1 if state == "Z" else int(rest[18])


def _end(processes: list[list[int]]) -> None:
    for number, seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        alive = [pid for pid, started in processes if _alive(pid, started)]
        for pid in alive:
            _signal(pid, number)
        deadline = time.monotonic() + seconds
        while any(_alive(*process) for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)


def _alive(pid: int, started: int) -> bool:
    try:
        # Reap it if it is our child; a process of an earlier `start` is not.
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        pass
    try:
        return _started(pid) == started
    except OSError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _free_ports(n: int) -> list[int]:
    """Return `n` ports below the range that the kernel gives to clients."""
    found: list[int] = []
    port = 16000 + os.getpid() % 8000
    while len(found) < n:
        port += 1
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def _wait(ready: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {seconds} seconds for {what}")
        time.sleep(0.05)


def main() -> int:
    """Start or stop a cluster from the shell."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("start", "stop"))
    parser.add_argument("dir")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and MariaDB")
    parser.add_argument("--slurm", type=Path, metavar="FOLDER", help="its programs, of newer.py")
    args = parser.parse_args()
    cluster = Cluster(args.dir, nodes=args.nodes, accounting=args.accounting, slurm=args.slurm)
    if args.action == "stop":
        cluster.stop()
        return 0
    try:
        cluster.start()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"export SLURM_CONF={cluster.conf}")
    if args.slurm is not None:
        print(f"export PATH={args.slurm.absolute()}/usr/bin:$PATH")
    return 0


if __name__ == "__main__":
    sys.exit(main())

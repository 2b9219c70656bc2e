"""Runs a real Slurm cluster on this machine: several nodes, accounting, two partitions with preemption, requeue.

    python tools/slurm_cluster.py up          # prints what to export and what to try
    python tools/slurm_cluster.py status
    python tools/slurm_cluster.py down        # stops all of it and removes its folder

It installs Debian's packages where they are missing (root or sudo), and needs neither systemd nor cgroups. Each node is
a `slurmd` of its own with a port of its own; all have this machine's cores and memory. Everything lies in one folder,
except for the packages and the nodes' names in /etc/hosts, which `down` removes.

Measured on two busy cores: `up` 13 s on a machine without the packages, 9 to 15 s with them; `down` 2 to 6 s.
"""

import argparse
import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurmdbd", "slurm-client", "munge", "mariadb-server-core", "mariadb-client-core")
PROGRAMS = (
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "sbatch",
    "munged",
    "mariadbd",
    "mariadb-install-db",
    "my_print_defaults",
)
FOLDER = Path(tempfile.gettempdir()) / "recgpt-slurm"
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# recgpt-slurm"
MARK_FILE = "made-by-slurm_cluster"
"""Lies in the cluster's folder: what has none is not removed."""
MARK, NODE_MARK = "RECGPT_SLURM_CLUSTER", "RECGPT_SLURM_NODE"
"""Variables in the environments of the cluster's daemons: its folder, and the name of the node."""
UP_SECONDS = 60.0
"""Maximum wait for a daemon, and for all nodes to be idle."""
GRACE_SECONDS, KILL_SECONDS, NODE_TIMEOUT = 20, 20, 10
"""Preemption's GraceTime, KillWait of cancelled jobs, and how long a node may be silent before it counts as down."""
REQUEUE_SECONDS = 5
"""How long a requeued job waits before it starts again: Slurm's `cred_expire`, 120 s by default, 5 or more."""


class ClusterError(RuntimeError):
    """The cluster cannot be brought up; the message says why."""


class Cluster:
    """A Slurm cluster whose files all lie in one folder.

    Args:
        folder: where everything lies; its path must be short, because sockets have at most 107 characters.
        nodes: number of nodes; None: as many as the cluster in that folder has, or 2.
    """

    def __init__(self, folder: Path = FOLDER, nodes: int | None = None) -> None:
        self.folder = folder.absolute()
        self.configuration = self.folder / "etc" / "slurm.conf"
        if nodes is None and self.configuration.exists():
            nodes = self.configuration.read_text().count("NodeName=")
        self.names = [f"node{n}" for n in range(1, (nodes or 2) + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment with what Slurm's commands need."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin:/sbin:/bin"
        return {**os.environ, "SLURM_CONF": str(self.configuration), "PATH": path}

    def up(self) -> bool:
        """Bring the cluster up; False if it was up already. What is damaged is stopped, and all of it started anew."""
        with self._alone():
            if self.is_up():
                return False
            self._remove()
            self._install()
            try:
                self._write()
                self._start()
            except BaseException:
                if (self.folder / "log").exists():
                    kept = Path(tempfile.mkdtemp(prefix="recgpt-slurm-log-"))
                    shutil.copytree(self.folder / "log", kept, dirs_exist_ok=True)
                    print(f"slurm_cluster: the daemons' logs are in {kept}", file=sys.stderr)
                self._remove()
                raise
        return True

    def down(self) -> None:
        """Stop all that `up` and its jobs started, and remove the folder and the lines in /etc/hosts."""
        with self._alone():
            self._remove()

    def is_up(self) -> bool:
        """Whether every daemon runs and every node can take jobs."""
        if not self.configuration.exists() or not self._daemons_run():
            return False
        states = self.states()
        return set(states) == set(self.names) and set(states.values()) <= {"idle", "mixed", "allocated", "completing"}

    def states(self) -> dict[str, str]:
        """State of each node by name, as `sinfo` says; empty if the controller does not answer."""
        done = self.run("sinfo", "--noheader", "--Node", "--format", "%N %T")
        return dict(line.split()[:2] for line in done.stdout.splitlines() if line) if done.returncode == 0 else {}

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command in the cluster's environment."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout)

    def job_processes(self, node: str) -> dict[int, dict[str, str]]:
        """Process ids and environments of what jobs run on a node: scripts, launchers and ranks."""
        return {pid: values for pid, values in self._processes() if _job_node(values) == node}

    def has_daemon(self, node: str) -> bool:
        """Whether a node's daemon runs."""
        return any(values.get(NODE_MARK) == node for _, values in self._processes())

    def kill_node(self, name: str) -> None:
        """Kill a node's daemon and all of its jobs' processes at once, as when a machine loses its power."""
        daemons = [pid for pid, values in self._processes() if values.get(NODE_MARK) == name]
        _signal([*daemons, *self.job_processes(name)], signal.SIGKILL)

    def kill_daemon(self, name: str) -> None:
        """Kill one daemon by the name of its file in run/, as `slurmctld` or `slurmd.node1`, and nothing else."""
        _signal([int((self.folder / "run" / f"{name}.pid").read_text())], signal.SIGKILL)

    def start_controller(self) -> None:
        """Start the controller, which finds the jobs as they were."""
        self._daemon("slurmctld", ["slurmctld", "-D", "-f", str(self.configuration)])

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._daemon(f"slurmd.{name}", ["slurmd", "-D", "-N", name, "-f", str(self.configuration)], {NODE_MARK: name})

    # Files

    def _install(self) -> None:
        path = self.environment["PATH"]
        missing = [program for program in PROGRAMS if not shutil.which(program, path=path)]
        if not missing:
            return
        if not shutil.which("apt-get"):
            raise ClusterError(f"{', '.join(missing)} are missing, and there is no apt-get: install Slurm and MariaDB")
        print(f"Installing {' '.join(PACKAGES)} with apt-get", flush=True)
        policy = Path("/usr/sbin/policy-rc.d")  # its status 101: no package may start its service
        made = not policy.exists()
        if made:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            environment = {**self.environment, "DEBIAN_FRONTEND": "noninteractive"}
            for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
                done = subprocess.run(["apt-get", *words], env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise ClusterError(f"apt-get {words[0]} failed: {(done.stderr or done.stdout).strip()}")
        finally:
            if made:
                policy.unlink()

    def _write(self) -> None:
        """Write configuration and keys, with ports that are free now."""
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        (self.folder / MARK_FILE).touch()
        for name in ("etc", "run", "log", "state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        ports = _free_ports(3 + len(self.names))
        self._database_port, password = ports[2], secrets.token_hex(16)
        _write_secret(self.folder / "etc/munge.key", secrets.token_bytes(128))
        start = f"CREATE DATABASE slurm;\nGRANT ALL ON slurm.* TO slurm@'127.0.0.1' IDENTIFIED BY '{password}';\n"
        _write_secret(self.folder / "etc/database.sql", start.encode())
        database = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder}/run/munge.socket",
            "DbdHost": "localhost",
            "DbdPort": ports[1],
            "SlurmUser": "root",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "127.0.0.1",
            "StoragePort": ports[2],
            "StorageUser": "slurm",
            "StoragePass": password,
            "StorageLoc": "slurm",
            "LogFile": self.folder / "log/slurmdbd.log",
            "PidFile": self.folder / "run/slurmdbd.own.pid",
        }
        _write_secret(self.folder / "etc/slurmdbd.conf", _lines(database).encode())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
        controller = {
            "ClusterName": "recgpt",
            "SlurmctldHost": f"{socket.gethostname().split('.')[0]}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder}/run/munge.socket,cred_expire={REQUEUE_SECONDS}",
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool/%n",
            "SlurmctldPidFile": self.folder / "run/slurmctld.own.pid",
            "SlurmdPidFile": self.folder / "run/slurmd.%n.own.pid",
            "SlurmctldLogFile": self.folder / "log/slurmctld.log",
            "SlurmdLogFile": self.folder / "log/slurmd.%n.log",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "SlurmdParameters": "config_overrides",
            "SlurmdTimeout": NODE_TIMEOUT,
            "KillWait": KILL_SECONDS,
            "ReturnToService": 2,
            "JobRequeue": 1,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "bf_interval=2,sched_min_interval=100000,batch_sched_delay=0",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": ports[1],
            "AccountingStoragePass": self.folder / "run/munge.socket",
        }
        cores = max(4, 2 * (os.cpu_count() or 1))  # two jobs of two cores fit on a node of any machine
        nodes = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cores} RealMemory={memory}"
            for name, port in zip(self.names, ports[3:], strict=True)
        ]
        partitions = [
            f"PartitionName=train Nodes=ALL Default=YES PriorityTier=1 GraceTime={GRACE_SECONDS}",
            "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF",
        ]
        self.configuration.write_text(_lines(controller) + "\n".join([*nodes, *partitions, ""]))
        with HOSTS.open("a") as file:
            file.writelines(f"127.0.0.1 {name} {HOSTS_MARK}\n" for name in self.names)

    # Processes

    def _start(self) -> None:
        run, data = self.folder / "run", self.folder / "database"
        wanted = {name: socket.gethostbyname(name) for name in self.names}
        if set(wanted.values()) != {"127.0.0.1"}:
            raise ClusterError(f"the nodes' names belong to other machines: {wanted}")
        self._daemon("munged", self._munged())
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db", "--user=root"]
        done = self.run(*install, "--auth-root-authentication-method=normal", timeout=UP_SECONDS)
        if done.returncode:
            raise ClusterError(f"mariadb-install-db failed: {done.stderr or done.stdout}")
        sizes = [
            "--innodb-buffer-pool-size=64M",
            "--innodb-flush-log-at-trx-commit=0",
            "--innodb-lock-wait-timeout=900",
        ]
        place = [f"--datadir={data}", f"--socket={run}/mariadb.socket", f"--pid-file={run}/mariadbd.own.pid"]
        address = ["--bind-address=127.0.0.1", f"--port={self._database_port}", "--skip-name-resolve"]
        begin = f"--init-file={self.folder}/etc/database.sql"
        self._daemon("mariadbd", ["mariadbd", "--no-defaults", "--user=root", *place, *address, *sizes, begin])
        self._wait("MariaDB", lambda: _answers(self._database_port))
        self._daemon("slurmdbd", ["slurmdbd", "-D"])
        self._wait("slurmdbd", lambda: self.run("sacctmgr", "-i", "add", "cluster", "recgpt").returncode == 0)
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self._wait("all nodes to be idle", lambda: list(self.states().values()) == ["idle"] * len(self.names))

    def _munged(self) -> list[str]:
        run, log = self.folder / "run", self.folder / "log"
        places = [f"--socket={run}/munge.socket", f"--pid-file={run}/munged.own.pid", f"--log-file={log}/munged.log"]
        return ["munged", "-F", *places, f"--seed-file={run}/munge.seed", f"--key-file={self.folder}/etc/munge.key"]

    def _daemon(self, name: str, command: list[str], more: dict[str, str] | None = None) -> None:
        environment = {**self.environment, MARK: str(self.folder), **(more or {})}
        for variable in [name for name in environment if name.startswith(("SLURM_", "SBATCH_", "SRUN_"))]:
            if variable != "SLURM_CONF":
                del environment[variable]
        with open(self.folder / "log" / f"{name}.out", "a") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
            )
        (self.folder / "run" / f"{name}.pid").write_text(str(process.pid))

    def _daemons_run(self) -> bool:
        names = {"munged", "mariadbd", "slurmdbd", "slurmctld", *(f"slurmd.{name}" for name in self.names)}
        marked = {pid for pid, values in self._processes() if values.get(MARK) == str(self.folder)}
        files = {name: self.folder / "run" / f"{name}.pid" for name in names}
        return all(file.exists() and int(file.read_text()) in marked for file in files.values())

    def _wait(self, what: str, is_there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + UP_SECONDS
        while not is_there():
            if time.monotonic() > deadline:
                raise ClusterError(f"waited {UP_SECONDS:.0f} s for {what}; nodes: {self.states()}")
            time.sleep(0.2)

    def _processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        """The processes of the cluster's daemons and jobs, with their environments."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            values = dict(word.split("=", 1) for word in words if "=" in word)
            of_job = values.get("SLURM_CONF") == str(self.configuration) and _job_node(values)
            if (values.get(MARK) == str(self.folder) or of_job) and int(folder.name) != os.getpid():
                yield int(folder.name), values

    def _remove(self) -> None:
        if self.folder.exists() and any(self.folder.iterdir()) and not (self.folder / MARK_FILE).exists():
            raise ClusterError(
                f"{self.folder} holds something else than a cluster: remove it, or give another --folder"
            )
        if self.configuration.exists() and self.states():
            self.run("scancel", "--state=RUNNING")
        for number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            deadline = time.monotonic() + seconds
            _signal([pid for pid, _ in self._processes()], number)
            while time.monotonic() < deadline and any(self._processes()):
                time.sleep(0.1)
        if HOSTS_MARK in HOSTS.read_text():
            lines = [line for line in HOSTS.read_text().splitlines(True) if not line.rstrip().endswith(HOSTS_MARK)]
            HOSTS.write_text("".join(lines))  # in place: in a container the file is a mount
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            raise ClusterError(f"{self.folder} cannot be removed")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else brings a cluster up or down meanwhile."""
        with open(__file__) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _job_node(values: dict[str, str]) -> str | None:
    """The node on which a job's process runs, by its environment."""
    return values.get("SLURMD_NODENAME")


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _lines(values: dict[str, object]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _write_secret(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)


def _free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def main() -> int:
    """Bring the cluster up or down, or say how it is; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where everything lies ({FOLDER})")
    parser.add_argument("--nodes", type=int, help="number of nodes (as many as there are, or 2)")
    options = parser.parse_args()
    cluster = Cluster(options.folder, options.nodes)
    if options.action != "status" and os.geteuid() != 0:
        if not shutil.which("sudo"):
            print("slurm_cluster: needs root (or sudo), to install packages and to run daemons", file=sys.stderr)
            return 2
        os.execvp("sudo", ["sudo", sys.executable, os.path.abspath(__file__), *sys.argv[1:]])
    try:
        if options.action == "down":
            cluster.down()
            print("down")
            return 0
        if options.action == "up":
            print("up" if cluster.up() else "already up")
    except ClusterError as error:
        print(f"slurm_cluster: {error}", file=sys.stderr)
        return 1
    if not cluster.is_up():
        print(f"not up ({cluster.states() or 'no answer'}); python tools/slurm_cluster.py up")
        return 1
    print("  ".join(f"{name}: {state}" for name, state in cluster.states().items()))
    print(f"\nexport SLURM_CONF={cluster.configuration}\n")
    print("sinfo                       # partitions train and urgent; urgent preempts train")
    print("srun -N 2 hostname")
    print("torchx run -s slurm recgpt_torchrec.pretrain -j 2x1 -- --data data/mine --output runs/first")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether this machine has what a run needs: GPUs, cores, memory, shared memory, files, disk, clock, name."""

import os
import resource
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from recgpt_torchrec.diagnosis.finding import Finding, Severity
from recgpt_torchrec.launch.node import available_cores

GIB = 2**30
FILES = 4096
"""Open files that a rank with loader processes, sharded checkpoints and sockets to other ranks may need."""
SHARED = 2**30
"""Bytes of shared memory for loader processes and NCCL; containers have 64 MiB unless they are told otherwise."""
DISK = 2 * GIB
"""Bytes of disk under which a run of any size is short of it."""
SKEW = 2.0
"""Seconds between the clocks of this machine and of its disk from which on file times mislead."""
FIRST_DAY = 1_760_000_000
"""A time, in seconds since 1970, that any clock is past (October 2025)."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use."""

    name: str
    memory: int
    """Bytes."""
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What there is on this machine, as `Machine.here` finds it. Sizes in bytes."""

    cores: int
    """Cores that this process may use, by its affinity and its container."""
    threads: int | None
    """OMP_NUM_THREADS; None: not set."""
    open_files: int
    """Limit of this process."""
    address_space: int | None
    """Limit of this process; None: there is none."""
    memory: int
    """Available to this process, by the machine and the container."""
    shared_memory: int
    """Size of /dev/shm."""
    disks: dict[str, int]
    """Free space by folder: of the output, and for temporary files."""
    writable: bool
    """Whether the output folder, or the nearest one above it that exists, can be written to."""
    now: float
    """Seconds since 1970, by this machine's clock."""
    skew: float
    """Seconds that a new file in the output folder is ahead of it."""
    name: str
    """Of this host."""
    has_address: bool
    """Whether the name can be resolved."""
    driver: str | None
    """Version of NVIDIA's driver; None: none is loaded."""
    cuda: str | None
    """Version of CUDA that torch was built for; None: it is a CPU build."""
    nccl: bool
    """Whether torch can use NCCL."""
    gpus: list[Gpu] = field(default_factory=list)

    @classmethod
    def here(cls, output: str) -> "Machine":
        """This machine; the folder of `output` is tried with a small file that is deleted again."""
        import torch
        import torch.distributed as dist

        from recgpt_torchrec.distributed.memory import available_bytes

        folder = next(each for each in (Path(output).absolute(), *Path(output).absolute().parents) if each.is_dir())
        writable, skew = _try_writing(folder)
        name, space = socket.gethostname(), resource.getrlimit(resource.RLIMIT_AS)[0]
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        threads = os.environ.get("OMP_NUM_THREADS", "")
        return cls(
            cores=available_cores(),
            threads=int(threads) if threads.isdigit() else None,
            open_files=_unlimited(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            address_space=None if space == resource.RLIM_INFINITY else space,
            memory=available_bytes(torch.device("cpu")),
            shared_memory=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
            disks={each: shutil.disk_usage(each).free for each in (str(folder), tempfile.gettempdir())},
            writable=writable,
            now=time.time(),
            skew=skew,
            name=name,
            has_address=_has_address(name),
            driver=_driver(),
            cuda=torch.version.cuda,
            nccl=dist.is_available() and dist.is_nccl_available(),
            gpus=[
                Gpu(properties.name, properties.total_memory, (properties.major, properties.minor))
                for properties in map(torch.cuda.get_device_properties, devices)
            ],
        )


def check_machine(machine: Machine, ranks: int, device: str = "auto", workers: int = 0) -> list[Finding]:
    """Findings about a machine.

    Args:
        machine: as found.
        ranks: number of ranks that are to run on it.
        device: of the run, as in `--device`.
        workers: loader processes of each rank.
    """
    return [
        *_check_gpus(machine, ranks, device),
        _check_cores(machine, ranks * (1 + workers)),
        *_check_memory(machine, workers),
        _at_least("open files", machine.open_files, FILES, "", f"ulimit -n {FILES}, or more, before the run"),
        *_check_disks(machine),
        _check_clock(machine),
        _check_name(machine),
    ]


def _check_gpus(machine: Machine, ranks: int, device: str) -> list[Finding]:
    if not machine.gpus:
        if machine.driver is None:
            found = Finding("ok", "GPU", "none; ranks use the CPU")
            wanted = Finding("error", "GPU", "--device cuda, and there is none", "leave --device out, or use a machine")
            return [wanted if device == "cuda" else found]
        if machine.cuda is None:
            text = f"driver {machine.driver} is loaded, and torch is a CPU build"
            return [Finding("error" if device == "cuda" else "warning", "GPU", text, "install the CUDA build of torch")]
        text = f"driver {machine.driver} is loaded, and torch (CUDA {machine.cuda}) finds no GPU"
        return [Finding("error", "GPU", text, "look at CUDA_VISIBLE_DEVICES, and whether the driver is new enough")]
    sizes = ", ".join(f"{each.name} {each.memory / GIB:,.0f} GiB" for each in machine.gpus)
    findings = [Finding("ok", "GPU", f"{len(machine.gpus)}: {sizes}")]
    if ranks > len(machine.gpus) and device != "cpu":
        text = f"{ranks} ranks on {len(machine.gpus)} GPUs: each rank has a GPU of its own"
        findings.append(Finding("error", "ranks", text, f"start {len(machine.gpus)} ranks on this machine"))
    if any(each.capability < (8, 0) for each in machine.gpus):
        text = "older than Ampere: no bf16, no TF32"
        findings.append(Finding("note", "precision", text, "--train.precision fp32 is what auto takes"))
    if not machine.nccl and ranks > 1:
        cure = "install a build of torch that has it"
        findings.append(Finding("error", "NCCL", "torch has none: GPUs cannot exchange anything", cure))
    return findings


def _check_cores(machine: Machine, processes: int) -> Finding:
    text = f"{machine.cores} for {processes} process{'es' * (processes > 1)}"
    if processes > machine.cores:
        return Finding("warning", "cores", text, "start fewer ranks, or fewer --stream.workers")
    if machine.threads is not None and machine.threads * processes > machine.cores:
        text = f"OMP_NUM_THREADS {machine.threads} for {processes} processes on {machine.cores} cores"
        return Finding("warning", "cores", text, f"export OMP_NUM_THREADS={max(1, machine.cores // processes)}")
    return Finding("ok", "cores", text)


def _check_memory(machine: Machine, workers: int) -> list[Finding]:
    findings = [_at_least("memory", machine.memory, 2 * GIB, "GiB available", "end other programs, or raise the limit")]
    if machine.address_space is not None:
        text = (
            f"address space is limited to {machine.address_space / GIB:,.1f} GiB; mapped files and CUDA count in full"
        )
        findings.append(Finding("warning", "memory", text, "ulimit -v unlimited"))
    needed = bool(workers or machine.gpus)
    if machine.shared_memory < SHARED:
        text = f"/dev/shm has {machine.shared_memory / 2**20:,.0f} MiB; loader processes and NCCL use it"
        cure = "docker run --shm-size=8g; in Kubernetes an emptyDir with medium Memory at /dev/shm"
        findings.append(Finding("warning" if needed else "note", "shared memory", text, cure))
    else:
        findings.append(Finding("ok", "shared memory", f"{machine.shared_memory / GIB:,.1f} GiB"))
    return findings


def _check_disks(machine: Machine) -> list[Finding]:
    findings = []
    for folder, free in machine.disks.items():
        findings.append(_at_least("disk", free, DISK, f"GiB free in {folder}", "free some, or use another disk"))
    if not machine.writable:
        findings.append(Finding("error", "disk", f"{next(iter(machine.disks))} cannot be written to", "give --output"))
    return findings


def _check_clock(machine: Machine) -> Finding:
    date = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(machine.now))
    if machine.now < FIRST_DAY:
        cure = "set it: certificates, logs and times of requests are wrong"
        return Finding("error", "clock", f"says {date}", cure)
    if abs(machine.skew) > SKEW:
        text = f"new files in the output folder are {machine.skew:+.1f} s from it ({date})"
        return Finding("warning", "clock", text, "synchronise the clocks of this machine and of the file server (NTP)")
    return Finding("ok", "clock", date)


def _check_name(machine: Machine) -> Finding:
    if machine.has_address:
        return Finding("ok", "host name", machine.name)
    text = f"{machine.name} has no address: ranks cannot find each other by it"
    return Finding("warning", "host name", text, f"add it to /etc/hosts: 127.0.0.1 {machine.name}")


def _at_least(subject: str, found: int, least: int, unit: str, cure: str) -> Finding:
    """A warning if `found` is less than `least`, an error if it is less than a quarter of it."""
    scale = GIB if unit.startswith("GiB") else 1
    text = f"{found / scale:,.1f} {unit}" if unit else f"at most {found:,}"
    severity: Severity = "ok" if found >= least else "warning" if 4 * found >= least else "error"
    return Finding(severity, subject, text, "" if severity == "ok" else cure)


def _unlimited(limit: int) -> int:
    return 2**62 if limit == resource.RLIM_INFINITY else limit


def _try_writing(folder: Path) -> tuple[bool, float]:
    """Whether a file can be made in a folder, and how many seconds it is ahead of this machine's clock."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            before = time.time()
            file.write(b".")
            file.flush()
            os.fsync(file.fileno())
            return True, os.stat(file.name).st_mtime - before
    except OSError:
        return False, 0.0


def _has_address(name: str) -> bool:
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return False
    return True


def _driver() -> str | None:
    try:
        line = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "of an unknown version")

"""Builds the CPU image without a registry: a base system of Debian's packages, the container file, a trial.

    apt-get install buildah mmdebstrap crun
    python -m tools.build_image --storage DIR

The base system is made once by mmdebstrap, in DIR. buildah then runs the steps of containers/cpu.Dockerfile, and the
image's entry point runs as the image's user: the help of a stage, and the stages of a toy log on two processes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASE, IMAGE = "localhost/debian:bookworm-slim", "localhost/recgpt-torchrec:cpu"
TRIAL = """set -e
id -u | grep -qx 10001
cd /tmp
python - <<'END'
import random
random.seed(1)
with open("log.csv", "w") as file:
    print("user_id,item_id,timestamp", file=file)
    for user in range(60):
        for step in range(12):
            print(user, (user + step * random.choice((1, 1, 2))) % 20, step, sep=",", file=file)
END
python -m recgpt_torchrec prepare --input log.csv --output data --min_count 1
python -m recgpt_torchrec.launch.node --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0 \\
    -m recgpt_torchrec.pretrain --data data --output run --model.dim 16 --train.epochs 1 --batch.tokens 200
python -m recgpt_torchrec evaluate --data data --checkpoint run --output test.json --split test
python -m recgpt_torchrec export --data data --checkpoint run --output vectors
"""
"""Run in the image by bash."""


def buildah(storage: Path, *arguments: str, quiet: bool = False) -> str:
    """Run buildah with its images under `storage`; returns its standard output.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    command = ["buildah", "--root", str(storage / "images"), "--runroot", str(storage / "run")]
    command += ["--storage-driver", "vfs", *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if quiet else None).stdout or ""


def make_base(storage: Path) -> None:
    """Make the image that the container file begins with, of Debian's packages alone."""
    root = storage / "debian.tar"
    if not root.exists():
        storage.mkdir(parents=True, exist_ok=True)
        partial = storage / "debian.partial.tar"
        subprocess.run(["mmdebstrap", "--variant=minbase", "bookworm", str(partial)], check=True)
        partial.rename(root)
    container = buildah(storage, "from", "scratch", quiet=True).strip()
    buildah(storage, "add", container, str(root), "/")
    buildah(storage, "commit", "--rm", container, BASE)


def build(storage: Path, wheels: Path | None) -> None:
    """Run the steps of the container file; pip also takes wheels of a folder, and this machine's certificates."""
    lines, mounts = ["[global]"], []
    if wheels:
        lines.append("find-links = /wheels")
        mounts.append(f"--volume={wheels.resolve()}:/wheels:ro")
    if certificates := os.environ.get("SSL_CERT_FILE"):
        lines.append("cert = /tmp/certificates.crt")
        mounts.append(f"--volume={certificates}:/tmp/certificates.crt:ro")
    (storage / "pip.conf").write_text("\n".join(lines) + "\n")
    mounts.append(f"--volume={storage / 'pip.conf'}:/etc/pip.conf:ro")
    buildah(
        storage, "build", "--isolation=chroot", "--network=host", "--format=docker", f"--build-arg=BASE={BASE}",
        *mounts, "--file", str(ROOT / "containers/cpu.Dockerfile"), "--tag", IMAGE, str(ROOT),
    )  # fmt: skip


def try_image(storage: Path) -> None:
    """Run the entry point's program and a toy run in the image, as its user."""
    container = buildah(storage, "from", IMAGE, quiet=True).strip()
    run = ("run", "--isolation=chroot", "--network=host", "--hostname=localhost", container, "--")
    help_text = buildah(storage, *run, "python", "-m", "recgpt_torchrec", "pretrain", "--help", quiet=True)
    assert "--model.dim" in help_text, help_text
    buildah(storage, *run, "bash", "-c", TRIAL)
    mount = Path(buildah(storage, "mount", container, quiet=True).strip())
    size = subprocess.run(["du", "-sm", str(mount)], check=True, text=True, stdout=subprocess.PIPE).stdout.split()[0]
    print(f"Size of the image, unpacked: {size} MB")
    buildah(storage, "umount", container)
    buildah(storage, "rm", container)


def main() -> int:
    """Build and try the image; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", type=Path, required=True, help="folder for images; 6 GB")
    parser.add_argument("--wheels", type=Path, help="folder of wheels: torch's CPU build, where the index has another")
    arguments = parser.parse_args()
    storage = arguments.storage.resolve()
    for program in ("buildah", "mmdebstrap"):
        if shutil.which(program) is None:
            print(f"tools.build_image: {program} is missing; apt-get install buildah mmdebstrap crun", file=sys.stderr)
            return 2
    steps: dict[str, Callable[[], None]] = {
        "base system": lambda: make_base(storage),
        "container file": lambda: build(storage, arguments.wheels),
        "trial": lambda: try_image(storage),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        step()
        print(f"== {name}: {time.perf_counter() - started:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

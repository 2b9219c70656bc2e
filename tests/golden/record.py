"""Record the golden figures anew: `python -m tests.golden.record`, where a change means to alter the arithmetic.

Commit the new record by itself, with the quality figures that allow it.
"""

import shutil
import tempfile
from pathlib import Path

from tests.golden.stages import all_stages
from tools.ranks import run_ranks

RECORD = Path(__file__).parent / "record"
WORLD_SIZES = (1, 2)


def main() -> None:
    """Run all stages on one rank and on two, and keep what they computed."""
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            run_ranks(all_stages, world_size, Path(folder), timeout=300)
            kept = RECORD / f"{world_size}-ranks"
            kept.mkdir(parents=True, exist_ok=True)
            for name in ("figures.json", "arrays.npz"):
                shutil.copy(Path(folder) / name, kept / name)
                print(f"recorded {kept / name}")


if __name__ == "__main__":
    main()

"""Restore checkpoints of every sharding and number of ranks into every other, and say what came out differently.

    OMP_NUM_THREADS=1 python -m tools.check_reshard

Prints one row a source and target, largest absolute differences over both tables: of the rows, of the optimizer's
moments, and of the losses of the next two steps against those of the run that went on uninterrupted.
"""

import argparse
import itertools
import sys
import tempfile

from tests.distributed.launch import run_ranks
from tests.distributed.reshard import Difference, Layout, reshard

SHARDINGS = ("data_parallel", "table_wise", "column_wise", "row_wise")
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "adam", "sgd")
TOLERANCE = 1e-5


def wrong(difference: Difference) -> bool:
    """Whether anything differs by more than rounding.

    Row-wise Adagrad with other blocks of columns than before goes on from the same loss, and learns on differently.
    """
    figures = [difference.tables, difference.moments, difference.dense, difference.losses[0]]
    if difference.source.blocks() == difference.target.blocks():
        figures.append(difference.losses[1])
    return max(figures) > TOLERANCE


def main() -> int:
    """Check, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--timeout", type=float, default=1200, help="seconds for everything")
    options = parser.parse_args()
    layouts = [Layout(*cell) for cell in itertools.product(options.ranks, SHARDINGS, options.optimizers)]
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(reshard, max(options.ranks), folder, layouts, layouts, timeout=options.timeout)[0]
    print(f"{'optimizer':16} {'from':16} {'to':16} {'tables':>9} {'moments':>9} {'dense':>9} {'loss':>9} {'next':>9}")
    for d in sorted(found, key=lambda d: (d.source.optimizer, d.source, d.target)):
        figures = [d.tables, d.moments, d.dense, *d.losses]
        said = "WRONG" if wrong(d) else "other blocks" if d.source.blocks() != d.target.blocks() else ""
        print(
            f"{d.source.optimizer:16} {d.source!s:16} {d.target!s:16} " + " ".join(f"{x:9.1e}" for x in figures), said
        )
    bad = sum(map(wrong, found))
    print(f"{len(found)} restores, {bad} wrong (more than {TOLERANCE})")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())

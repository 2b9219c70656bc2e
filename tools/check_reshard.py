"""Checks resharding: restores checkpoints of every sharding of one node and number of ranks into every other one.

    OMP_NUM_THREADS=1 python -m tools.check_reshard

Prints one row per source and target: the largest absolute differences of table rows, of the optimizer's moments, of the
dense part, and of the losses of the next two steps, against the uninterrupted run.
"""

import argparse
import itertools
import sys
import tempfile

from tools.ranks import run_ranks
from tools.reshard import Difference, Layout, reshard

SHARDINGS = ("data_parallel", "table_wise", "column_wise", "row_wise")
OPTIMIZERS = ("rowwise_adagrad", "adagrad", "adam", "sgd")
TOLERANCE = 1e-5
ROUNDED = 1e-3
"""Of losses, where float16 tables take part: gradients that differ in the last digit may round a weight otherwise."""


def is_wrong(difference: Difference) -> bool:
    """Whether anything differs by more than rounding.

    If the number of column blocks changes, the first loss of row-wise Adagrad is the same, but its updates differ; so
    do those of groups of ranks that average their tables. If the precision changes, tables are compared as the target
    rounds them.
    """
    source, target = difference.source, difference.target
    exact, rounded = [difference.tables, difference.moments, difference.dense], [0.0]
    (exact if source.precision == target.precision else rounded).append(difference.losses[0])
    if source.blocks() == target.blocks() and source.shard_ranks == target.shard_ranks:
        half = "fp16" in (source.precision, target.precision)
        (rounded if half else exact).append(difference.losses[1])
    return max(exact) > TOLERANCE or max(rounded) > ROUNDED


def main() -> int:
    """Restore every pair of layouts, print the differences, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--optimizers", nargs="+", default=OPTIMIZERS, choices=OPTIMIZERS)
    parser.add_argument("--timeout", type=float, default=1200, help="time limit in seconds")
    options = parser.parse_args()
    layouts = [Layout(*choice) for choice in itertools.product(options.ranks, SHARDINGS, options.optimizers)]
    with tempfile.TemporaryDirectory() as folder:
        differences = run_ranks(reshard, max(options.ranks), folder, layouts, layouts, timeout=options.timeout)[0]
    print(f"{'optimizer':16} {'from':16} {'to':16} {'tables':>9} {'moments':>9} {'dense':>9} {'loss':>9} {'next':>9}")
    for d in sorted(differences, key=lambda d: (d.source.optimizer, d.source, d.target)):
        values = [d.tables, d.moments, d.dense, *d.losses]
        verdict = "WRONG" if is_wrong(d) else "other blocks" if d.source.blocks() != d.target.blocks() else ""
        print(
            f"{d.source.optimizer:16} {d.source!s:16} {d.target!s:16} " + " ".join(f"{x:9.1e}" for x in values),
            verdict,
        )
    wrong_count = sum(map(is_wrong, differences))
    print(f"{len(differences)} restores, {wrong_count} wrong (more than {TOLERANCE})")
    return wrong_count > 0


if __name__ == "__main__":
    sys.exit(main())

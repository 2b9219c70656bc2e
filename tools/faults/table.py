"""The table of faults and moments: whom a cell names, a line per cell, and a matrix in Markdown."""

from typing import Any

from tools.faults.injecting import FAULTS, Fault
from tools.faults.jobs import MOMENTS, failures_in
from tools.faults.nodes import address

UNNOTICED_SECONDS = 25.0
"""Waits are compared every 10 s at least, and first with those of the comparison before."""
Cells = dict[tuple[str, str], dict[str, Any]]
"""Values of `node_faults.run_cell` by the names of fault and moment."""


def name_culprit(values: dict[str, Any], fault: Fault) -> str:
    """The first line that says whose fault it was; empty: none does."""
    # Before the ranks have met, a launcher knows the node that serves the job's store by its address alone.
    words = fault.names or (f"rank {fault.node}", f"node{fault.node}", address(fault.node or 0))
    survivors = [0, 1] if fault.names or values["statuses"] == [0, 0] else [1 - (fault.node or 0)]
    for node in survivors:
        for line in failures_in(values["said"][node]):
            text = line.split(f" rank {node}: ", 1)[-1]
            if any(word in text for word in words):
                return text
    return ""


def show_cells(cells: Cells) -> str:
    """A line for each cell."""
    lines = []
    for (fault, moment), values in cells.items():
        named = name_culprit(values, FAULTS[fault]) or ("" if _is_unnoticed(values, FAULTS[fault]) else "NOBODY")
        seconds = f"{values['seconds']:.1f} s" if values["ended"] else "never"
        result = "DIFFERS" if values["differences"] else "HALF" if values.get("half") else "equal"
        statuses = ", ".join("killed" if each is None or each == -9 else str(each) for each in values["statuses"])
        trace = f" [{values['tracebacks']} tracebacks]" * bool(values["tracebacks"])
        text = "the fault did not happen" if not values["happened"] else named[:150]
        lines.append(f"{fault:22}{moment:17}{seconds:>8}  {statuses:14}{result:10}{text}{trace}")
    return "\n".join(lines)


def _is_unnoticed(values: dict[str, Any], fault: Fault) -> bool:
    """Whether a fault needs not be named: a wrong clock, or a node that was slow for less than two comparisons."""
    return bool(fault.hours) or (fault.goes_on and values["seconds"] < UNNOTICED_SECONDS)


def what_is_wrong(values: dict[str, Any], fault: Fault) -> str:
    """What a cell shows to be wrong; empty: nothing."""
    wrong = {
        "did not happen": not values["happened"],
        "never ends": not values["ended"],
        "names nobody": not _is_unnoticed(values, fault) and not name_culprit(values, fault),
        "differs": bool(values["differences"]),
        "half a result": bool(values.get("half")),
        "traceback": bool(values["tracebacks"]),
        "does not go on": fault.goes_on and values["statuses"] != [0, 0],
    }
    return ", ".join(name for name, is_so in wrong.items() if is_so)


def find_faulty(cells: Cells) -> list[str]:
    """The cells that show something to be wrong, one line each."""
    faulty = {cell: what_is_wrong(values, FAULTS[cell[0]]) for cell, values in cells.items()}
    return [f"{fault}, {moment}: {wrong}" for (fault, moment), wrong in faulty.items() if wrong]


def show_matrix(cells: Cells) -> str:
    """The table in Markdown: seconds until all processes had ended, and what is wrong."""
    columns = [name for name in MOMENTS if any(moment == name for _, moment in cells)]
    lines = [f"| fault | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for fault in FAULTS:
        row = []
        for moment in columns:
            values = cells.get((fault, moment))
            text = "" if values is None else "goes on" if values["statuses"] == [0, 0] else f"{values['seconds']:.0f} s"
            wrong = "" if values is None else what_is_wrong(values, FAULTS[fault])
            row.append(f"{text}: {wrong}" if wrong else text)
        if any(row):
            lines.append(f"| {fault} | {' | '.join(row)} |")
    return "\n".join(lines)

"""Runs the commands and the Python code of README.md and docs/, page by page, each in a scratch folder.

    python -m tools.documented                      # the pages that CI runs
    python -m tools.documented --all                # also what is run by hand (some minutes)
    python -m tools.documented docs/tutorial.md --show

What a page assumes is in `pages.py` and `files.py`. A command is typed as the page shows it, except that the service
gets a free port. The exit status is 0 if every command's was.
"""

import argparse
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tools.documented.pages import PAGES
from tools.documented.running import CommandFailed, run_page
from tools.stage_process import preload


def main() -> int:
    """Run pages, several at once, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="such as docs/daily.md; none: all that CI runs")
    parser.add_argument("--all", action="store_true", help="also pages and blocks that are run by hand")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for the scratch folders, to look at")
    parser.add_argument("--show", action="store_true", help="print what commands say")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="pages at the same time")
    given = parser.parse_args()
    unknown = set(given.pages) - set(PAGES)
    if unknown:
        parser.error(f"tools/documented/pages.py has no {min(unknown)}")
    waiting = [
        name
        for name, page in PAGES.items()
        if (name in given.pages or not given.pages)
        and not page.elsewhere
        and (given.all or given.pages or not page.by_hand)
    ]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.monotonic()
    preload()
    failed: list[str] = []
    running: dict[int, str] = {}
    count = len(waiting)
    while waiting or running:
        while waiting and len(running) < given.jobs:
            name = waiting.pop(0)
            sys.stdout.flush()
            child = os.fork()
            if not child:
                os._exit(run_in_scratch(name, given))
            running[child] = name
        child, code = os.wait()
        if code:
            failed.append(running[child])
        del running[child]
    print(f"{count} pages in {time.monotonic() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


def run_in_scratch(name: str, given: argparse.Namespace) -> int:
    """Run a page in a folder that is gone afterwards, unless it is kept; returns an exit status."""
    everything = given.all or bool(given.pages)
    try:
        with tempfile.TemporaryDirectory(prefix="recgpt-page-") as temporary:
            folder = given.keep.resolve() / Path(name).stem if given.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=not given.keep)
            run_page(name, PAGES[name], folder, all_blocks=everything, show=given.show)
    except CommandFailed as error:
        print(f"FAILED {error}", flush=True)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

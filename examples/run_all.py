"""Run every example and notebook at its own size, offline, two at a time, with a line for each.

python examples/run_all.py
python examples/run_all.py --quick    # the small settings that the tests use

What they print goes to .cache/examples, one file for each. `make examples` runs this.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LOGS = HERE.parent / ".cache" / "examples"
HELPERS = {"local_models.py", "run_all.py", "run_notebook.py", "small_t5.py"}


def all_of_them() -> list[list[Path]]:
    """What runs, one list for each that may run beside the others, the longest first."""
    scripts = sorted(path for path in HERE.glob("*.py") if path.name not in HELPERS)
    notebooks = sorted((HERE / "notebooks").glob("*.ipynb"))
    # the tweets' notebooks hand files to one another
    story = [path for path in notebooks if "positive_tweets" in path.stem]
    return [story, *([path] for path in (*notebooks, *scripts) if path not in story)]


def run(path: Path, quick: bool) -> tuple[bool, float]:
    """Whether it ended well, and the seconds that it took."""
    start = time.perf_counter()
    notebook = [str(HERE / "run_notebook.py")] if path.suffix == ".ipynb" else []
    command = [sys.executable, *notebook, str(path), *(["--quick"] if quick else [])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (LOGS / f"{path.stem}.log").open("w") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    return done.returncode == 0, time.perf_counter() - start


def main() -> int:
    """Runs all; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small settings")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    args = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    chains = all_of_them()
    total, start = sum(map(len, chains)), time.perf_counter()
    done: list[bool] = []

    def run_chain(paths: list[Path]) -> None:
        for path in paths:
            well, seconds = run(path, args.quick)
            done.append(well)
            end = "" if well else f", FAILED: see {(LOGS / path.stem).relative_to(HERE.parent)}.log"
            print(f"[{len(done)}/{total}] {path.name}: {seconds:.0f} s{end}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(run_chain, chains))
    print(f"{sum(done)} of {total} ran, in {(time.perf_counter() - start) / 60:.1f} minutes")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())

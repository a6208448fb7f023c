"""Run every example at its own size, offline, two at a time, with a line for each.

python examples/run_all.py
python examples/run_all.py --quick    # the small settings that the tests use

What they print goes to .cache/examples, one file for each. `make examples` runs this.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent
LOGS = HERE.parent / ".cache" / "examples"
HELPERS = {"local_models.py", "run_all.py", "small_t5.py"}


def run(path: Path, quick: bool) -> tuple[Path, bool, float]:
    """Whether it ended well, and the seconds that it took."""
    start = time.perf_counter()
    command = [sys.executable, str(path), *(["--quick"] if quick else [])]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (LOGS / f"{path.stem}.log").open("w") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    return path, done.returncode == 0, time.perf_counter() - start


def main() -> int:
    """Runs all; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small settings")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time")
    args = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in HERE.glob("*.py") if path.name not in HELPERS)
    start, failed = time.perf_counter(), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, path, args.quick) for path in paths]
        for number, done in enumerate(as_completed(runs), 1):
            path, well, seconds = done.result()
            failed += not well
            word = "ran" if well else f"FAILED, see {LOGS / path.stem}.log"
            print(f"[{number}/{len(paths)}] {path.name}: {word}, {seconds:.0f} s", flush=True)
    print(f"{len(paths)} examples in {(time.perf_counter() - start) / 60:.1f} minutes")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Build the models that demos, tests and evaluations run: python -m kvplug_evals.models"""

import argparse
import time
from pathlib import Path

from kvplug_evals.models.recall import build_recall_model
from kvplug_evals.models.smollm2 import build_smollm2

BUILDERS = {"recall": build_recall_model, "smollm2": build_smollm2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".models"), help="default: .models")
    parser.add_argument("--rebuild", action="store_true", help="also what is there already")
    options = parser.parse_args()
    for name, build in BUILDERS.items():
        folder = options.out / name
        if folder.exists() and not options.rebuild:
            print(f"{folder}: already there")
            continue
        print(f"{folder}: building ...", flush=True)
        started = time.monotonic()
        build(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*")) / 1e6
        print(f"{folder}: {size:.0f} MB in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

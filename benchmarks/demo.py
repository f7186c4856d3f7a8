"""How long `make demo` takes in a clean clone, the installation of torch included. The clone stays.

python benchmarks/demo.py benchmarks/results/demo.json NEW_FOLDER
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from morex.study.bench import write_json

ROOT = Path(__file__).parents[1]


def main() -> None:
    target, clone = Path(sys.argv[1]), Path(sys.argv[2])
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    start = time.perf_counter()
    subprocess.run(["make", "demo"], cwd=clone, check=True)
    seconds = time.perf_counter() - start
    results = json.loads((clone / "studies" / "demo" / "results.json").read_text())
    trained = sum(cell["summary"]["seconds"] for cell in results["cells"])
    row = {"command": "make demo", "seconds": seconds, "variants": len(results["rows"]), "training_seconds": trained}
    print(f"make demo: {seconds:.0f} s, {row['variants']} variants, {trained:.0f} s of them training")
    write_json(target, [row], ["python", "benchmarks/demo.py", str(target), "NEW_FOLDER"])


if __name__ == "__main__":
    main()

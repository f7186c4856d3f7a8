"""How long `morex --help` takes, and what `import morex` adds to `import torch`; medians of whole processes.

python benchmarks/startup.py [benchmarks/results/startup.json]
"""

import statistics
import subprocess
import sys
import time

from morex.study.bench import write_json

RUNS = 7
COMMANDS = {
    "morex --help": ["-m", "morex", "--help"],
    "import torch": ["-c", "import torch"],
    "import torch, morex": ["-c", "import torch, morex"],
}


def seconds(words: list[str]) -> float:
    """Seconds of one interpreter from its start to its end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, words in COMMANDS.items():
            taken[name].append(seconds(words))
    rows = [{"command": name, "seconds": statistics.median(values), "runs": RUNS} for name, values in taken.items()]
    for row in rows:
        print(f"{row['command']:22s} {row['seconds']:.2f} s")
    if len(sys.argv) > 1:
        write_json(sys.argv[1], rows, ["python", *sys.argv])


if __name__ == "__main__":
    main()

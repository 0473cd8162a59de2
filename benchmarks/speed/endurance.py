"""Does a long run grow? Memory and open files of a run of train.py, from its first steps to its last.

    python -m benchmarks.endurance --steps 5000

The run is one of the demo task, with evaluations and checkpoints on the way. Reads /proc, so it needs Linux.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--blocks", default="2,2,2")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [sys.executable, str(ROOT / "train.py"), "--blocks", args.blocks, "--batch-size", str(args.batch_size)]
        command += ["--epochs", str(args.steps * args.batch_size / 24000), "--eval-every", "100", "--out", str(out)]
        samples: list[tuple[int, int, int]] = []  # step, bytes, open files
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
            while run.poll() is None:
                time.sleep(0.2)
                if (step := last_step(out / "metrics.jsonl")) > (samples[-1][0] if samples else 0):
                    proc = Path("/proc") / str(run.pid)
                    try:
                        resident = int((proc / "statm").read_text().split()[1]) * 4096
                        samples.append((step, resident, len(list((proc / "fd").iterdir()))))
                    except OSError:  # it has just ended
                        break
    print("| step | memory, MiB | open files |\n|---|---|---|")
    for step, resident, files in samples[:: max(1, len(samples) // 12)] + samples[-1:]:
        print(f"| {step:,} | {resident / 2**20:.1f} | {files} |")
    fifth, end = next(s for s in samples if s[0] >= samples[-1][0] / 5), samples[-1]
    print(f"\nfrom step {fifth[0]:,} to {end[0]:,}: {(end[1] - fifth[1]) / 2**20:+.1f} MiB, {end[2] - fifth[2]:+d} open files")
    sys.exit(run.returncode)


def last_step(log: Path) -> int:
    """The newest step in metrics.jsonl; 0 where there is none."""
    try:
        return int(json.loads(log.read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, IndexError, KeyError):
        return 0


if __name__ == "__main__":
    main()

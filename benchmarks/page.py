"""Sends hostile requests to the page, an honest one behind each, then ends it with SIGTERM.

    python benchmarks/page.py [--count 200] [--seed 0]

The command runs as a user starts it, with two steps as its default. It prints how the requests were answered, how many
were answered with a traceback (by the server, or into its log) or left it hanging, the longest time for which an honest
request had to wait for a hostile one, the most bytes that lay in the page's folder, and the bytes that are left.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from testing import ROOT
from testing.hostile_requests import Attack


def main() -> None:
    """Runs the benchmark and prints its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log, most = Path(folder, "log"), 0
        environment = os.environ | {"GRADIO_TEMP_DIR": f"{folder}/files", "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "dit4sr_pl.app", "port=0", "sampler.steps=2"]
        with log.open("w") as errors:
            server = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=folder
            )
        attack = Attack(server.stdout.readline().strip(), arguments.seed)
        try:
            running = threading.Thread(target=attack.run, args=(arguments.count,))
            running.start()
            while running.is_alive():
                most = max(most, size_of(Path(folder, "files")))
                time.sleep(0.2)
        finally:
            start = time.monotonic()
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        seconds, logged = time.monotonic() - start, log.read_text()
        for answer, number in sorted(attack.answered.items()):
            print(f"{number:4}  {answer}")
        for line in attack.wrong:
            print("wrong:", line)
        tracebacks = logged.count("Traceback")
        print(
            f"{arguments.count} hostile requests: {len(attack.wrong)} answered wrongly, {tracebacks} tracebacks logged"
        )
        print(
            f"longest hold of the worker: {attack.longest_hold:.1f} s (honest requests take {min(attack.waits):.1f} s)"
        )
        print(f"bytes in the page's folder: {most} at most, {size_of(Path(folder, 'files'))} after SIGTERM")
        print(f"ended {seconds:.1f} s after SIGTERM with code {code}")
        print(logged, end="")
    sys.exit(bool(attack.wrong or tracebacks))


def size_of(folder: Path) -> int:
    """Returns the bytes of all files below a folder, from which files go meanwhile."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size += Path(parent, name).stat().st_size
    return size


if __name__ == "__main__":
    main()

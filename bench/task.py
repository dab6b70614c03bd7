"""The program of one task of `layerfs.bench.tasks`, run by its path: it imports little, for a hundred are started.

``task.py WORK DIRECTORY`` reads a line with the names of its files, with tabs between, and says that it is ready with
an empty line. For each further line it does its work and answers with how much that was, and its seconds of processor
time.
"""

import os
import sys
import time
from collections.abc import Sequence


def walk(root: str, names: Sequence[str]) -> int:  # noqa: ARG001 - it finds them
    """Ask for the attributes of every file below ``root``."""
    seen = 0
    for place, _, files in os.walk(root):
        for name in files:
            os.stat(os.path.join(place, name), follow_symlinks=False)
            seen += 1
    return seen


def append(root: str, names: Sequence[str]) -> int:
    """Append a line to each of the files."""
    for name in names:
        with open(os.path.join(root, name), "ab", buffering=0) as file:
            file.write(b"one more line\n")
    return len(names)


if __name__ == "__main__":
    work = {"walk": walk, "append": append}[sys.argv[1]]
    names = sys.stdin.readline().split()
    print(flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        done = work(sys.argv[2], names)
        print(done, time.process_time() - begin, flush=True)

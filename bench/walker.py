"""The program of one task of tree-walk, run by its path: it imports nothing, for a hundred of it are started at a time.

``walker.py DIRECTORY`` says that it is ready with an empty line. For each line that it gets, it walks the directory,
with the attributes of every file, and answers with how many there were and with its seconds of processor time.
"""

import os
import sys
import time


def walk(root: str) -> int:
    seen = 0
    for place, _, files in os.walk(root):
        for name in files:
            os.stat(os.path.join(place, name), follow_symlinks=False)
            seen += 1
    return seen


if __name__ == "__main__":
    print(flush=True)
    for _ in sys.stdin:
        begin = time.process_time()
        seen = walk(sys.argv[1])
        print(seen, time.process_time() - begin, flush=True)

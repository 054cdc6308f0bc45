"""usage: launch.py DESCRIPTOR,... COMMAND...: become the command, with those from 3 on, for it."""

import os
import sys

numbers = [int(number) for number in sys.argv[1].split(",")]
kept = [os.dup(number) for number in numbers]  # none of them may be overwritten below
while min(kept) < 3 + len(kept):
    kept = [os.dup(number) for number in kept]
for number in numbers:
    os.close(number)
for place, number in enumerate(kept, start=3):
    os.dup2(number, place)
os.environ.setdefault("LISTEN_PID", str(os.getpid()))
os.environ["LISTEN_FDS"] = str(len(kept))
os.execv(sys.argv[2], sys.argv[2:])

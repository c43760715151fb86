"""Takes known amounts of memory on request, for the test of the memory probe.

Reads one command a line, does it, and answers `done`:
  anonymous MIB     touches so much memory and keeps it
  file PATH         maps the file and reads every page of it
  fork MIB          forks a child that shares everything and writes to so much of the kept memory, and lives on
  child-spike MIB   the same child takes so much for 50 ms
  spike MIB         takes so much for 50 ms
  reap              ends the child
"""

import mmap
import os
import sys
import time

MIB = 1 << 20
PAGE = 4096
HOLD_SECONDS = 0.05

kept = []


def touched(mebibytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, mebibytes * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = b"\1" * MIB
    for offset in range(0, len(memory), MIB):
        memory[offset : offset + MIB] = block
    return memory


def spike(mebibytes: int) -> None:
    memory = touched(mebibytes)
    time.sleep(HOLD_SECONDS)
    memory.close()


def child(mebibytes: int, orders: int, answers: int) -> None:
    block = b"\2" * MIB
    for offset in range(0, mebibytes * MIB, MIB):
        kept[0][offset : offset + MIB] = block
    os.write(answers, b".")
    while order := os.read(orders, 8):
        spike(int.from_bytes(order, "little"))
        os.write(answers, b".")
    os._exit(0)


def main() -> None:
    orders = answers = None
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "anonymous":
            kept.append(touched(int(rest[0])))
        elif command == "file":
            with open(rest[0], "rb") as file:
                memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            sum(memory[::PAGE])
            kept.append(memory)
        elif command == "spike":
            spike(int(rest[0]))
        elif command == "fork":
            (from_parent, orders), (answers, to_parent) = os.pipe(), os.pipe()
            if os.fork() == 0:
                os.close(orders)
                child(int(rest[0]), from_parent, to_parent)
            os.close(from_parent)
            os.read(answers, 1)
        elif command == "child-spike":
            os.write(orders, int(rest[0]).to_bytes(8, "little"))
            os.read(answers, 1)
        elif command == "reap":
            os.close(orders)
            os.wait()
        print("done", flush=True)


main()

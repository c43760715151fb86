"""A sound engine with a fault: `faulty_engine.py FAULT COMMAND...` passes the protocol's lines on to COMMAND and back, until
the fault is due.

    print     a library's words come before the reply to a training step
    die       ends in the middle of the second training step
    never     does not answer the second training step
    order     answers a training step with the id of another call
    version   speaks another version of the protocol
    leak=FILE starts a process that leaves its group, makes a temporary folder, writes the number of the one and the path of
              the other to FILE, and dies in the second training step
"""

import json
import subprocess
import sys
import tempfile
import time

fault, _, file = sys.argv[1].partition("=")
engine = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
steps = 0
for line in sys.stdin:
    method = json.loads(line)["method"]
    steps += method == "train_step"
    if method == "load" and fault == "leak":
        stray = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        with open(file, "w") as out:
            out.write(f"{stray.pid}\n{tempfile.mkdtemp()}")
    if steps == 2 and fault in ("die", "leak"):
        engine.kill()
        sys.exit("the framework fell over")
    if steps == 2 and fault == "never":
        time.sleep(600)
    engine.stdin.write(line)
    engine.stdin.flush()
    reply = engine.stdout.readline()
    if method == "train_step" and fault == "print":
        print("Some library: 3.0 GB of kernels were compiled")
    if method == "train_step" and fault == "order":
        reply = json.dumps({**json.loads(reply), "id": 7}) + "\n"
    if method == "hello" and fault == "version":
        told = json.loads(reply)
        told["result"]["protocol"] = 9
        reply = json.dumps(told) + "\n"
    sys.stdout.write(reply)
    sys.stdout.flush()
engine.stdin.close()
sys.exit(engine.wait())

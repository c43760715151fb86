"""Says hello, and knows nothing else."""

import json
import sys

HELLO = {
    "protocol": 1,
    "engine": "greeting",
    "engine_version": "1",
    "framework": "none",
    "framework_version": "1",
    "device": {"kind": "cpu", "name": "CPU", "software": False},
    "compute_dtype": "f32",
    "threads": 1,
    "features": [],
    "quantizations": ["none"],
}

for line in sys.stdin:
    call = json.loads(line)
    unsupported = {"error": {"kind": "unsupported", "message": call["method"]}}
    reply = {"result": HELLO} if call["method"] == "hello" else unsupported
    print(json.dumps({"id": call["id"], **reply}), flush=True)

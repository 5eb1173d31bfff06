#!/usr/bin/env python3
"""A reward program: reads one JSON object a line on stdin, writes one a line on stdout.

1 for the right number; for another number, up to 0.5 the nearer it is; 0 for anything else. The partial credit gives the
first steps something to learn from. Try it alone:
    echo '{"id": 0, "response": "41", "answer": "43"}' | examples/smollm2/reward.py
"""
import json
import re
import sys

for line in sys.stdin:
    job = json.loads(line)
    match = re.fullmatch(r"\s*(-?\d{1,6})\s*", job["response"])
    error = abs(int(match.group(1)) - int(job["answer"])) if match else None
    if error is None:
        score, reason = 0.0, "not a number"
    elif error == 0:
        score, reason = 1.0, "right"
    else:
        score, reason = 0.5 * max(0.0, 1.0 - error / 50), f"off by {error}"
    print(json.dumps({"id": job["id"], "score": score, "reason": reason}), flush=True)

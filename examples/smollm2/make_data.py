#!/usr/bin/env python3
"""Writes two-digit arithmetic questions beside this file: train.jsonl (2,048) and test.jsonl (128), no question twice.

    examples/smollm2/make_data.py
"""
import json
import pathlib
import random

HERE = pathlib.Path(__file__).resolve().parent


def questions():
    for a in range(10, 100):
        for b in range(10, 100):
            yield f"What is {a} + {b}?", a + b
            if a > b:
                yield f"What is {a} - {b}?", a - b


def main():
    rows = list(questions())
    random.Random(1).shuffle(rows)
    for name, part in (("train", rows[128 : 128 + 2048]), ("test", rows[:128])):
        lines = [json.dumps({"prompt": p, "answer": str(n)}) + "\n" for p, n in part]
        (HERE / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes two-digit arithmetic questions beside this file: train.jsonl (2,048) and test.jsonl (128), no question twice.

Each prompt is a short conversation: two answered examples, then the question, so that the model answers with a number.

    examples/smollm2/make_data.py
"""
import json
import pathlib
import random

HERE = pathlib.Path(__file__).resolve().parent
SHOTS = [("31 + 25 =", "56"), ("58 - 17 =", "41")]


def questions():
    for a in range(10, 100):
        for b in range(10, 100):
            yield f"{a} + {b} =", a + b
            if a > b:
                yield f"{a} - {b} =", a - b


def messages(question):
    turns = [{"role": "system", "content": "You are a calculator. Answer with the number only."}]
    for shot, answer in SHOTS:
        turns += [{"role": "user", "content": shot}, {"role": "assistant", "content": answer}]
    return turns + [{"role": "user", "content": question}]


def main():
    shots = {question for question, _ in SHOTS}
    rows = [(q, n) for q, n in questions() if q not in shots]
    random.Random(1).shuffle(rows)
    for name, part in (("train", rows[128 : 128 + 2048]), ("test", rows[:128])):
        lines = [json.dumps({"prompt": messages(q), "answer": str(n)}) + "\n" for q, n in part]
        (HERE / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()

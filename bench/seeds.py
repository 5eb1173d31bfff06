#!/usr/bin/env python3
"""Trains the demo with OFT and LoRA and several seeds, and prints the table of docs/BENCHMARKS.md.

    bench/seeds.py [--seeds 1,2,3] [--kinds oft,lora] [--config FILE] [--set key=value]...

--set train.steps=N changes the number of steps.

Accuracy is greedy, on all rows of the config's data.eval.
"""
import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
ADAPTERS = {
    "oft": ["adapter.kind=oft", "adapter.block_size=32", "train.lr=1e-3"],
    "lora": ["adapter.kind=lora", "adapter.rank=16", "adapter.alpha=32", "train.lr=2e-3"],
}


def run(config, kind, seed, overrides, folder):
    command = [str(ROOT / "build/orbit"), "train", config, "--run", str(folder)]
    for item in ADAPTERS[kind] + [f"seed={seed}"] + overrides:
        command += ["--set", item]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads((folder / "summary.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "examples/demo/run.toml"))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--kinds", default="oft,lora")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    print("| adapter | seed | before | after | steps | training seconds | parity |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for kind in args.kinds.split(","):
            for seed in args.seeds.split(","):
                folder = pathlib.Path(scratch) / f"{kind}-{seed}"
                s = run(args.config, kind, seed, args.set, folder)
                print(
                    f"| {kind} | {seed} | {s['accuracy_before']:.3f} | {s['accuracy_after']:.3f} | {s['steps']} "
                    f"| {s['seconds']:.1f} | {s['parity_mismatches']} |",
                    flush=True,
                )
                shutil.rmtree(folder)


if __name__ == "__main__":
    main()

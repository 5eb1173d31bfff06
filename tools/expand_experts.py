#!/usr/bin/env python3
"""Writes an adapter whose experts are stacked (docs/ADAPTERS.md) with one tensor per expert, as PEFT names them.

    tools/expand_experts.py runs/NAME/adapter OUT [EXPERTS]

Shared parts are copied. EXPERTS, the experts of a layer, is needed only when nothing in a layer is an expert's own.
Needs Python only.
"""

import json
import pathlib
import re
import shutil
import struct
import sys

LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
STACKED = re.compile(r"(.*\.experts)\.(w[123])\.(lora_A|lora_B|oft_R)\.weight")


def read_safetensors(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    return {name: (entry["dtype"], entry["shape"], data[start + entry["data_offsets"][0]:start + entry["data_offsets"][1]])
            for name, entry in header.items()}


def write_safetensors(path, tensors):
    header = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in sorted(tensors.items()):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, (_, _, data) in sorted(tensors.items()):
            file.write(data)


def expand(tensors, least):
    matches = {name: STACKED.fullmatch(name) for name in tensors}
    experts = {}
    for name, match in matches.items():
        if match:
            experts[match[1]] = max(experts.get(match[1], least), tensors[name][1][0])
    for group, count in experts.items():
        if count == 1 and least == 0:
            sys.exit(f"{group}: the number of experts cannot be seen in the file; give it as the third argument.")
    result = {}
    for name, (dtype, shape, data) in tensors.items():
        match = matches[name]
        if not match:
            result[name] = (dtype, shape, data)
            continue
        size = len(data) // shape[0]
        for expert in range(experts[match[1]]):
            at = size * (expert if shape[0] > 1 else 0)
            result[f"{match[1]}.{expert}.{LEAVES[match[2]]}.{match[3]}.weight"] = (dtype, shape[1:], data[at:at + size])
    return result


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    source, target = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "adapter_config.json", target / "adapter_config.json")
    least = int(sys.argv[3]) if len(sys.argv) == 4 else 0
    tensors = expand(read_safetensors(source / "adapter_model.safetensors"), least)
    write_safetensors(target / "adapter_model.safetensors", tensors)
    print(f"{len(tensors)} tensors in {target}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Includes go down the layer line only, and no two files include each other in a circle.

A bar means that neither side includes the other. The line is the one of ARCHITECTURE.md.
"""
import collections
import pathlib
import re
import sys

LINE = (
    "base < text | device < data | quant < ops < reward | adapter < model < rollout | train"
    " < rl < run < serve < cli"
)
# Each of these costs seconds of compile time per file, so none may reach a header.
HEAVY_HEADERS = ("nlohmann/json.hpp", "toml++/toml.h", "CLI/CLI.hpp")
INCLUDE = re.compile(r'^\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', re.M)


def ranks():
    return {
        layer.strip(): rank
        for rank, group in enumerate(LINE.split("<"))
        for layer in group.split("|")
    }


def includes(src, path):
    """Pairs (line, name) of the files that `path` includes."""
    text = path.read_text(encoding="utf-8")
    for match in INCLUDE.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match.group(1) or match.group(2)


def find_cycle(graph):
    state = {}
    for start in graph:
        if start in state:
            continue
        stack = [(start, iter(graph[start]))]
        state[start] = "open"
        while stack:
            node, rest = stack[-1]
            following = next(rest, None)
            if following is None:
                state[node] = "done"
                stack.pop()
            elif state.get(following) == "open":
                names = [name for name, _ in stack]
                return names[names.index(following):] + [following]
            elif following in graph and following not in state:
                state[following] = "open"
                stack.append((following, iter(graph[following])))
    return None


def check(src):
    rank = ranks()
    problems = []
    graph = collections.defaultdict(list)
    for path in sorted(p for p in src.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        name = path.relative_to(src).as_posix()
        layer = name.split("/")[0]
        if layer not in rank:
            problems.append(f"src/{name}: the folder {layer}/ is not on the layer line")
            continue
        for line, target in includes(src, path):
            where = f"src/{name}:{line}"
            if target in HEAVY_HEADERS and path.suffix in (".h", ".cuh"):
                problems.append(f"{where}: {target} belongs into .cpp files only")
            other = target.split("/")[0]
            if not (src / target).is_file():
                if other in rank:
                    problems.append(f"{where}: there is no src/{target}")
                continue
            graph[name].append(target)
            if other != layer and rank[other] >= rank[layer]:
                problems.append(f"{where}: {layer}/ may not include {target} ({LINE})")
    cycle = find_cycle(graph)
    if cycle:
        problems.append("files include each other: " + " -> ".join(cycle))
    return problems


if __name__ == "__main__":
    source_folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else "src")
    found = check(source_folder)
    print("\n".join(found) if found else "layers: every include goes down the line")
    sys.exit(1 if found else 0)

#!/usr/bin/env python3
"""Budgets and words that the compiler does not check, over all files that git tracks."""
import pathlib
import re
import subprocess
import sys

SOURCE = (".h", ".cuh", ".cpp", ".cu", ".py", ".sh")
FILE_LINES_MAX = 1000
FUNCTION_LINES_MAX = 120
KERNEL_LINES_MAX = 160  # .cu and .cuh: a kernel's stages share registers, and splitting them hides the order
FILE_BYTES_MAX = 1 << 20
REFERENCE_BYTES_MAX = 1_000_000  # everything beside the weights of an embedded model

# The brackets keep this file from finding itself.
WORDS = [
    (re.compile(r"/(wor[k]|far[m])/|/tmp/bash_job[s]|/roo[t]/|/hom[e]/\w"), "a path of one machine"),
    (re.compile(r"https?://[a-z0-9.-]*(pyp[i]|pythonhoste[d]|debian\.or[g]|npmj[s])"), "a registry's address"),
    (re.compile(r"-ffast-mat[h]|--use_fast_mat[h]|-Ofas[t]|fast-mat[h]=|-funsafe-mat[h]"), "fast-math"),
    (re.compile(r"\b(TOD[O]|FIXM[E]|XX[X]|HAC[K])\b"), "an unfinished mark"),
    (re.compile(r"^(<{7}|>{7}) ", re.M), "a merge conflict"),
]
SOURCE_WORDS = [
    # Order of float atomics differs from run to run; see docs/NUMERICS.md.
    (re.compile(r"\batomicAdd\s*\(\s*(?:reinterpret_cast<)?\s*float"), "a float atomic"),
    (re.compile(r"\bstd::(rand|random_device|mt19937)\b"), "a random number that is not Philox"),
]


def tracked_files():
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True).stdout
    paths = (pathlib.Path(name) for name in listing.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def long_functions(path, text):
    """clang-format puts a function's closing brace into column 0, which is all this relies on."""
    lines_max = KERNEL_LINES_MAX if path.suffix in (".cu", ".cuh") else FUNCTION_LINES_MAX
    opened = None
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("}"):
            if opened and number - opened > lines_max:
                yield f"{path}:{opened}: a function of {number - opened} lines (at most {lines_max})"
            opened = None
        elif (line.endswith("{") and opened is None
              and not re.match(r"\s|namespace|struct|class|enum|union|extern|template|#", line)
              and not line.endswith("= {")):
            opened = number


def check_words(path, text, words):
    for pattern, meaning in words:
        for match in pattern.finditer(text):
            yield f"{path}:{text.count(chr(10), 0, match.start()) + 1}: {meaning}: {match.group(0)}"


def check_file(path):
    size = path.stat().st_size
    if size > FILE_BYTES_MAX and path.parts[0] != "models":
        yield f"{path}: {size} bytes (at most {FILE_BYTES_MAX} outside models/)"
    if size > 2 * FILE_BYTES_MAX:
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return
    yield from check_words(path, text, WORDS)
    if path.suffix in SOURCE:
        lines = text.count("\n")
        if lines > FILE_LINES_MAX:
            yield f"{path}: {lines} lines (at most {FILE_LINES_MAX})"
    if path.suffix in (".h", ".cuh", ".cpp", ".cu"):
        if path.parts[0] == "src":
            yield from check_words(path, text, SOURCE_WORDS)
        yield from long_functions(path, text)


def main():
    files = tracked_files()
    problems = [problem for path in files for problem in check_file(path)]
    references = sum(
        path.stat().st_size for path in files
        if path.parts[0] == "models" and (len(path.parts) > 3 or path.name == "reference.json"))
    if references > REFERENCE_BYTES_MAX:
        problems.append(f"models/: {references} bytes of reference files (at most {REFERENCE_BYTES_MAX})")
    print("\n".join(problems) if problems else f"lint: {len(files)} files are in order")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

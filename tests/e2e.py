#!/usr/bin/env python3
"""End-to-end tests of the binary: what a user types, and what a user gets.

    tests/e2e.py --orbit build/orbit [NAME...]      NAME: part of a test's name

With ORBIT_MODELS set to the folder of reference models, those are checked too.
"""
import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = ROOT / "models/mini-qwen3-int4"
DEMO = ROOT / "examples/demo/run.toml"
TEST_DATA = ROOT / "examples/demo/test.jsonl"
MODELS = os.environ.get("ORBIT_MODELS")
QUICK = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "train.steps=6", "eval.max_questions=24",
         "checkpoint.every=1", "train.lr=2e-3"]

ORBIT = None  # path of the binary, from the command line


class Result:
    def __init__(self, done):
        self.rc, self.out, self.err = done.returncode, done.stdout, done.stderr


def orbit(*args, stdin="", timeout=300, preexec=None, cwd=None):
    return Result(subprocess.run(
        [str(ORBIT), *map(str, args)], input=stdin, capture_output=True, text=True, timeout=timeout,
        preexec_fn=preexec, cwd=cwd, check=False))


def train_args(run, *settings, config=DEMO):
    args = ["train", str(config), "--run", str(run)]
    for setting in [*QUICK, *settings]:
        args += ["--set", setting]
    return args


def expect(condition, message):
    if not condition:
        raise AssertionError(message)


def expect_equal(a, b, what):
    expect(a == b, f"{what}: {a!r} is not {b!r}")


def expect_ok(result, what):
    expect(result.rc == 0, f"{what}: exit status {result.rc}\n{result.err[-2000:]}")
    return result


def json_lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def reproducible(run):
    """What resume promises: the contract's list."""
    metrics = [{key: value for key, value in row.items() if not key.startswith(("time/", "mem/"))}
               for row in json_lines(run / "metrics.jsonl")]
    rollouts = [{key: row[key] for key in ("step", "prompt", "sample", "ids", "logprobs", "reward")}
                for row in json_lines(run / "rollouts.jsonl")]
    return metrics, rollouts, (run / "adapter/adapter_model.safetensors").read_bytes()


def expect_same_run(a, b, what):
    for name, left, right in zip(("metrics", "rollouts", "adapter"), reproducible(a), reproducible(b)):
        if left != right and name != "adapter":
            first = next((i for i, (x, y) in enumerate(zip(left, right)) if x != y), min(len(left), len(right)))
            raise AssertionError(f"{what}: {name} differ first at line {first + 1} ({len(left)} and {len(right)} lines)")
        expect(left == right, f"{what}: {name} differ")


# ---- Tests: one function each, called with an empty folder ----


def test_help_teaches_by_example(_):
    expect_ok(orbit("--help"), "--help")
    for command in ("train", "resume", "eval", "generate", "verify", "parity", "score", "quantize", "inspect", "bench"):
        result = expect_ok(orbit(command, "--help"), command)
        expect(f"  orbit {command}" in result.out, f"{command} --help has no example")


def test_training_run_leaves_what_the_contract_names(folder):
    run = folder / "run"
    result = expect_ok(orbit(*train_args(run)), "train")
    expect_equal(result.out, "", "words about progress belong to stderr, stdout")
    expect("parity 0/" in result.err, "each step shows its parity")
    summary = json.loads((run / "summary.json").read_text())
    for key in ("model", "steps", "seconds", "tokens", "accuracy_before", "accuracy_after", "parity_mismatches"):
        expect(key in summary, f"summary.json lacks {key}")
    expect_equal(summary["steps"], 6, "steps")
    expect_equal(summary["parity_mismatches"], 0, "parity mismatches")
    expect_equal(len(json_lines(run / "metrics.jsonl")), 6, "lines of metrics.jsonl")
    expect_equal(len(json_lines(run / "rollouts.jsonl")), 6 * 8 * 4, "lines of rollouts.jsonl")
    for name in ("config.toml", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        expect((run / name).is_file(), f"no {name}")
    expect_equal(len(list((run / "checkpoints").iterdir())), 2, "checkpoints kept")
    # The stored config is complete: it gives the same run again.
    again = folder / "again"
    expect_ok(orbit("train", run / "config.toml", "--run", again, "--set", "cpu.threads=1"), "train from config.toml")
    expect_same_run(run, again, "the stored config, with one thread")
    offloaded = folder / "offloaded"
    expect_ok(orbit(*train_args(offloaded, "train.activation_offloading=true")), "train with offloading")
    expect_same_run(run, offloaded, "with layer inputs in host memory")
    recomputed = folder / "recomputed"
    expect_ok(orbit(*train_args(recomputed, "train.recompute=full")), "train with full recomputation")
    expect_same_run(run, recomputed, "with attention computed again")
    other = folder / "other"
    expect_ok(orbit(*train_args(other, "seed=2")), "train with another seed")
    expect(reproducible(run)[1] != reproducible(other)[1], "another seed gives other rollouts")
    second = orbit(*train_args(run))
    expect_equal(second.rc, 2, "a run folder is not overwritten, exit status")
    for path in (run, run / "adapter", sorted((run / "checkpoints").iterdir())[-1]):
        expect_ok(orbit("inspect", path), f"inspect {path}")
    finished = expect_ok(orbit("resume", run), "resume of a finished run")
    expect("finished" in finished.err, "resume says that the run is finished")


def test_resume_after_kills_is_exact(folder):
    steps = "train.steps=12"
    whole = folder / "whole"
    expect_ok(orbit(*train_args(whole, steps)), "train")
    run = folder / "killed"
    draws = random.Random(7)
    command = train_args(run, steps)
    kills = 0
    for attempt in range(60):
        limit = draws.uniform(0.1, 0.8) if kills < 10 else None
        process = subprocess.Popen([str(ORBIT), *command], stderr=subprocess.DEVNULL)
        try:
            rc = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            if list(run.glob("checkpoints/step-*")):
                command = ["resume", str(run)]
            else:
                shutil.rmtree(run, ignore_errors=True)
            continue
        expect_equal(rc, 0, f"exit status of attempt {attempt}")
        break
    expect(kills >= 3, f"only {kills} kills: the run was too short to test anything")
    expect_same_run(whole, run, f"after {kills} kills")


def test_interrupt_ends_at_a_step_with_a_checkpoint(folder):
    whole, run = folder / "whole", folder / "run"
    expect_ok(orbit(*train_args(whole, "checkpoint.every=0")), "train")
    process = subprocess.Popen(
        [str(ORBIT), *train_args(run, "checkpoint.every=0")], stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step   2/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    expect_equal(process.wait(), 130, "exit status after Ctrl-C")
    expect("orbit resume" in rest, "the last words say how to go on")
    expect_ok(orbit("resume", run), "resume")
    expect_same_run(whole, run, "after Ctrl-C")


def test_damaged_checkpoint_is_passed_over(folder):
    whole, run = folder / "whole", folder / "run"
    expect_ok(orbit(*train_args(whole)), "train")
    expect_ok(orbit(*train_args(run)), "train")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    path = newest / "tensors.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (run / "summary.json").unlink()
    result = expect_ok(orbit("resume", run), "resume")
    expect(newest.name in result.err and "damaged" in result.err, "a warning names the damaged checkpoint")
    expect_same_run(whole, run, "after a damaged checkpoint")


def test_system_message_stands_once(folder):
    question = {"role": "user", "content": "What is 2 + 3?"}
    lengths = []
    for name, prompt, setting in (("setting", [question], "data.system=Be brief."),
                                  ("row", [{"role": "system", "content": "Be brief."}, question], "data.system=")):
        data = folder / f"{name}.jsonl"
        data.write_text(json.dumps({"prompt": prompt, "answer": "5"}) + "\n")
        run = folder / name
        expect_ok(orbit(*train_args(run, "train.steps=1", "data.eval=", f"data.train={data}", setting)), name)
        lengths.append(json_lines(run / "rollouts.jsonl")[0]["prompt_length"])
    expect_equal(lengths[0], lengths[1], "tokens of the prompt")


def test_eval(folder):
    run = folder / "run"
    expect_ok(orbit(*train_args(run, "adapter.kind=lora", "train.steps=2", "data.eval=")), "train")
    data = ["--data", TEST_DATA, "--max-questions", 64]
    base = json.loads(expect_ok(orbit("eval", MODEL, *data, "--json"), "eval").out)
    expect_equal(base["questions"], 64, "questions")
    expect(0.2 < base["accuracy"] < 0.8, f"accuracy of the base: {base['accuracy']}")
    adapted = json.loads(expect_ok(orbit("eval", MODEL, "--adapter", run, *data, "--json"), "eval").out)
    expect(0 <= adapted["accuracy"] <= 1, "accuracy with an adapter")
    sampled = json.loads(expect_ok(
        orbit("eval", MODEL, *data, "--samples", 4, "--k", "1,4", "--json"), "eval with samples").out)
    expect(0 < sampled["pass_at_k"]["1"] < sampled["pass_at_k"]["4"] <= 1, f"pass@k: {sampled['pass_at_k']}")
    expect_equal(sampled["accuracy"], base["accuracy"], "greedy accuracy beside samples")
    one = json.loads(expect_ok(orbit("eval", MODEL, *data, "--json", "--max-batch", 1), "batch 1").out)
    expect_equal(one["accuracy"], base["accuracy"], "accuracy at batch 1")


def test_generate(_):
    result = expect_ok(orbit("generate", MODEL, "--prompt", "What is 2 + 3?"), "generate")
    expect("####" in result.out, f"an answer: {result.out!r}")
    again = orbit("generate", MODEL, "--prompt", "What is 2 + 3?", "--temperature", 1, "--seed", 5)
    same = orbit("generate", MODEL, "--prompt", "What is 2 + 3?", "--temperature", 1, "--seed", 5)
    expect_equal(again.out, same.out, "the same seed")
    raw = expect_ok(orbit("generate", MODEL, "--prompt", "2 + 3", "--raw", "--max-tokens", 4), "--raw")
    expect(raw.out.strip() != result.out.strip(), "--raw leaves the template out")
    chat = expect_ok(orbit("generate", MODEL, stdin="What is 2 + 3?\nWhat is 12 - 7?\n/new\nWhat is 2 + 3?\n"), "chat")
    expect_equal(chat.out.count("####"), 3, "answers of a chat")
    stopped = expect_ok(orbit("generate", MODEL, "--prompt", "What is 2 + 3?", "--stop", "####"), "--stop")
    expect("####" not in stopped.out, "the stop text is cut")


def test_parity(_):
    result = expect_ok(orbit("parity", MODEL, "--texts", 8, "--longest", 96), "parity")
    expect("rollout = training" in result.out, "the table's last row")
    expect(result.out.strip().endswith("differing tokens: 0"), "the sum")
    expect_user_error(orbit("parity"), ["MODEL", "--shape", "qwen3-0.6b"], "parity of nothing")
    expect_user_error(orbit("parity", "--shape", "qwen3-9b"), ["qwen3-9b", "qwen3-8b"], "an unknown shape")


def test_verify(folder):
    result = expect_ok(orbit("verify", MODEL, "--reference", MODEL, "--activations", "f32"), "verify")
    expect(result.out.strip().splitlines()[-1].startswith("max log-prob difference "), "the last line")
    plain = expect_ok(orbit("verify", MODEL, "--reference", MODEL), "verify in the default precision")
    expect("greedy" in plain.out, "the last line")
    # A reference that is off by little more than the tolerance must fail.
    reference = json.loads((MODEL / "reference.json").read_text())
    reference["documents"][3]["logprobs"][5] += 3e-4
    (folder / "reference.json").write_text(json.dumps(reference))
    wrong = orbit("verify", MODEL, "--reference", folder, "--activations", "f32")
    expect_equal(wrong.rc, 1, "exit status for a reference that is off")


def test_score(folder):
    rows = [{"response": "1 + 1 = 2\n#### 2", "answer": "2"}, {"response": "#### 3", "answer": "2"},
            {"response": "no mark", "answer": "2"}]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = expect_ok(orbit("score", "--reward", "exact", "--data", data, "--json"), "score")
    scores = [json.loads(line) for line in result.out.splitlines()]
    expect_equal([s["score"] for s in scores], [1, 0, 0], "scores")
    expect(all(s["reason"] for s in scores), "each score has a reason")


def write_program(path, text):
    path.write_text("#!/usr/bin/env python3\nimport sys, json, time\n" + text)
    path.chmod(0o755)
    return path


def test_reward_programs_that_fail_are_reported_apart(folder):
    data = folder / "rows.jsonl"
    data.write_text('{"response": "#### 2", "answer": "2"}\n' * 3)
    good = write_program(folder / "good.py", "for line in sys.stdin:\n    print(json.dumps({'score': 0.5}), flush=True)\n")
    result = expect_ok(orbit("score", "--reward-command", f"python3 {good}", "--data", data, "--json"), "score")
    expect_equal([json.loads(line)["score"] for line in result.out.splitlines()], [0.5] * 3, "scores")
    bad = {
        "crashed": "sys.exit(3)\n",
        "timeout": "time.sleep(60)\n",
        "bad_output": "for line in sys.stdin:\n    print('not a score', flush=True)\n",
    }
    for status, text in bad.items():
        program = write_program(folder / f"{status}.py", text)
        result = orbit("score", "--reward-command", f"python3 {program}", "--data", data, "--json", "--timeout", 1)
        if result.rc == 2:
            expect(result.err.startswith("error: ") or "\nerror: " in result.err, f"{status}: {result.err}")
            continue
        rows = [json.loads(line) for line in result.out.splitlines()]
        expect(all(row["score"] is None for row in rows), f"{status}: never scored as a wrong answer")
        expect(rows[0]["status"] == status, f"{status}: reported as {rows[0]['status']}")


def copy_model(folder, name):
    target = folder / name
    shutil.copytree(MODEL, target)
    return target


def edit_json(path, **changes):
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps(config))


def damaged_models(folder):
    """Pairs of a folder and a word that the error must hold."""
    yield folder / "absent", "absent"
    model = copy_model(folder, "no_config")
    (model / "config.json").unlink()
    yield model, "config.json"
    model = copy_model(folder, "bad_json")
    (model / "config.json").write_text("{\"model_type\": ")
    yield model, "config.json"
    model = copy_model(folder, "unknown_type")
    edit_json(model / "config.json", model_type="mamba")
    yield model, "mamba"
    model = copy_model(folder, "wrong_width")
    edit_json(model / "config.json", hidden_size=512)
    yield model, "model."
    model = copy_model(folder, "no_tokenizer")
    (model / "tokenizer.json").unlink()
    yield model, "tokenizer"
    model = copy_model(folder, "bad_tokenizer")
    (model / "tokenizer.json").write_text((MODEL / "tokenizer.json").read_text()[:5000])
    yield model, "tokenizer.json"
    weights = (MODEL / "model.safetensors").read_bytes()
    for name, data in {
            "truncated": weights[:len(weights) // 2], "tiny": weights[:5], "empty": b"",
            "huge_header": struct.pack("<Q", 1 << 60) + weights[8:],
            "broken_header": weights[:100] + b"\xff\xff" + weights[102:]}.items():
        model = copy_model(folder, name)
        (model / "model.safetensors").write_bytes(data)
        yield model, "model.safetensors"
    model = copy_model(folder, "no_weights")
    (model / "model.safetensors").unlink()
    yield model, "safetensors"
    model = copy_model(folder, "bad_template")
    (model / "chat_template.jinja").write_text("{% for m in %}")
    yield model, "template"


def expect_user_error(result, words, what):
    expect_equal(result.rc, 2, f"{what}: exit status (stderr: {result.err[-500:]})")
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    expect_equal(len(errors), 1, f"{what}: sentences on stderr ({result.err[-500:]})")
    for word in [words] if isinstance(words, str) else words:
        expect(word in errors[0], f"{what}: {word!r} is not in {errors[0]!r}")
    return errors[0]


def test_bad_models(folder):
    for model, word in damaged_models(folder):
        result = orbit("generate", model, "--prompt", "x")
        print("   ", expect_user_error(result, word, model.name).replace(str(folder), "DIR"))


def test_bad_configs_and_data(folder):
    def case(name, words, *settings, config_text=None):
        config = DEMO
        if config_text is not None:
            config = folder / f"{name}.toml"
            config.write_text(config_text)
        result = orbit(*train_args(folder / f"run-{name}", *settings, config=config))
        print("   ", expect_user_error(result, words, name).replace(str(folder), "DIR"))

    demo = DEMO.read_text().replace("../../models", str(ROOT / "models")).replace('"train.jsonl"', f'"{DEMO.parent}/train.jsonl"')
    case("typo", [":5", "train.stepps", "train.steps"], config_text="model = 'x'\n\n\n[train]\nstepps = 3\n")
    case("set-typo", "rollout.temperature", "rollout.temprature=1")
    case("type", ["typed", "train.steps", "integer"], "train.steps=typed")
    case("range", ["adapter.kind", "dora"], "adapter.kind=dora")
    case("toml", "not valid TOML", config_text=demo + "\n[train\n")
    case("no-model", "model", config_text="[data]\ntrain = 'x.jsonl'\n")
    case("block", "block", "adapter.block_size=48")
    case("target", "q_porj", "adapter.targets=q_porj")
    case("device", "cuda", "device=cuda:7")
    case("memory", ["KV pages", "rollout.max_batch (1000000)"], "rollout.max_batch=1000000", "rollout.max_tokens=1000000")
    case("no-data", "missing.jsonl", "data.train=missing.jsonl")
    for name, text, words in (
            ("row", '{"prompt": "a", "answer": "b"}\n{"prompt": \n', ["row.jsonl", "2"]),
            ("field", '{"question": "a", "answer": "b"}\n', ["prompt", "question"]),
            ("kind", '{"prompt": 3, "answer": "b"}\n', ["kind.jsonl", "1"]),
            ("none", "", "none.jsonl"),
            ("binary", "\0\xff\n", ["binary.jsonl", "1"])):
        path = folder / f"{name}.jsonl"
        path.write_bytes(text.encode("latin-1"))
        case(name, words, f"data.train={path}")
    case("reward", ["exact", "exactt"], "reward.name=exactt")
    case("program", "no-such-program", "reward.command=no-such-program")
    with_option = orbit(*train_args(folder / "run-device-option", "device=cpu"), "--device", "cuda:7")
    expect_user_error(with_option, 'device = "cuda:7"', "device as an option")
    expect_user_error(orbit("train", folder / "absent.toml"), "absent.toml", "absent config")
    expect_user_error(orbit("resume", folder), "config.toml", "resume of no run")
    expect_user_error(orbit("trian", "x"), "train", "unknown command")
    expect_user_error(orbit("eval", MODEL), "--data", "missing option")
    expect_user_error(orbit("verify", MODEL, "--reference", folder), "reference.json", "no reference")
    expect_user_error(orbit("inspect", folder), "config.json", "inspect of nothing")


def test_adapter_of_another_model(folder):
    run = folder / "run"
    expect_ok(orbit(*train_args(run, "train.steps=1", "data.eval=")), "train")
    adapter = run / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    expect_user_error(orbit("generate", MODEL, "--adapter", adapter, "--prompt", "x"), "IA3", "kind")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    data = (adapter / "adapter_model.safetensors").read_bytes()
    for old, new in ((b"layers.5.", b"layers.9."), (b"[8,496]", b"[4,992]")):
        expect(old in data, f"the adapter's header holds {old}")
        (adapter / "adapter_model.safetensors").write_bytes(data.replace(old, new))
        sentence = expect_user_error(
            orbit("generate", MODEL, "--adapter", adapter, "--prompt", "x"), "adapter", str(new))
        print("   ", sentence.replace(str(folder), "DIR"))
    (adapter / "adapter_model.safetensors").write_bytes(data[:-100])
    expect_user_error(orbit("generate", MODEL, "--adapter", adapter, "--prompt", "x"), "adapter_model", "truncated")


def test_full_disk_loses_nothing(folder):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # below a checkpoint's size

    run = folder / "run"
    result = orbit(*train_args(run), preexec=limit)
    expect_user_error(result, "cannot write", "full disk")
    if list(run.glob("checkpoints/step-*")):
        expect_ok(orbit("resume", run), "resume with space again")


def test_installed_binary_needs_no_sources(folder):
    build = ORBIT.parent
    if not (build / "CMakeCache.txt").is_file():
        return
    subprocess.run(["cmake", "--install", str(build), "--prefix", str(folder / "prefix")], check=True, capture_output=True)
    shutil.copytree(MODEL, folder / "model")
    done = subprocess.run([folder / "prefix/bin/orbit", "generate", "model", "--prompt", "What is 2 + 3?"],
                          cwd=folder, capture_output=True, text=True, check=False)
    expect_equal(done.returncode, 0, f"exit status ({done.stderr})")


def safetensors_bytes(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    return {name: data[8 + length + e["data_offsets"][0]:8 + length + e["data_offsets"][1]]
            for name, e in header.items() if name != "__metadata__"}


def test_quantize_writes_the_published_layout(folder):
    if not MODELS:
        return "skipped"
    expect_ok(orbit("quantize", f"{MODELS}/mini-qwen3", folder / "int4", "--format", "int4"), "quantize")
    ours = safetensors_bytes(folder / "int4/model.safetensors")
    expect_equal(ours, safetensors_bytes(MODEL / "model.safetensors"), "bytes of every tensor")
    result = orbit("verify", folder / "int4", "--reference", MODEL, "--activations", "f32")
    expect_ok(result, "verify of the quantised folder")
    expect_user_error(orbit("quantize", MODEL, folder / "twice", "--format", "int4"), "already", "twice")


def test_quantize_of_experts(folder):
    path = ROOT / "tests/models/tiny-qwen3-moe"
    result = orbit("quantize", path, folder / "nvfp4", "--format", "nvfp4", "--include", "experts")
    expect_ok(result, "quantize")
    expect_equal("24 matrices in nvfp4" in result.out, True, "three matrices of eight experts")
    expect_ok(orbit("parity", folder / "nvfp4", "--texts", 4, "--longest", 32), "parity of the quantised folder")


def test_plan(folder):
    fits = expect_ok(orbit("plan", "Kimi-K2.6", "--gpus", "8xH200"), "plan that fits").out
    expect("553.4 GiB" in fits and "\nfits: " in fits, f"the plan of Kimi-K2.6:\n{fits}")
    small = orbit("plan", "Kimi-K2.6", "--gpus", "2xH200")
    expect_equal(small.rc, 1, "exit status of a plan that does not fit")
    expect("does not fit" in small.out and "host memory" in small.out, f"the plan for 2 GPUs:\n{small.out}")
    shutil.copy(MODEL / "config.json", folder / "config.json")
    expect_equal(
        expect_ok(orbit("plan", folder), "config alone").out.split(": ", 1)[1],
        expect_ok(orbit("plan", MODEL), "whole folder").out.split(": ", 1)[1], "plans of a folder and of its config alone")
    expect_user_error(orbit("plan", "Qwen3-8"), "Qwen3-8B", "unknown model")
    expect_user_error(orbit("plan", "Qwen3-8B", "--gpus", "8xTPU"), "H200", "unknown GPU")


def test_training_of_shared_experts(folder):
    # Random weights: what is learnt does not matter, that some answers differ in their reward does.
    common = [f"model={ROOT}/tests/models/tiny-qwen3-moe", "data.eval=", "rollout.max_tokens=24", "reward.name=regex",
              "reward.pattern=[a-c]", "adapter.expert_sharing=shared", "adapter.block_size=16", "train.steps=4"]
    for kind in ("lora", "oft"):
        whole, run = folder / f"{kind}-whole", folder / kind
        settings = [*common, f"adapter.kind={kind}"]
        expect_ok(orbit(*train_args(whole, *settings)), f"train {kind}")
        rows = json_lines(whole / "metrics.jsonl")
        expect(all(row["grad_norm"] > 0 for row in rows), f"{kind}: gradients {[row['grad_norm'] for row in rows]}")
        expect(all(row["routing/pairs"] > 0 and row["routing/mismatches"] == 0 for row in rows), "routing of both")
        expect_ok(orbit(*train_args(run, *settings, "moe.replay_routing=true", "train.steps=2")), f"half of {kind}")
        config = run / "config.toml"
        config.write_text(config.read_text().replace("steps = 2", "steps = 4"))
        (run / "summary.json").unlink()
        expect_ok(orbit("resume", run), f"resume {kind}")
        expect_same_run(whole, run, f"{kind}: resumed, and with replayed routing")
        stacked = safetensors_bytes(run / "adapter/adapter_model.safetensors")
        part = "lora_A" if kind == "lora" else "oft_R"
        first = f"base_model.model.model.layers.1.mlp.experts.w1.{part}.weight"
        expect(first in stacked, f"no {first} in {sorted(stacked)[:3]}")
        expect_ok(orbit("inspect", run / "adapter"), "inspect")
        texts = []
        subprocess.run([sys.executable, ROOT / "tools/expand_experts.py", run / "adapter", folder / f"{kind}-each"],
                       check=True, capture_output=True)
        for adapter in (run / "adapter", folder / f"{kind}-each"):
            result = orbit("generate", ROOT / "tests/models/tiny-qwen3-moe", "--adapter", adapter, "--prompt", "1 + 2",
                           "--max-tokens", 40, "--temperature", 0)
            texts.append(expect_ok(result, "generate").out)
        expect_equal(texts[0], texts[1], f"{kind}: stacked and expert by expert")


def test_experts_in_host_memory(folder):
    model = ROOT / "tests/models/tiny-qwen3-moe"
    common = [f"model={model}", "data.eval=", "rollout.max_tokens=24", "reward.name=regex", "reward.pattern=[a-c]",
              "adapter.block_size=16", "train.steps=4"]
    for kind in ("lora", "oft"):
        whole, host = folder / f"{kind}-whole", folder / kind
        expect_ok(orbit(*train_args(whole, *common, f"adapter.kind={kind}")), f"train {kind}")
        result = orbit(*train_args(host, *common, f"adapter.kind={kind}", "moe.host_layers=1"))
        expect("the experts of 1 of 1 layers stay in host memory" in expect_ok(result, "train with one layer").err,
               f"the ledger says what is in host memory:\n{result.err}")
        expect_same_run(whole, host, f"{kind}: experts on the device and in host memory")
    expect_ok(orbit("parity", model, "--host-layers", 1, "--texts", 8, "--longest", 64), "parity")
    expect_ok(orbit("verify", model, "--reference", model, "--activations", "f32", "--host-layers", 1), "verify")
    table = expect_ok(orbit("bench", model, "--host-layers", 1, "--only", "decode,train", "--context", 32,
                            "--decode-batches", "1,4", "--train-length", 64, "--train-tokens", 128), "bench").out
    rows = [line for line in table.splitlines() if line.endswith("| equal |")]
    expect_equal(len(rows), 3, f"rows with equal bits of two decode steps and a training step:\n{table}")
    expect_user_error(orbit("parity", model, "--host-layers", 2), "which is 1 here", "more layers than there are")
    expect_user_error(orbit("parity", MODEL, "--host-layers", 1), "which is 0 here", "a model without experts")
    expect_user_error(orbit("bench", MODEL, "--host-layers", 1), "which is 0 here", "a bench without experts")


def test_tiny_models(_):
    # biases and an untied head; llama3 rope scaling and three heads; experts beside a dense layer
    for family in ("qwen2", "llama", "qwen3-moe"):
        path = ROOT / f"tests/models/tiny-{family}"
        result = orbit("verify", path, "--reference", path, "--activations", "f32")
        print("   ", family, result.out.strip().splitlines()[-1] if result.out else result.err)
        expect_ok(result, family)
        expect_ok(orbit("parity", path, "--texts", 8, "--longest", 64), f"parity of {family}")


def test_reference_models(_):
    if not MODELS:
        return "skipped"
    for name in ("mini-llama", "mini-qwen3", "packed/mini-qwen3-int4",
                 "packed/mini-qwen3-moe-mxfp4"):
        path = f"{MODELS}/{name}"
        result = orbit("verify", path, "--reference", path, "--activations", "f32")
        print("   ", name, result.out.strip().splitlines()[-1] if result.out else result.err)
        expect_ok(result, name)
    expect_ok(orbit("parity", f"{MODELS}/mini-llama", "--texts", 16, "--longest", 96), "parity of a BF16 base")


def main():
    global ORBIT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--orbit", default=str(ROOT / "build/orbit"))
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    ORBIT = pathlib.Path(args.orbit).resolve()
    counts = {"passed": 0, "failed": 0}
    for name, test in list(globals().items()):
        if not name.startswith("test_") or (args.names and not any(part in name for part in args.names)):
            continue
        started = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="orbit_e2e_") as scratch:
                outcome = test(pathlib.Path(scratch)) or "passed"
        except Exception as error:  # a test may fail in any way; the next one runs all the same
            outcome = "failed"
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            print(f"FAILED {name}: {error}")
        if outcome in counts:
            counts[outcome] += 1
        print(f"{outcome:<8} {name} ({time.monotonic() - started:.1f} s)", flush=True)
    print(f"{counts['passed']} passed, {counts['failed']} failed")
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Writes what transformers and PEFT compute for a model, for `orbit verify` to compare with.

    tools/make_reference.py MODEL OUT [--lora-rank 8] [--oft-block 32] [--targets all-linear]

OUT gets reference.json (texts with token ids and log-probabilities, greedy answers) and lora/ and
oft/: a random adapter in PEFT's format, the log-probabilities of the first texts with it, and
gradients.safetensors, the gradient of  loss = -sum w logp,  w = ((7919 t) mod 13 - 6) / 6,  t being
the index of the predicted token in its text. All in float32 on the CPU; quantised weights are
dequantised and rounded to bf16 first. Needs: pip install torch transformers peft safetensors
(and compressed-tensors for such models).
"""
import argparse
import json
import pathlib

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "What is 47 + 85?", "What is 291 - 189?", "What is 12 * 7?", "Name three colours of the rainbow.",
    "Mia has 12 eggs and buys 30 more. Then Mia gives away 5. How many eggs are left?",
    "Write a short sentence about the sea.", "What is the capital of France?", "What is 800 + 777?",
]
TEXTS = [
    "The quick brown fox jumps over the lazy dog. 1234567890 3.14159 -17 50%",
    "Größe, naïve café, Ελληνικά, русский, 中文字符, 日本語, 한국어, עברית, 😀👩‍💻 ½ ²",
    "def f(x):\n    return [i ** 2 for i in range(x)]  # squares\n\n\tprint(f(3))\r\n",
    "  leading spaces,   runs   of spaces\n\n\nand newlines \n ",
]
NUM_ADAPTER_TEXTS = 8


def load_model(folder):
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    else:
        from transformers import CompressedTensorsConfig
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager",
            quantization_config=CompressedTensorsConfig(run_compressed=False)).float()
    return model.eval().requires_grad_(False)


def token_logprobs(model, ids):
    """[i] belongs to ids[i + 1]."""
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, tokens[0, 1:, None])[:, 0]


def greedy_answer(model, ids, stop_ids, limit, num_tokens):
    """The greedy continuation, and the smallest gap between the two best logits on the way.

    Rows of the vocabulary that the tokenizer does not know are never drawn.
    """
    answer, gap, past = [], float("inf"), None
    tokens = torch.tensor([ids])
    while len(answer) < limit:
        out = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past = out.past_key_values
        best = out.logits[0, -1, :num_tokens].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        answer.append(best.indices[0].item())
        if answer[-1] in stop_ids:
            break
        tokens = best.indices[:1][None]
    return answer, gap


def stop_ids_of(model, tokenizer):
    ids = {tokenizer.eos_token_id}
    for value in (model.config.eos_token_id, model.generation_config.eos_token_id):
        ids.update(value if isinstance(value, list) else [value])
    ids.discard(None)
    return ids


def base_reference(model, tokenizer, limit):
    documents, greedy = [], []
    texts = list(TEXTS)
    for prompt in PROMPTS:
        if tokenizer.chat_template:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer, gap = greedy_answer(model, ids, stop_ids_of(model, tokenizer), limit, len(tokenizer))
        greedy.append({"prompt": prompt, "prompt_ids": ids, "greedy_ids": answer,
                       "greedy": tokenizer.decode(answer), "smallest_gap": round(gap, 6)})
        texts.append(prompt + tokenizer.decode(answer))
    for text in texts[::-1]:  # the answers first: adapters are measured on the first texts
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) < 2 or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
            continue
        logprobs = token_logprobs(model, ids)
        documents.append({"text": text, "ids": ids, "logprobs": [round(x, 6) for x in logprobs.tolist()]})
    return {"note": "float32 transformers; logprobs[i] belongs to ids[i+1]", "documents": documents, "greedy": greedy}


def randomise(model):
    """Adapters start at the identity, where half of their gradients vanish; move them away."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "oft_R" in name:
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def stored_name(name):
    return name.replace(".default", "")


def adapter_reference(base, config, documents, folder):
    model = get_peft_model(base, config).eval()
    randomise(model)
    loss = torch.zeros(())
    logprobs = []
    for document in documents:
        values = token_logprobs(model, document["ids"])
        weights = torch.tensor([((7919 * t) % 13 - 6) / 6 for t in range(1, len(document["ids"]))])
        loss = loss - (weights * values).sum()
        logprobs.append([round(x, 6) for x in values.tolist()])
    loss.backward()
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    gradients = {stored_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
    save_file(gradients, folder / "gradients.safetensors")
    (folder / "reference.json").write_text(json.dumps({
        "loss": loss.item(), "documents": f"the first {len(documents)} of reference.json",
        "weights": "w = ((7919*t) mod 13 - 6)/6, loss = -sum w*logp", "logprobs": logprobs}))
    return model.unload()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--oft-block", type=int, default=32)
    parser.add_argument("--targets", default="all-linear", help="leaf names with commas, or all-linear")
    parser.add_argument("--max-tokens", type=int, default=48, help="of a greedy answer")
    parser.add_argument("--keep-base", action="store_true", help="OUT has a reference.json; add lora/ and oft/ to it")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = load_model(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "reference.json"
    if args.keep_base:
        reference = json.loads(path.read_text())
    else:
        with torch.no_grad():
            reference = base_reference(model, tokenizer, args.max_tokens)
        path.write_text(json.dumps(reference, ensure_ascii=False))
    documents = reference["documents"][:NUM_ADAPTER_TEXTS]
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    model = adapter_reference(
        model, LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=targets, task_type="CAUSAL_LM"),
        documents, args.out / "lora")
    adapter_reference(
        model, OFTConfig(r=0, oft_block_size=args.oft_block, target_modules=targets, use_cayley_neumann=True,
                         num_cayley_neumann_terms=5, task_type="CAUSAL_LM"),
        documents, args.out / "oft")
    print(f"{args.out}: {len(reference['documents'])} texts, {len(reference['greedy'])} greedy answers, lora/, oft/")


if __name__ == "__main__":
    main()

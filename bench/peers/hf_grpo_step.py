#!/usr/bin/env python3
"""One GRPO step with transformers and peft on the same shape as `orbit bench --only rl`, seconds per phase.

    bench/peers/hf_grpo_step.py [--prompts 64] [--samples 8] [--prompt 128] [--response 512] [--micro-batch 16]

Qwen3-0.6B's shape with random bf16 weights, LoRA r16 on all linears: generate with sampling (SDPA, dynamic cache), old
log-probs without gradient, then forward and backward in micro-batches with gradient checkpointing, and AdamW. Needs a
GPU, torch, transformers and peft. Run it in the same call as orbit, on the same device.
"""
import argparse
import json
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

SHAPES = {
    "qwen3-0.6b": dict(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config():
    return LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, lora_dropout=0.0)


def make_model(shape):
    config = Qwen3Config(**SHAPES[shape], attn_implementation="sdpa")
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model = get_peft_model(model, lora_config())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def logprobs(model, ids, response):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(ids, logits_to_keep=response + 1, use_cache=False).logits[:, :-1]
    chosen = logits.gather(-1, ids[:, -response:, None]).squeeze(-1).float()
    return chosen - torch.logsumexp(logits.float(), dim=-1)


def timed(seconds, name, body):
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = body()
    torch.cuda.synchronize()
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    return result


def step(model, optimizer, args, seconds):
    prompts = torch.randint(0, model.config.vocab_size, (args.prompts, args.prompt), device="cuda")
    prompts = prompts.repeat_interleave(args.samples, dim=0)

    def generate():
        model.eval()
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
            return model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, min_new_tokens=args.response, max_new_tokens=args.response,
            )

    ids = timed(seconds, "generate", generate)
    assert ids.shape == (args.prompts * args.samples, args.prompt + args.response), ids.shape
    batches = ids.split(args.micro_batch)

    def old():
        with torch.no_grad():
            return [logprobs(model, batch, args.response) for batch in batches]

    before = timed(seconds, "old log-probs", old)
    advantage = torch.randn(ids.shape[0], 1, device="cuda").split(args.micro_batch)

    def train():
        model.train()
        for batch, old_logprob, a in zip(batches, before, advantage):
            ratio = torch.exp(logprobs(model, batch, args.response) - old_logprob)
            loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a).sum() / (ids.shape[0] * args.response)
            loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timed(seconds, "train", train)


def parse_arguments(description, shapes):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(shapes))
    for name, value in (("prompts", 64), ("samples", 8), ("prompt", 128), ("response", 512), ("micro-batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def main():
    args = parse_arguments(__doc__, SHAPES)
    model = make_model(args.shape)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    warm = argparse.Namespace(**vars(args))
    warm.prompts, warm.response = 2, 8
    step(model, optimizer, warm, {})
    seconds = {}
    step(model, optimizer, args, seconds)
    seconds["total"] = sum(seconds.values())
    print(json.dumps({
        "what": "transformers + peft GRPO step", "shape": args.shape, "device": torch.cuda.get_device_name(),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
    }))


if __name__ == "__main__":
    main()

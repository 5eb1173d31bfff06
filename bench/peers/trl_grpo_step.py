#!/usr/bin/env python3
"""One GRPO step of TRL's GRPOTrainer on the same shape as `orbit bench --only rl`, seconds per phase.

    bench/peers/trl_grpo_step.py [--prompts 64] [--samples 8] [--prompt 128] [--response 512] [--micro-batch 16]

The model of hf_grpo_step.py: random bf16 weights, LoRA r16 on all linears, gradient checkpointing, AdamW, generation by
transformers (use_vllm is off: vLLM is not part of this comparison). TRL computes no old log-probs when a batch is used
for one update. Needs torch, transformers, peft and trl (1.16 was tried) with its dependencies; where packages cannot be
installed, carry the wheels of trl, datasets, pyarrow and what those miss. --shape tiny runs on a CPU, to try the script.
"""
import json
import tempfile
import time

import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from hf_grpo_step import SHAPES, lora_config, parse_arguments

TINY = dict(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
)
ALL_SHAPES = SHAPES | {"tiny": TINY}

class TimedTrainer(GRPOTrainer):
    """Seconds of generation (rewards and all that belongs to it included) and of the rest, for each step."""

    def __init__(self, prompt_length, **kwargs):
        super().__init__(**kwargs)
        self.prompt_length = prompt_length
        self.rollout = []

    def _generate_and_score_completions(self, inputs):
        synchronize()
        start = time.perf_counter()
        result = super()._generate_and_score_completions(inputs)
        synchronize()
        self.rollout.append(time.perf_counter() - start)
        for mask, length in (("prompt_mask", self.prompt_length), ("completion_mask", self.max_completion_length)):
            assert (result[mask].sum(-1) == length).all(), (mask, result[mask].sum(-1))
        return result


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def word_tokenizer(vocab_size):
    """A word "w17" is token 17, so that prompts have the length that is asked for."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def prompts_of(args, vocab_size):
    ids = torch.randint(2, vocab_size, (args.prompts, args.prompt), generator=torch.Generator().manual_seed(1))
    table = InMemoryTable.from_pydict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids.tolist()]})
    return Dataset(table, fingerprint="prompts")  # from_dict() would hash what some pyarrow releases cannot pickle


def make_trainer(args):
    config = Qwen3Config(**ALL_SHAPES[args.shape], attn_implementation="sdpa", eos_token_id=1, pad_token_id=0)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    options = GRPOConfig(
        output_dir=tempfile.gettempdir(), report_to=[], save_strategy="no", max_steps=1, logging_steps=1,
        use_cpu=not on_gpu,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.prompts * args.samples // args.micro_batch,
        num_generations=args.samples, max_completion_length=args.response,
        generation_kwargs={"min_new_tokens": args.response}, temperature=1.0, top_p=1.0, top_k=0,
        beta=0.0, num_iterations=1, epsilon=0.2, epsilon_high=0.28, learning_rate=1e-5, lr_scheduler_type="constant",
        bf16=True, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
    )

    def reward(completions, **_):
        return torch.rand(len(completions)).tolist()

    return TimedTrainer(
        args.prompt, model=model, reward_funcs=reward, args=options, train_dataset=prompts_of(args, config.vocab_size),
        processing_class=word_tokenizer(config.vocab_size), peft_config=lora_config(),
    )


def warm_up(trainer):
    """A few tokens through generation, forward and backward, so that the step has nothing to load or compile."""
    model = trainer.model
    ids = torch.full((2, 16), 2, device=next(model.parameters()).device)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    model(input_ids=ids).logits.float().logsumexp(-1).mean().backward()
    model.zero_grad()


def main():
    args = parse_arguments(__doc__, ALL_SHAPES)
    if args.prompts * args.samples % args.micro_batch:
        raise SystemExit("--micro-batch must divide prompts x samples")
    trainer = make_trainer(args)
    warm_up(trainer)
    times = []

    class Times(TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize()
            times.append(time.perf_counter())

        on_step_end = on_step_begin

    trainer.add_callback(Times())
    trainer.train()
    assert len(times) == 2 and len(trainer.rollout) == 1, (times, trainer.rollout)
    total = times[1] - times[0]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    print(json.dumps({
        "what": "TRL GRPO step", "shape": args.shape, "device": device, "peak_gib": round(peak, 1),
        "seconds": {
            "generate": round(trainer.rollout[-1], 2), "train": round(total - trainer.rollout[-1], 2),
            "total": round(total, 2),
        },
    }))


if __name__ == "__main__":
    main()

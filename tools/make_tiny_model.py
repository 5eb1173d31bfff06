#!/usr/bin/env python3
"""Makes a tiny random model that hides no bug behind zeros and ones, as a Hugging Face folder.

    tools/make_tiny_model.py qwen2 OUT && tools/make_reference.py OUT OUT --oft-block 16

Matrices ~ N(0, 1/fan_in), norm weights 1 + 0.1 N, biases 0.3 N; several shards. The tokenizer and
the chat template are those of the embedded model. Needs torch and transformers.
"""
import argparse
import pathlib
import shutil

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

TOKENIZER = pathlib.Path(__file__).resolve().parent.parent / "models/mini-qwen3-int4"
SIZES = {"vocab_size": 512, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "rms_norm_eps": 1e-5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, num_attention_heads=3, num_key_value_heads=1, head_dim=16,
                                 tie_word_embeddings=True, rope_parameters=LLAMA3),
    "qwen2": lambda: Qwen2Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                                 rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "qwen3": lambda: Qwen3Config(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                                 tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    # What the larger reference model has not: a dense layer among the others, weights that do not sum to 1.
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8,
                                        num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=False,
                                        mlp_only_layers=[0], tie_word_embeddings=False,
                                        rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
}


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.copy_(1 + 0.1 * noise)
            else:
                parameter.copy_(0.3 * noise)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(CONFIGS))
    parser.add_argument("out", type=pathlib.Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = CONFIGS[args.family]()
    config.eos_token_id = 2
    config.bos_token_id = None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(args.out, max_shard_size="50KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(TOKENIZER / name, args.out / name)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters())} parameters, {config.model_type}")


if __name__ == "__main__":
    main()

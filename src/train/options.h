// Options of the trainer (config section [train]).
#pragma once

#include <cstdint>
#include <string>

namespace orbit {

struct TrainOptions {
    int64_t steps = 100;
    double lr = 1e-5;
    std::string schedule = "constant";  // constant, linear, cosine
    int64_t warmup_steps = 0;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double eps = 1e-8;
    double weight_decay = 0;
    double clip_norm = 1.0;
    int64_t tokens_per_batch = 8192;
    std::string recompute = "selective";  // selective, full
    bool activation_offloading = false;
    int64_t max_staleness = 0;
    double clip_low = 0.2;
    double clip_high = 0.28;
    double kl_coef = 0;
    std::string on_parity_mismatch = "stop";  // stop, warn

    // Offloading is for those who lack the memory.
    bool keeps_attention() const { return recompute == "selective" && !activation_offloading; }

    void visit(auto&& field) {
        field("steps", steps, "optimiser steps of the run");
        field("lr", lr, "learning rate");
        field("schedule", schedule, "learning rate after warm-up: constant, linear or cosine");
        field("warmup_steps", warmup_steps, "steps of linear warm-up");
        field("beta1", beta1, "AdamW beta 1");
        field("beta2", beta2, "AdamW beta 2");
        field("eps", eps, "AdamW epsilon");
        field("weight_decay", weight_decay, "AdamW weight decay");
        field("clip_norm", clip_norm, "largest global gradient norm; 0 is off");
        field("tokens_per_batch", tokens_per_batch, "tokens of one packed forward and backward");
        field(
            "recompute",
            recompute,
            "what backward computes again: full, whole layers; selective, all but attention, whose "
            "outputs are kept; changes no bit"
        );
        field(
            "activation_offloading",
            activation_offloading,
            "layer inputs wait for backward in pinned host memory, and recompute is full; changes "
            "no bit"
        );
        field(
            "max_staleness",
            max_staleness,
            "steps that a rollout may lag behind; 0: strictly alternating"
        );
        field("clip_low", clip_low, "lower clip of the importance ratio: 1 - clip_low");
        field("clip_high", clip_high, "upper clip of the importance ratio: 1 + clip_high");
        field(
            "kl_coef", kl_coef, "weight of the KL divergence to the base (adapter off); 0 is off"
        );
        field(
            "on_parity_mismatch",
            on_parity_mismatch,
            "stop or warn when rollout and training log-probs differ"
        );
    }
};

}  // namespace orbit

// The registration function of every op's cases; main.cpp lists them in one table.
#pragma once

#include "opcheck/opcheck.h"

namespace orbit::opcheck {

void add_linear_cases(CaseList& cases);
void add_attention_cases(CaseList& cases);
void add_norm_cases(CaseList& cases);
void add_rope_cases(CaseList& cases);
void add_activation_cases(CaseList& cases);
void add_logprob_cases(CaseList& cases);
void add_embed_cases(CaseList& cases);
void add_optimizer_cases(CaseList& cases);
void add_moe_cases(CaseList& cases);
void add_oft_transform_cases(CaseList& cases);
void add_fused_cases(CaseList& cases);
void add_rotated_attention_cases(CaseList& cases);
void add_linear_group_cases(CaseList& cases);

}  // namespace orbit::opcheck

// The registration function of every op's cases; main.cpp lists them in one table.
#pragma once

#include "opcheck/opcheck.h"

namespace orbit::opcheck {

void add_linear_cases(CaseList& cases);

}  // namespace orbit::opcheck

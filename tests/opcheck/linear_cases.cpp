#include "opcheck/cases.h"

namespace orbit::opcheck {

void add_linear_cases(CaseList&) {}

}  // namespace orbit::opcheck

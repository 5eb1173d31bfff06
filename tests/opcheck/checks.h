// The modes. Each returns one line of detail and whether it passed.
#pragma once

#include <string>

#include "opcheck/opcheck.h"

namespace orbit::opcheck {

struct Verdict {
    bool passed = false;
    std::string detail;
};

Verdict check_forward(const Case& c, Stream& stream);
Verdict check_grad(const Case& c, Stream& stream);
Verdict check_invariance(const Case& c, Stream& stream, Stream& other);
Verdict check_determinism(const Case& c, Stream& stream);
Verdict measure(const Case& c, Stream& stream);

}  // namespace orbit::opcheck

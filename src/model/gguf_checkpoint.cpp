#include "base/error.h"
#include "model/checkpoint.h"

namespace orbit {

Checkpoint open_gguf(const std::string& file, const OpenOptions&) {
    throw UserError(fmt::format("{}: GGUF files are not read yet.", file));
}

}  // namespace orbit

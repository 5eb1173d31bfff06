// Dataset: the rows of one JSON Lines file, in file order, and seeded orders over them. Immutable
// after load.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/example.h"
#include "data/options.h"

namespace orbit {

class Dataset {
  public:
    // UserError names file and line: bad JSON, a missing field (with the fields that are there), a
    // wrong type, no rows.
    static Dataset load(const std::string& path, const DataOptions& options);

    int64_t size() const { return static_cast<int64_t>(rows_.size()); }

    const Example& operator[](int64_t index) const { return rows_[static_cast<size_t>(index)]; }

    // The order of one pass over the rows: Fisher-Yates with Philox draws keyed by (seed, epoch);
    // file order when shuffle is false.
    std::vector<int64_t> order(uint64_t seed, int64_t epoch) const;

  private:
    std::vector<Example> rows_;
    bool shuffle_ = true;
};

}  // namespace orbit

// What a Tokenizer is made of; filled in by the readers (tokenizer_json.cpp, tokenizer_gguf.cpp).
#pragma once

#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/pretokenizer.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace orbit {

struct TokenizerParts {
    Bpe bpe;
    PreTokenizer pre_tokenizer;
    std::vector<NormalForm> normal_forms;  // applied in order
    AddedTokenSet raw_added;               // matched in the raw text
    AddedTokenSet normalized_added;        // matched in the normalised text
    std::vector<AddedToken> added;
    std::unordered_map<int32_t, size_t> added_by_id;  // index into `added`
    std::vector<int32_t> prefix_ids;                  // written by the post-processor
    std::vector<int32_t> suffix_ids;
    std::string split_description;  // patterns and switches, part of the digest
    int32_t size = 0;

    // USER_CHECKs the ids, fills the sets and the sizes. `where` names the file.
    void finish(const std::string& where);
    std::string normalize(std::string_view text) const;
    const AddedToken* added_token(int32_t id) const;
};

// Ids beyond this would make tables larger than the file that lists them.
struct Tokenizer::State {
    TokenizerParts parts;
};

int32_t largest_allowed_id(size_t num_entries);

}  // namespace orbit

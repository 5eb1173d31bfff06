#include "run/plan_models.h"

#include <algorithm>
#include <cctype>
#include <nlohmann/json.hpp>

#include "adapter/peft_config.h"
#include "base/error.h"
#include "base/file.h"
#include "model/config.h"

namespace orbit {
namespace {

using nlohmann::json;

// Shapes of one published model; zero where a family has no such thing.
struct Shape {
    const char* name;
    const char* family;
    int64_t layers, width, heads, kv_heads, head_dim, mlp, vocab;
    bool tied = false;
    int64_t experts = 0, selected = 0, expert_width = 0, shared = 0, dense_layers = 0;
    int64_t q_lora = 0, o_groups = 0;  // MLA and DeepSeek-V4
    WeightFormat expert_format = WeightFormat::kBF16;
    WeightFormat linear_format = WeightFormat::kBF16;
};

constexpr auto kBF16 = WeightFormat::kBF16;
constexpr auto kFp8 = WeightFormat::kFp8;
constexpr auto kInt4 = WeightFormat::kInt4;
constexpr auto kMxFp4 = WeightFormat::kMxFp4;

// models.md 2 to 8; published formats of section 13.
// clang-format off
constexpr Shape kShapes[] = {
    {"SmolLM2-135M", "llama", 30, 576, 9, 3, 64, 1536, 49152, true},
    {"SmolLM2-360M", "llama", 32, 960, 15, 5, 64, 2560, 49152, true},
    {"SmolLM2-1.7B", "llama", 24, 2048, 32, 32, 64, 8192, 49152, true},
    {"Llama-3.2-1B", "llama", 16, 2048, 32, 8, 64, 8192, 128256, true},
    {"Llama-3.2-3B", "llama", 28, 3072, 24, 8, 128, 8192, 128256, true},
    {"Llama-3.1-8B", "llama", 32, 4096, 32, 8, 128, 14336, 128256},
    {"Llama-3.3-70B", "llama", 80, 8192, 64, 8, 128, 28672, 128256},
    {"Qwen2.5-0.5B", "qwen2", 24, 896, 14, 2, 64, 4864, 151936, true},
    {"Qwen2.5-1.5B", "qwen2", 28, 1536, 12, 2, 128, 8960, 151936, true},
    {"Qwen2.5-3B", "qwen2", 36, 2048, 16, 2, 128, 11008, 151936, true},
    {"Qwen2.5-7B", "qwen2", 28, 3584, 28, 4, 128, 18944, 152064},
    {"Qwen2.5-14B", "qwen2", 48, 5120, 40, 8, 128, 13824, 152064},
    {"Qwen2.5-32B", "qwen2", 64, 5120, 40, 8, 128, 27648, 152064},
    {"Qwen2.5-72B", "qwen2", 80, 8192, 64, 8, 128, 29568, 152064},
    {"Qwen3-0.6B", "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, true},
    {"Qwen3-1.7B", "qwen3", 28, 2048, 16, 8, 128, 6144, 151936, true},
    {"Qwen3-4B", "qwen3", 36, 2560, 32, 8, 128, 9728, 151936, true},
    {"Qwen3-8B", "qwen3", 36, 4096, 32, 8, 128, 12288, 151936},
    {"Qwen3-14B", "qwen3", 40, 5120, 40, 8, 128, 17408, 151936},
    {"Qwen3-32B", "qwen3", 64, 5120, 64, 8, 128, 25600, 151936},
    {"Qwen3-30B-A3B", "qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936, false, 128, 8, 768},
    {"Qwen3-235B-A22B", "qwen3_moe", 94, 4096, 64, 4, 128, 12288, 151936, false, 128, 8, 1536},
    {"DeepSeek-V3", "deepseek_v3", 61, 7168, 128, 128, 0, 18432, 129280, false, 256, 8, 2048, 1, 3, 1536, 0, kFp8, kFp8},
    {"DeepSeek-V3.1", "deepseek_v3", 61, 7168, 128, 128, 0, 18432, 129280, false, 256, 8, 2048, 1, 3, 1536, 0, kFp8, kFp8},
    {"DeepSeek-R1", "deepseek_v3", 61, 7168, 128, 128, 0, 18432, 129280, false, 256, 8, 2048, 1, 3, 1536, 0, kFp8, kFp8},
    {"Kimi-K2-Instruct", "deepseek_v3", 61, 7168, 64, 64, 0, 18432, 163840, false, 384, 8, 2048, 1, 1, 1536, 0, kFp8, kFp8},
    {"Kimi-K2-Thinking", "deepseek_v3", 61, 7168, 64, 64, 0, 18432, 163840, false, 384, 8, 2048, 1, 1, 1536, 0, kInt4},
    {"Kimi-K2.5", "deepseek_v3", 61, 7168, 64, 64, 0, 18432, 163840, false, 384, 8, 2048, 1, 1, 1536, 0, kInt4},
    {"Kimi-K2.6", "deepseek_v3", 61, 7168, 64, 64, 0, 18432, 163840, false, 384, 8, 2048, 1, 1, 1536, 0, kInt4},
    {"DeepSeek-V4-Flash", "deepseek_v4", 43, 4096, 64, 1, 512, 0, 129280, false, 256, 6, 2048, 1, 0, 1024, 8, kMxFp4, kFp8},
    {"DeepSeek-V4-Pro", "deepseek_v4", 61, 7168, 128, 1, 512, 0, 129280, false, 384, 6, 3072, 1, 0, 1536, 16, kMxFp4, kFp8},
    {"gpt-oss-20b", "gpt_oss", 24, 2880, 64, 8, 64, 2880, 201088, false, 32, 4, 2880, 0, 0, 0, 0, kMxFp4},
    {"gpt-oss-120b", "gpt_oss", 36, 2880, 64, 8, 64, 2880, 201088, false, 128, 4, 2880, 0, 0, 0, 0, kMxFp4},
    {"GLM-4.5-Air", "glm4_moe", 46, 4096, 96, 8, 128, 10944, 151552, false, 128, 8, 1408, 1, 1},
    {"GLM-4.5", "glm4_moe", 92, 5120, 96, 8, 128, 12288, 151552, false, 160, 8, 1536, 1, 3},
};

// clang-format on

bool engine_runs(const std::string& family) {
    return family == "llama" || family == "qwen2" || family == "qwen3" || family == "qwen3_moe";
}

// One entry for each shape and name, in the order of the first.
void add_matrix(PlanModel& m, PlanMatrix matrix) {
    for (PlanMatrix& known : m.matrices) {
        if (known.leaf == matrix.leaf && known.rows == matrix.rows && known.cols == matrix.cols &&
            known.format == matrix.format && known.expert == matrix.expert &&
            known.group_size == matrix.group_size) {
            known.count += matrix.count;
            return;
        }
    }
    m.matrices.push_back(std::move(matrix));
}

// A model that the engine runs.
PlanModel model_of(const std::string& name, const ModelConfig& c, const FormatOf& format_of) {
    USER_CHECK(
        c.num_expert_layers() * c.num_experts <= 1 << 20,
        "{}: {} experts in {} layers are more than any model has; the config is damaged.",
        name,
        c.num_experts,
        c.num_expert_layers()
    );
    PlanModel m;
    m.name = name;
    m.family = c.family;
    m.runs = true;
    m.config = c;
    m.num_layers = c.num_layers;
    m.expert_layers = c.num_expert_layers();
    m.width = c.width;
    m.vocabulary = c.vocab_size;
    m.experts = c.num_experts;
    m.experts_per_token = c.experts_per_token;
    m.expert_width = c.expert_width;
    m.mlp_width = c.mlp_width;
    m.kv_shards = c.num_kv_heads;
    m.kv_token_bytes = static_cast<double>(c.num_layers * 4 * c.num_kv_heads * c.head_dim);
    for (const ExpectedWeight& weight : expected_weights(c)) {
        if (weight.shape.size() == 1) {
            m.vector_params += static_cast<double>(weight.shape[0]);
            m.vector_bytes += 4 * static_cast<double>(weight.shape[0]);
            continue;
        }
        const MatrixFormat format = format_of(weight);
        const std::string module = weight.name.substr(0, weight.name.rfind('.'));
        PlanMatrix matrix;
        matrix.leaf = module.substr(module.rfind('.') + 1);
        matrix.rows = weight.shape[0];
        matrix.cols = weight.shape[1];
        matrix.count = 1;
        matrix.format = format.format;
        matrix.group_size = format.group_size;
        matrix.expert = module.find(".experts.") != std::string::npos;
        matrix.linear = weight.linear;
        matrix.attention = module.find(".self_attn.") != std::string::npos;
        add_matrix(m, std::move(matrix));
    }
    return m;
}

ModelConfig config_of(const Shape& s) {
    ModelConfig c;
    apply_family(c, s.family, s.name);
    c.width = s.width;
    c.mlp_width = s.mlp;
    c.num_layers = s.layers;
    c.num_heads = s.heads;
    c.num_kv_heads = s.kv_heads;
    c.head_dim = s.head_dim;
    c.vocab_size = s.vocab;
    c.max_positions = 32768;
    c.tied_embeddings = s.tied;
    c.num_experts = s.experts;
    c.experts_per_token = s.selected;
    c.expert_width = s.expert_width;
    return c;
}

// The families that are planned, but do not run yet.
class Builder {
  public:
    explicit Builder(const Shape& shape) : s_(shape) {
        m_.name = s_.name;
        m_.family = s_.family;
        m_.num_layers = s_.layers;
        m_.expert_layers = s_.layers - s_.dense_layers;
        m_.width = s_.width;
        m_.vocabulary = s_.vocab;
        m_.experts = s_.experts;
        m_.experts_per_token = s_.selected;
        m_.expert_width = s_.expert_width;
        m_.shared_experts = s_.shared;
        m_.mlp_width = s_.mlp;
        plain("embedding", s_.vocab, s_.width, 1);
        plain("head", s_.vocab, s_.width, s_.tied ? 0 : 1);
        vectors(s_.width, 2 * s_.layers + 1);
    }

    PlanModel build() {
        if (m_.family == "deepseek_v3") {
            latent_attention();
        } else if (m_.family == "deepseek_v4") {
            compressed_attention();
        } else {
            grouped_attention();
        }
        mlps();
        return std::move(m_);
    }

  private:
    void matrix(
        const char* leaf,
        int64_t rows,
        int64_t cols,
        int64_t count,
        WeightFormat format,
        bool expert,
        bool linear,
        bool attention
    ) {
        if (count > 0) {
            add_matrix(m_, {leaf, rows, cols, count, format, 32, expert, linear, attention});
        }
    }

    void plain(const char* leaf, int64_t rows, int64_t cols, int64_t count) {
        matrix(leaf, rows, cols, count, kBF16, false, false, false);
    }

    void attention(const char* leaf, int64_t rows, int64_t cols) {
        matrix(leaf, rows, cols, s_.layers, s_.linear_format, false, true, true);
    }

    void vectors(int64_t length, int64_t count) {
        m_.vector_params += static_cast<double>(length * count);
        m_.vector_bytes += 4 * static_cast<double>(length * count);
    }

    // models.md 5.1; rope 64, nope and value 128, latent 512.
    void latent_attention() {
        constexpr int64_t kLatent = 512;
        attention("q_a_proj", s_.q_lora, s_.width);
        attention("q_b_proj", s_.heads * 192, s_.q_lora);
        attention("kv_a_proj_with_mqa", kLatent + 64, s_.width);
        attention("kv_b_proj", s_.heads * 256, kLatent);
        attention("o_proj", s_.width, s_.heads * 128);
        vectors(s_.q_lora + kLatent, s_.layers);
        m_.kv_token_bytes = static_cast<double>(s_.layers * (kLatent + 64) * 2);
    }

    // models.md 6: every layer but the first has a compressor; CSA and HCA in turn.
    void compressed_attention() {
        const int64_t csa = (s_.layers - 1) / 2;
        const int64_t hca = s_.width == 4096 ? csa - 1 : csa + 1;
        attention("wq_a", s_.q_lora, s_.width);
        attention("wq_b", s_.heads * 512, s_.q_lora);
        attention("wkv", 512, s_.width);
        matrix("wo_a", s_.o_groups * 1024, 4096, s_.layers, s_.linear_format, false, false, false);
        attention("wo_b", s_.width, s_.o_groups * 1024);
        plain("compressor", 1024, s_.width, 2 * csa);
        plain("compressor", 512, s_.width, 2 * hca);
        matrix("indexer.wq_b", 8192, s_.q_lora, csa, s_.linear_format, false, false, false);
        plain("indexer.weights_proj", 64, s_.width, csa);
        plain("indexer.compressor", 256, s_.width, 2 * csa);
        vectors(4 * 1024 + 4 * 256, csa);
        vectors(128 * 512, hca);
        vectors(2 * 24 * 4 * s_.width, s_.layers);  // mixing of the residual streams
        vectors(2 * s_.vocab * s_.selected, 3);     // int64 tables of the hash layers
        m_.streams = 4;
        m_.kv_token_bytes =
            static_cast<double>(csa * (1024 + 256)) / 4 + static_cast<double>(hca * 1024) / 128;
        const int64_t pending = csa * 8 * (2048 + 512) * 4 + hca * 128 * 1024 * 4;
        m_.kv_sequence_bytes = static_cast<double>(128 * 1024 * s_.layers + pending);
    }

    void grouped_attention() {
        attention("q_proj", s_.heads * s_.head_dim, s_.width);
        attention("k_proj", s_.kv_heads * s_.head_dim, s_.width);
        attention("v_proj", s_.kv_heads * s_.head_dim, s_.width);
        attention("o_proj", s_.width, s_.heads * s_.head_dim);
        vectors((s_.heads + 2 * s_.kv_heads) * s_.head_dim, s_.layers);
        const int64_t layer = 4 * s_.kv_heads * s_.head_dim;
        m_.kv_shards = s_.kv_heads;
        m_.kv_token_bytes = static_cast<double>(s_.layers * layer);
        if (m_.family == "gpt_oss") {  // half of the layers see 128 tokens
            m_.kv_token_bytes /= 2;
            m_.kv_sequence_bytes = static_cast<double>(s_.layers / 2 * 128 * layer);
        }
    }

    void mlps() {
        const int64_t moe = s_.layers - s_.dense_layers;
        const auto three = [&](int64_t width, int64_t count, WeightFormat format, bool expert) {
            matrix("gate_proj", width, s_.width, count, format, expert, true, false);
            matrix("up_proj", width, s_.width, count, format, expert, true, false);
            matrix("down_proj", s_.width, width, count, format, expert, true, false);
        };
        three(s_.mlp, s_.dense_layers, s_.linear_format, false);
        three(s_.expert_width * s_.shared, s_.shared > 0 ? moe : 0, s_.linear_format, false);
        three(s_.expert_width, moe * s_.experts, s_.expert_format, true);
        plain("router", s_.experts, s_.width, moe);
        vectors(s_.experts, moe);
        if (m_.family == "gpt_oss") {
            const int64_t biases = 2 * s_.expert_width + s_.width;
            m_.vector_params += static_cast<double>(moe * s_.experts * biases);
            m_.vector_bytes += 2 * static_cast<double>(moe * s_.experts * biases);
        }
    }

    Shape s_;
    PlanModel m_;
};

PlanModel model_of(const Shape& s) {
    return engine_runs(s.family)
               ? model_of(s.name, config_of(s), [](const auto&) { return MatrixFormat{}; })
               : Builder(s).build();
}

std::string lowered(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) {
        return static_cast<char>(std::tolower(c));
    });
    return text;
}

const Shape* find_shape(const std::string& model) {
    const std::string name = lowered(model.substr(model.rfind('/') + 1));
    for (const Shape& shape : kShapes) {
        if (lowered(shape.name) == name) {
            return &shape;
        }
    }
    return nullptr;
}

// Whether an entry of compressed-tensors' ignore list, a name or "re:PATTERN" matched from the
// start, leaves a module as it is.
bool is_ignored(const json& entry, const std::string& module) {
    if (!entry.is_string()) {
        return false;
    }
    const auto text = entry.get<std::string>();
    if (!text.starts_with("re:")) {
        return text == module;
    }
    PeftConfig pattern;
    pattern.path = "quantization_config.ignore";
    pattern.target_regex = "(?:" + text.substr(3) + ").*";
    return selects_module(pattern, module);
}

// What the config alone says about the formats.
FormatOf config_formats(const json& config) {
    json quantization = config.value("quantization_config", json::object());
    if (!quantization.is_object()) {
        quantization = json::object();
    }
    const auto text = [&](const char* key) {
        const auto found = quantization.find(key);
        return found != quantization.end() && found->is_string() ? found->get<std::string>() : "";
    };
    MatrixFormat packed;
    const std::string format = text("format");
    if (text("quant_method") == "fp8") {
        packed.format = kFp8;
    } else if (format == "pack-quantized") {
        packed.format = kInt4;
    } else if (format == "mxfp4-pack-quantized") {
        packed.format = kMxFp4;
    } else if (format == "nvfp4-pack-quantized" || text("quant_algo") == "NVFP4") {
        packed.format = WeightFormat::kNvFp4;
    }
    const json ignore = quantization.contains("ignore") ? quantization["ignore"] : json::array();
    return [packed, ignore](const ExpectedWeight& weight) {
        const std::string module = weight.name.substr(0, weight.name.rfind('.'));
        const bool plain =
            !weight.linear || std::any_of(ignore.begin(), ignore.end(), [&](const json& entry) {
                return is_ignored(entry, module);
            });
        return plain ? MatrixFormat{} : packed;
    };
}

bool has_weights(const std::string& folder) {
    return file_exists(folder + "/model.safetensors") ||
           file_exists(folder + "/model.safetensors.index.json");
}

// The published model of the same family and size, for families that are only planned.
const Shape* shape_of_config(const json& config) {
    const auto integer = [](const json& object, const char* key) {
        const auto found = object.find(key);
        return found != object.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
    };
    const json& text = config.contains("text_config") && config["text_config"].is_object()
                           ? config["text_config"]
                           : config;
    for (const Shape& s : kShapes) {
        const int64_t experts =
            std::max(integer(text, "n_routed_experts"), integer(text, "num_local_experts"));
        if (!engine_runs(s.family) && integer(text, "num_hidden_layers") == s.layers &&
            integer(text, "hidden_size") == s.width &&
            integer(text, "num_attention_heads") == s.heads && experts == s.experts) {
            return &s;
        }
    }
    return nullptr;
}

PlanModel model_of_folder(const std::string& folder) {
    const std::string path = folder + "/config.json";
    const json config = json::parse(read_file(path), nullptr, false);
    USER_CHECK(config.is_object(), "{} is not a JSON object; fetch the file again.", path);
    const auto type = config.find("model_type");
    const std::string family =
        type != config.end() && type->is_string() ? type->get<std::string>() : "";
    if (!engine_runs(family)) {
        const Shape* shape = shape_of_config(config);
        USER_CHECK(
            shape != nullptr,
            "{}: the family \"{}\" is planned only in the sizes that orbit plan knows by name; "
            "orbit plan --help lists them.",
            path,
            family
        );
        return model_of(*shape);
    }
    const HfConfig parsed = parse_hf_config(config.dump(), path);
    if (!has_weights(folder)) {
        return model_of(folder, parsed.model, config_formats(config));
    }
    const Checkpoint checkpoint = open_checkpoint(folder, {.tokenizer = false});
    return model_of(folder, checkpoint.config, placed_formats(checkpoint, {}));
}

void apply_format(PlanModel& m, const std::string& format) {
    if (format.empty()) {
        return;
    }
    WeightFormat wanted = kBF16;
    if (format == "int4") {
        wanted = kInt4;
    } else if (format == "fp8") {
        wanted = kFp8;
    } else if (format == "mxfp4") {
        wanted = kMxFp4;
    } else if (format == "nvfp4") {
        wanted = WeightFormat::kNvFp4;
    } else {
        USER_CHECK(
            format == "bf16",
            "--format {} is unknown; it is one of bf16, int4, fp8, mxfp4, nvfp4.",
            format
        );
    }
    for (PlanMatrix& matrix : m.matrices) {
        if (m.experts > 0 ? matrix.expert : matrix.linear) {
            matrix.format = wanted;
            matrix.group_size = 32;
        }
    }
}

}  // namespace

double PlanMatrix::params() const {
    return static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(count);
}

double PlanMatrix::bytes() const {
    QuantizedMatrix w;
    w.format = format;
    w.rows = rows;
    w.cols = cols;
    w.group_size = group_size;
    return static_cast<double>(w.bytes()) * static_cast<double>(count);
}

double PlanModel::params() const {
    double sum = vector_params;
    for (const PlanMatrix& matrix : matrices) {
        sum += matrix.params();
    }
    return sum;
}

double PlanModel::expert_params() const {
    double sum = 0;
    for (const PlanMatrix& matrix : matrices) {
        sum += matrix.expert ? matrix.params() : 0;
    }
    return sum;
}

double PlanModel::expert_bytes() const {
    double sum = 0;
    for (const PlanMatrix& matrix : matrices) {
        sum += matrix.expert ? matrix.bytes() : 0;
    }
    return sum;
}

double PlanModel::other_bytes() const {
    double sum = vector_bytes;
    for (const PlanMatrix& matrix : matrices) {
        sum += matrix.expert ? 0 : matrix.bytes();
    }
    return sum;
}

std::vector<std::string> planned_models() {
    std::vector<std::string> names;
    for (const Shape& shape : kShapes) {
        names.emplace_back(shape.name);
    }
    return names;
}

PlanModel plan_model(const std::string& model, const std::string& format) {
    PlanModel m;
    if (is_directory(model)) {
        USER_CHECK(file_exists(model + "/config.json"), "{} has no config.json.", model);
        m = model_of_folder(model);
    } else if (file_exists(model)) {
        const Checkpoint checkpoint = open_checkpoint(model, {.tokenizer = false});
        m = model_of(model, checkpoint.config, placed_formats(checkpoint, {}));
    } else {
        const Shape* shape = find_shape(model);
        const std::string nearest = nearest_name(model, planned_models());
        USER_CHECK(
            shape != nullptr,
            "there is no folder, file or known model \"{}\"{}; orbit plan --help lists the names.",
            model,
            nearest.empty() ? "" : fmt::format(" (did you mean \"{}\"?)", nearest)
        );
        m = model_of(*shape);
    }
    apply_format(m, format);
    return m;
}

}  // namespace orbit

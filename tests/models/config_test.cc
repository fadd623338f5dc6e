// Shapes, windows, counts and FLOPs of a configuration against published values; what it refuses; JSON.
#include "models/config.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"

namespace flexchat {
namespace {

GptConfig classic(int64_t depth) {
  const int64_t n_head = (64 * depth + 127) / 128;
  return {Arch::classic, 2048, 65536, depth, n_head, n_head, 64 * depth, "SSSL"};
}

GptConfig modern(int64_t depth) {
  const int64_t n_head = depth / 2;
  return {Arch::modern, 2048, 32768, depth, n_head, n_head, 128 * n_head, "SSSL"};
}

// vocab_size that needs padding, grouped heads, windows shorter than the sequence.
GptConfig tiny() { return {Arch::modern, 256, 250, 4, 4, 2, 64, "SSSL"}; }

std::string refusal(const GptConfig& config) {
  try {
    config.validate();
  } catch (const Error& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Config, ClassicCountsAndFlops) {
  EXPECT_EQ(count_params(classic(12)).total(), 185'597'952);
  EXPECT_EQ(count_params(classic(20)).total(), 560'988'160);
  EXPECT_EQ(count_params(classic(32)).total(), 1'879'048'192);
  EXPECT_EQ(flops_per_token(classic(12)), 1'038'090'240.0);
  EXPECT_EQ(flops_per_token(classic(20)), 3'491'758'080.0);
  EXPECT_EQ(flops_per_token(classic(32)), 12'079'595'520.0);
}

TEST(Config, ModernCountsAndFlops) {
  EXPECT_EQ(count_params(modern(12)).total(), 286'261'730);
  EXPECT_EQ(count_params(modern(20)).total(), 896'533'746);
  EXPECT_EQ(count_params(modern(24)).total(), 1'384'122'122);
  EXPECT_EQ(flops_per_token(modern(12)), 759'696'048.0);
  EXPECT_EQ(flops_per_token(modern(20)), 2'886'212'784.0);
  EXPECT_EQ(flops_per_token(modern(24)), 4'775'225'616.0);
}

TEST(Config, ClassicFlopsOfGroupedHeads) {
  EXPECT_EQ(flops_per_token({Arch::classic, 64, 256, 3, 4, 2, 64, ""}), 1'056'768.0);
  EXPECT_EQ(flops_per_token({Arch::classic, 48, 256, 2, 4, 4, 64, ""}), 761'856.0);
}

TEST(Config, CountsByKind) {
  const ParamCounts n = count_params(tiny());
  EXPECT_EQ(n.wte, 256 * 64);
  EXPECT_EQ(n.lm_head, 256 * 64);
  EXPECT_EQ(n.value_embeds, 2 * 256 * 32);
  EXPECT_EQ(n.transformer_matrices, 4 * (2 * 64 * 64 + 2 * 32 * 64 + 8 * 64 * 64) + 2 * 2 * 12);
  EXPECT_EQ(n.scalars, 4 + 4 + 24 + 1 + 1);
  const ParamCounts c = count_params({Arch::classic, 256, 250, 4, 4, 2, 64, "SSSL"});
  EXPECT_EQ(c.value_embeds + c.scalars, 0);
  EXPECT_EQ(c.transformer_matrices, n.transformer_matrices - 48);
}

TEST(Config, InferenceFlopsAndBytes) {
  EXPECT_EQ(flops_per_token(tiny()), 1'671'600.0);
  EXPECT_EQ(decode_flops_per_token(tiny(), 10), 403'600.0);
  EXPECT_EQ(decode_flops_per_token(tiny(), 200), 542'864.0);
  EXPECT_EQ(decode_flops_per_token(tiny(), 1000), 557'200.0);
  EXPECT_EQ(prefill_flops(tiny(), 10), 3'989'920.0);
  EXPECT_EQ(prefill_flops(tiny(), 200), 97'236'096.0);
  EXPECT_EQ(prefill_flops(tiny(), 1000), 542'601'856.0);
  EXPECT_EQ(kv_bytes_per_token(tiny(), DType::bf16), 512);
  EXPECT_EQ(kv_bytes_per_token(tiny(), DType::f32), 1024);
  EXPECT_EQ(kv_bytes_read(tiny(), 10, DType::bf16), 5120);
  EXPECT_EQ(kv_bytes_read(tiny(), 200, DType::bf16), 74'752);
  EXPECT_EQ(kv_bytes_read(tiny(), 1000, DType::bf16), 81'920);
  // Classic layers see everything.
  EXPECT_EQ(decode_flops_per_token(classic(12), 5000) - decode_flops_per_token(classic(12), 4999),
            4.0 * 12 * 768);
}

TEST(Config, Windows) {
  GptConfig config = modern(12);
  for (const auto& [length, expected] :
       {std::pair{2048, 512}, {4096, 1024}, {1024, 256}, {512, 128}, {513, 256}, {64, 128}, {1, 128}}) {
    config.sequence_len = length;
    EXPECT_EQ(config.window(0), expected) << length;
    EXPECT_EQ(config.window(3), length);
  }
  config.window_pattern = "sL";
  config.sequence_len = 2048;
  config.n_layer = 3;
  EXPECT_EQ(config.window(0), 512);
  EXPECT_EQ(config.window(1), 2048);
  EXPECT_EQ(config.window(2), 2048) << "the last layer is long whatever its letter";
  EXPECT_EQ(classic(12).window(0), -1);
}

TEST(Config, ValueEmbeddingsAlternateAndEndWithTheLastLayer) {
  GptConfig config = tiny();
  for (int64_t n_layer : {1, 2, 5, 6}) {
    config.n_layer = n_layer;
    for (int64_t i = 0; i < n_layer; ++i)
      EXPECT_EQ(config.has_value_embedding(i), (n_layer - 1 - i) % 2 == 0);
  }
  EXPECT_FALSE(classic(12).has_value_embedding(11));
}

TEST(Config, PaddedVocabulary) {
  GptConfig config;
  for (const auto& [size, padded] : {std::pair{1, 64}, {64, 64}, {65, 128}, {50257, 50304}, {65536, 65536}}) {
    config.vocab_size = size;
    EXPECT_EQ(config.padded_vocab(), padded);
  }
}

TEST(Config, RefusesWhatCannotBeBuilt) {
  EXPECT_EQ(refusal(tiny()), "accepted");
  EXPECT_EQ(refusal(classic(12)), "accepted");
  GptConfig c = tiny();
  c.n_head = 5;
  EXPECT_EQ(refusal(c), "n_head 5 must divide n_embd 64");
  c = tiny();
  c.n_kv_head = 3;
  EXPECT_EQ(refusal(c), "n_kv_head 3 must divide n_head 4");
  c.n_kv_head = 8;
  EXPECT_EQ(refusal(c), "n_kv_head 8 must divide n_head 4");
  c = tiny();
  c.n_embd = 60;
  EXPECT_EQ(refusal(c), "the head dimension n_embd / n_head = 60 / 4 = 15 must be even");
  c = tiny();
  c.n_embd = 16;
  EXPECT_NE(refusal(c).find("at least 24"), std::string::npos);
  c.arch = Arch::classic;
  EXPECT_EQ(refusal(c), "accepted");
  for (const char* pattern : {"", "SSX", "S L"}) {
    c = tiny();
    c.window_pattern = pattern;
    EXPECT_NE(refusal(c).find("window_pattern"), std::string::npos) << pattern;
  }
  for (int64_t GptConfig::*member : {&GptConfig::sequence_len, &GptConfig::vocab_size, &GptConfig::n_layer,
                                     &GptConfig::n_head, &GptConfig::n_kv_head, &GptConfig::n_embd}) {
    for (int64_t value : {int64_t{0}, int64_t{-1}, int64_t{1} << 40}) {
      c = tiny();
      c.*member = value;
      EXPECT_NE(refusal(c).find("allowed: 1 to"), std::string::npos) << refusal(c);
    }
  }
}

TEST(Config, JsonRoundTrip) {
  EXPECT_EQ(tiny().to_json().dump(),
            R"({"sequence_len":256,"vocab_size":250,"n_layer":4,"n_head":4,"n_kv_head":2,"n_embd":64,)"
            R"("window_pattern":"SSSL"})");
  EXPECT_EQ(GptConfig::from_json(tiny().to_json(), "meta.json"), tiny());
  EXPECT_EQ(GptConfig::from_json(classic(20).to_json(), "meta.json"), classic(20));
  EXPECT_FALSE(classic(20).to_json().contains("window_pattern"));
}

TEST(Config, JsonErrorsNameFileAndKey) {
  const auto refuse = [](Json object) -> std::string {
    try {
      GptConfig::from_json(object, "meta.json");
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  Json object = tiny().to_json();
  object.erase("n_kv_head");
  EXPECT_EQ(refuse(object), "meta.json: the model configuration lacks 'n_kv_head'");
  object = tiny().to_json();
  object["n_layers"] = 3;
  EXPECT_EQ(refuse(object),
            "meta.json: unknown model configuration key 'n_layers' (did you mean 'n_layer'?)");
  object = tiny().to_json();
  object["n_embd"] = "64";
  EXPECT_EQ(refuse(object), "meta.json: 'n_embd' must be an integer, not \"64\"");
  object["n_embd"] = 64.0;
  EXPECT_EQ(refuse(object), "meta.json: 'n_embd' must be an integer, not 64.0");
  object = tiny().to_json();
  object["window_pattern"] = 1;
  EXPECT_EQ(refuse(object), "meta.json: 'window_pattern' must be a string, not 1");
  object = tiny().to_json();
  object["n_head"] = 3;
  EXPECT_EQ(refuse(object), "meta.json: n_head 3 must divide n_embd 64");
  EXPECT_EQ(refuse(Json::array()), "meta.json: the model configuration must be a JSON object");
}

TEST(Config, ArchNames) {
  EXPECT_EQ(parse_arch("classic"), Arch::classic);
  EXPECT_EQ(parse_arch(arch_name(Arch::modern)), Arch::modern);
  EXPECT_THROW(parse_arch("Modern"), Error);
}

}  // namespace
}  // namespace flexchat

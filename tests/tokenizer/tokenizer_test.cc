// Encoding and decoding: the golden cases, a slow reference, threads, and tokenizer files good and bad.
#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "base/parallel.h"
#include "support/temp_folder.h"
#include "tokenizer/bpe_train.h"
#include "tokenizer/reference.h"
#include "tokenizer/split.h"

namespace flexchat {
namespace {

using Ids = std::vector<int32_t>;

nlohmann::json golden() {
  return nlohmann::json::parse(read_file(FLEXCHAT_TEST_DATA "/tokenizer_cases.json"));
}
Tokenizer golden_tokenizer() { return Tokenizer::load(FLEXCHAT_TEST_DATA "/tokenizer_cases.json"); }

// Trained on random text, so that its merges fit other random text.
Tokenizer trained(int64_t n_merges, uint64_t seed) {
  Rng rng(seed);
  BpeTrainOptions options;
  options.n_tokens = 256 + n_merges;
  int documents = 0;
  const BpeTrainResult result = train_bpe(
      [&](std::string& text) {
        text = reference::random_text(rng, 200) + reference::random_letters(rng, 50, 2);
        return ++documents <= 60;
      },
      options);
  return Tokenizer("test", "nanochat", tokens_of_merges(result.merges));
}

Ids reference_ids(const Tokenizer& tokenizer, std::string_view text) {
  const auto ranks = reference::ranks_of(tokenizer.tokens());
  Ids out;
  Splitter(tokenizer.pattern()).for_each(text, [&](std::string_view piece) {
    const Ids ids = reference::encode_piece(ranks, piece);
    out.insert(out.end(), ids.begin(), ids.end());
  });
  return out;
}

TEST(Tokenizer, GoldenCases) {
  const auto cases = golden();
  const Tokenizer tokenizer = golden_tokenizer();
  EXPECT_EQ(tokenizer.vocab_size(), cases["vocab"].get<int64_t>());
  EXPECT_EQ(tokenizer.pattern(), cases["pattern"].get<std::string>());
  EXPECT_EQ(tokenizer.bos(), 591);
  ASSERT_GT(cases["encode"].size(), 10u);
  for (const auto& entry : cases["encode"]) {
    const std::string text = entry[0];
    const Ids ids = entry[1];
    EXPECT_EQ(tokenizer.encode(text), ids) << text;
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
}

TEST(Tokenizer, EqualsTheSlowEncoder) {
  const Tokenizer tokenizer = trained(300, 21);
  Rng rng(22);
  for (int i = 0; i < 400; ++i) {
    std::string text = reference::random_text(rng, rng.below(30));
    // Pieces around the lengths where the encoder changes its method.
    text.append(1, ' ').append(reference::random_letters(rng, 1 + rng.below(24), 3));
    text.append(1, ' ').append(reference::random_letters(rng, 56 + rng.below(16), 2));
    if (i % 20 == 0) text += reference::random_letters(rng, 300, 2);
    ASSERT_EQ(tokenizer.encode(text), reference_ids(tokenizer, text)) << testing::PrintToString(text);
    ASSERT_EQ(tokenizer.decode_bytes(tokenizer.encode(text)), text);
  }
}

TEST(Tokenizer, MergesEveryPairThatMakesAToken) {
  // "abc" was made from (a, bc), but tiktoken looks up bytes: (ab, c) makes it as well.
  std::vector<std::string> tokens;
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  tokens.insert(tokens.end(), {"ab", "bc", "abc", "abcab"});
  const Tokenizer tokenizer("t", "nanochat", tokens);
  EXPECT_EQ(tokenizer.encode("abcx"), (Ids{258, 'x'}));
  EXPECT_EQ(tokenizer.encode("abcabcx"), (Ids{258, 258, 'x'}));
  EXPECT_EQ(tokenizer.encode("abcab"), (Ids{259}));  // the whole piece
  EXPECT_EQ(tokenizer.encode("abcabx"), (Ids{259, 'x'}));
}

TEST(Tokenizer, ByteOrderOfRanksIsFree) {
  std::vector<std::string> tokens{"ab"};
  for (int byte = 255; byte >= 0; --byte) tokens.emplace_back(1, static_cast<char>(byte));
  const Tokenizer tokenizer("t", "nanochat", tokens);
  EXPECT_EQ(tokenizer.encode("abb"), (Ids{0, 256 - 'b'}));
}

TEST(Tokenizer, VeryLongPiecesAreFast) {
  const Tokenizer tokenizer = golden_tokenizer();
  const std::string text(1'000'000, 'a');
  const Ids ids = tokenizer.encode(text);
  EXPECT_EQ(tokenizer.decode_bytes(ids), text);
}

TEST(Tokenizer, SpecialStringsInTextAreText) {
  const Tokenizer tokenizer = golden_tokenizer();
  for (const int32_t id : tokenizer.encode("<|bos|> <|output_end|>")) EXPECT_FALSE(tokenizer.is_special(id));
  EXPECT_EQ(tokenizer.decode(Ids{tokenizer.bos(), 'a'}), "<|bos|>a");
}

TEST(Tokenizer, PrependAndAppend) {
  const Tokenizer tokenizer = golden_tokenizer();
  EncodeOptions options;
  options.prepend = tokenizer.bos();
  options.append = tokenizer.special("<|user_end|>");
  EXPECT_EQ(tokenizer.encode("", options), (Ids{591, 593}));
  EXPECT_EQ(tokenizer.encode("z", options), (Ids{591, 'z', 593}));
  const std::vector<std::string_view> texts = {"z", ""};
  EXPECT_EQ(tokenizer.encode_batch(texts, options), (std::vector<Ids>{{591, 'z', 593}, {591, 593}}));
}

TEST(Tokenizer, BatchEqualsSinglesForAnyNumberOfThreads) {
  const Tokenizer tokenizer = trained(200, 23);
  Rng rng(24);
  std::vector<std::string> texts;
  for (int i = 0; i < 500; ++i) texts.push_back(reference::random_text(rng, rng.below(80)));
  texts[100] = "bad \xFF\xFF";
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  std::vector<Ids> expected;
  for (const auto text : views) expected.push_back(tokenizer.encode(text));
  const int before = num_threads();
  for (const int n : {1, 2, 5}) {
    set_num_threads(n);
    int64_t replaced = 0;
    EncodeOptions options;
    options.replaced = &replaced;
    EXPECT_EQ(tokenizer.encode_batch(views, options), expected);
    EXPECT_EQ(replaced, 2);
  }
  set_num_threads(before);
  EXPECT_TRUE(tokenizer.encode_batch({}).empty());
}

TEST(Tokenizer, InvalidUtf8) {
  const Tokenizer tokenizer = golden_tokenizer();
  int64_t replaced = 3;
  EncodeOptions options;
  options.replaced = &replaced;
  EXPECT_EQ(tokenizer.encode("a\xE4\xBDz", options), tokenizer.encode("a\uFFFDz"));
  EXPECT_EQ(replaced, 4);
  EXPECT_EQ(tokenizer.decode(Ids{0xE4, 0xBD, 'z'}), "\uFFFDz");
  EXPECT_EQ(tokenizer.decode_bytes(Ids{0xE4, 0xBD, 'z'}), "\xE4\xBDz");
}

TEST(Tokenizer, TokenBytes) {
  const Tokenizer tokenizer = golden_tokenizer();
  const std::vector<int32_t> bytes = tokenizer.token_bytes();
  ASSERT_EQ(static_cast<int64_t>(bytes.size()), tokenizer.vocab_size());
  EXPECT_EQ(bytes[0xC3], 1);
  EXPECT_EQ(bytes[300], static_cast<int32_t>(tokenizer.token(300).size()));
  for (size_t id = 591; id < 600; ++id) EXPECT_EQ(bytes[id], 0);
}

TEST(Tokenizer, UnknownIdsAndSpecials) {
  const Tokenizer tokenizer = golden_tokenizer();
  EXPECT_NE(message_of<Error>([&] { tokenizer.decode(Ids{600}); }).find("600"), std::string::npos);
  EXPECT_NE(message_of<Error>([&] { tokenizer.decode(Ids{-1}); }).find("-1"), std::string::npos);
  EXPECT_NE(message_of<Error>([&] { tokenizer.special("<|boss|>"); }).find("did you mean '<|bos|>'"),
            std::string::npos);
}

TEST(Tokenizer, SaveAndLoad) {
  const TempFolder folder;
  const Tokenizer tokenizer = trained(100, 25);
  tokenizer.save(folder / "deep/tok");
  const Tokenizer loaded = Tokenizer::load(folder / "deep/tok");
  EXPECT_EQ(loaded.name(), "test");
  EXPECT_EQ(loaded.tokens(), tokenizer.tokens());
  EXPECT_EQ(loaded.special_tokens(), chat_special_tokens());
  EXPECT_EQ(loaded.pattern(), kNanochatPattern);
  EXPECT_EQ(loaded.encode("naive caf\u00E9 42"), tokenizer.encode("naive caf\u00E9 42"));
  const std::string written = read_file(folder / "deep/tok/tokenizer.json");
  loaded.save(folder / "deep/tok");
  EXPECT_EQ(read_file(folder / "deep/tok/tokenizer.json"), written);
  EXPECT_NE(message_of<Error>([&] { Tokenizer::load(folder / "none"); }).find("none"), std::string::npos);
  EXPECT_NE(message_of<Error>([&] { Tokenizer::load(folder / "deep"); }).find("deep/tokenizer.json"),
            std::string::npos);
}

// A good file with one thing changed.
nlohmann::json own_file() {
  const TempFolder folder;
  golden_tokenizer().save(folder.path());
  return nlohmann::json::parse(read_file(folder / "tokenizer.json"));
}

TEST(Tokenizer, BadOwnFiles) {
  using Change = std::function<void(nlohmann::json&)>;
  const std::vector<std::pair<Change, std::string>> cases = {
      {[](auto& j) { j["format"] = "other"; }, "format is 'other'"},
      {[](auto& j) { j["version"] = 2; }, "version is 2"},
      {[](auto& j) { j["version"] = "1"; }, "version is \"1\""},
      {[](auto& j) { j.erase("pattern"); }, "'pattern' is missing"},
      {[](auto& j) { j["pattern"] = "("; }, "split pattern '('"},
      {[](auto& j) { j["patern"] = "("; }, "unknown key 'patern' (did you mean 'pattern'?)"},
      {[](auto& j) { j["tokens"] = 3; }, "'tokens' must be a list"},
      {[](auto& j) { j["tokens"][5] = 3; }, "tokens[5] is number"},
      {[](auto& j) { j["tokens"][5] = "0x"; }, "tokens[5] is '0x'"},
      {[](auto& j) { j["tokens"][5] = "052"; }, "tokens[5] is '052'"},
      {[](auto& j) { j["tokens"][5] = ""; }, "tokens[5] is ''"},
      {[](auto& j) { j["tokens"][300] = "41"; }, "tokens 65 and 300 are the same bytes 41"},
      {[](auto& j) { j["tokens"][65] = "4141414141"; }, "no token for the single byte 41"},
      {[](auto& j) { j["special_tokens"][1] = "<|bos|>"; }, "'<|bos|>' is given twice"},
      {[](auto& j) { j["special_tokens"][1] = ""; }, "special token must be non-empty"},
      {[](auto& j) { j["special_tokens"][1] = 7; }, "special_tokens[1] is number"},
      {[](auto& j) { j["name"] = nullptr; }, "'name' is null"},
  };
  for (const auto& [change, expected] : cases) {
    nlohmann::json file = own_file();
    change(file);
    const std::string message = message_of<Error>([&] { Tokenizer::parse(file.dump(), "tok.json"); });
    EXPECT_EQ(message.find("tok.json: "), 0u) << expected;
    EXPECT_NE(message.find(expected), std::string::npos) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

TEST(Tokenizer, BadRankFiles) {
  using Change = std::function<void(nlohmann::json&)>;
  const std::vector<std::pair<Change, std::string>> cases = {
      {[](auto& j) { j["ranks_hex"]["41"] = 66; }, "repeats the rank 66"},
      {[](auto& j) { j["ranks_hex"].erase("41"); }, "must be a rank in [0, 590)"},
      {[](auto& j) { j["ranks_hex"]["41"] = 591; }, "ranks_hex['41'] is 591"},
      {[](auto& j) { j["ranks_hex"]["41"] = -1; }, "ranks_hex['41'] is -1"},
      {[](auto& j) { j["ranks_hex"]["41"] = 65.5; }, "ranks_hex['41'] is 65.5"},
      {[](auto& j) { j["ranks_hex"]["4g"] = 591; }, "ranks_hex['4g'] is '4g'"},
      {[](auto& j) { j["ranks_hex"] = 1; }, "'ranks_hex' must be an object"},
      {[](auto& j) { j.erase("pattern"); }, "'pat_str' is missing"},
      {[](auto& j) { j.erase("ranks_hex"); }, "neither a tokenizer"},
      {[](auto& j) {
         j["special"] = {{"<|bos|>", 592}};
       },
       "special['<|bos|>'] is 592"},
      {[](auto& j) { j["special"] = 4; }, "'special' must be a list"},
  };
  for (const auto& [change, expected] : cases) {
    nlohmann::json file = golden();
    change(file);
    const std::string message = message_of<Error>([&] { Tokenizer::parse(file.dump(), "ranks.json"); });
    EXPECT_EQ(message.find("ranks.json: "), 0u) << expected;
    EXPECT_NE(message.find(expected), std::string::npos) << message;
  }
  for (const char* text : {"", "{", "[1]", "3", "{\"format\": 1}", "{\"a\": 1e999}", "\xFF"}) {
    EXPECT_EQ(message_of<Error>([&] { Tokenizer::parse(text, "x"); }).find("x: "), 0u) << text;
  }
}

TEST(Tokenizer, RankFilesMayNameIdsOfSpecials) {
  nlohmann::json file = golden();
  file["pat_str"] = file["pattern"];
  file.erase("pattern");
  file.erase("special");
  file["special_tokens"] = {{"<|b|>", 592}, {"<|z|>", 591}};
  const Tokenizer tokenizer = Tokenizer::parse(file.dump(), "x");
  EXPECT_EQ(tokenizer.special_tokens(), (std::vector<std::string>{"<|z|>", "<|b|>"}));
  EXPECT_EQ(tokenizer.pattern(), kNanochatPattern);
  EXPECT_NE(message_of<Error>([&] { (void)tokenizer.bos(); }).find("<|z|>, <|b|>"), std::string::npos);
}

}  // namespace
}  // namespace flexchat

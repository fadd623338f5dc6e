// Conversations: the golden renderings, truncation, completion prompts, and what is refused.
#include "tokenizer/chat.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

using Ids = std::vector<int32_t>;

Tokenizer tokenizer() { return Tokenizer::load(FLEXCHAT_TEST_DATA "/tokenizer_cases.json"); }

Conversation conversation(const std::string& json) { return parse_conversation(json, "chat"); }

TEST(Chat, GoldenConversations) {
  const auto cases = Json::parse(read_file(FLEXCHAT_TEST_DATA "/tokenizer_cases.json"))["conversations"];
  const Tokenizer t = tokenizer();
  ASSERT_EQ(cases.size(), 3u);
  for (const auto& entry : cases) {
    const auto rendered = render_conversation(t, conversation_from_json(entry["conversation"], "golden"));
    EXPECT_EQ(rendered.ids, entry["ids"].get<Ids>());
    EXPECT_EQ(rendered.mask, entry["mask"].get<std::vector<uint8_t>>());
  }
}

TEST(Chat, PartsAreEncodedApartAndMasked) {
  const Tokenizer t = tokenizer();
  const auto id = [&](const char* token) { return t.special(token); };
  const auto rendered = render_conversation(t, conversation(R"({"messages": [
      {"role": "system", "content": "S"}, {"role": "user", "content": "u"},
      {"role": "assistant", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "e"},
        {"type": "python", "text": "1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": ""}]}]})"));
  Ids expected = {id("<|bos|>"), id("<|user_start|>")};
  for (const int32_t i : t.encode("S\n\nu")) expected.push_back(i);
  const Ids rest = {id("<|user_end|>"),
                    id("<|assistant_start|>"),
                    'H',
                    'e',
                    id("<|python_start|>"),
                    '1',
                    id("<|python_end|>"),
                    id("<|output_start|>"),
                    '2',
                    id("<|output_end|>"),
                    id("<|assistant_end|>")};
  expected.insert(expected.end(), rest.begin(), rest.end());
  EXPECT_EQ(rendered.ids, expected);
  std::vector<uint8_t> mask(expected.size() - rest.size(), 0);
  for (const uint8_t m : {0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1}) mask.push_back(m);
  EXPECT_EQ(rendered.mask, mask);
}

TEST(Chat, CutsOnTheRight) {
  const Tokenizer t = tokenizer();
  const Conversation c = conversation(
      R"({"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xyz"}]})");
  const auto whole = render_conversation(t, c);
  const auto cut = render_conversation(t, c, 5);
  EXPECT_EQ(cut.ids, Ids(whole.ids.begin(), whole.ids.begin() + 5));
  EXPECT_EQ(cut.mask.size(), 5u);
  EXPECT_EQ(render_conversation(t, c, static_cast<int64_t>(whole.ids.size())).ids, whole.ids);
  EXPECT_NE(message_of<Error>([&] { render_conversation(t, c, 0); }).find("0 tokens"), std::string::npos);
  std::string text = R"({"messages": [{"role": "user", "content": ")";
  for (int i = 0; i < 3000; ++i) text += "7 ";
  EXPECT_EQ(render_conversation(t, conversation(text + "\"}]}")).ids.size(), 2048u);
}

TEST(Chat, CompletionDropsTheLastAnswerAndOpensANewOne) {
  const Tokenizer t = tokenizer();
  const Conversation c = conversation(
      R"({"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xyz"}]})");
  Ids expected =
      render_conversation(t, conversation(R"({"messages": [{"role": "user", "content": "abc"}]})")).ids;
  expected.push_back(t.special("<|assistant_start|>"));
  EXPECT_EQ(render_for_completion(t, c), expected);
  EXPECT_EQ(render_for_completion(t, c, 2),
            (Ids{expected[0], expected[1], t.special("<|assistant_start|>")}));
  const Conversation open = conversation(R"({"messages": [{"role": "user", "content": "abc"}]})");
  EXPECT_NE(message_of<Error>([&] { render_for_completion(t, open); }).find("assistant"), std::string::npos);
}

TEST(Chat, BadConversationsAreNamed) {
  const Tokenizer t = tokenizer();
  const std::pair<const char*, const char*> cases[] = {
      {"", "not JSON"},
      {"[]", "must be an object"},
      {"{}", "needs a list 'messages'"},
      {R"({"messages": []})", "at least one user message"},
      {R"({"messages": [3]})", "messages[0] is number"},
      {R"({"messages": [{"content": "x"}]})", "messages[0] has no 'role'"},
      {R"({"messages": [{"role": "user"}]})", "messages[0] has no 'content'"},
      {R"({"messages": [{"role": "usr", "content": "x"}]})", "unknown role 'usr' (did you mean 'user'?)"},
      {R"({"messages": [{"role": "user", "content": 5}]})", "content of a user message must be a string"},
      {R"({"messages": [{"role": "user", "content": []}]})", "content of a user message must be a string"},
      {R"({"messages": [{"role": "assistant", "content": "x"}]})", "messages[0]: the role is 'assistant'"},
      {R"({"messages": [{"role": "system", "content": "x"}]})",
       "needs at least one user message after the system message"},
      {R"({"messages": [{"role": "system", "content": "x"}, {"role": "assistant", "content": "y"}]})",
       "messages[1]: the role is 'assistant', must be 'user'"},
      {R"({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]})",
       "messages[1]: the role is 'user', must be 'assistant'"},
      {R"({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]})",
       "messages[1]: the role is 'system', must be 'assistant'"},
      {R"({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": {}}]})",
       "a string or a list of parts, got object"},
      {R"({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "txt",
          "text": "y"}]}]})",
       "messages[1].content[0]: unknown part type 'txt' (did you mean 'text'?)"},
      {R"({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "text"}]}]})",
       "messages[1].content[0] has no 'text'"},
  };
  for (const auto& [json, expected] : cases) {
    const std::string message = message_of<Error>([&] { render_conversation(t, conversation(json)); });
    EXPECT_NE(message.find(expected), std::string::npos) << json << "\n" << message;
  }
  Conversation built;  // not from JSON
  built.messages = {{Role::user, {{PartKind::python, "1"}}}};
  EXPECT_NE(message_of<Error>([&] { render_conversation(t, built); }).find("only text"), std::string::npos);
}

}  // namespace
}  // namespace flexchat

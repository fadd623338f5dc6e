// Reading conversations from JSON and rendering them.
#include "tokenizer/chat.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
namespace {

constexpr std::array<std::string_view, 3> kRoles = {"system", "user", "assistant"};          // as Role
constexpr std::array<std::string_view, 3> kPartKinds = {"text", "python", "python_output"};  // as PartKind

std::string_view role_name(Role role) { return kRoles[static_cast<size_t>(role)]; }

template <class Enum, size_t N>
Enum parse_word(const std::array<std::string_view, N>& words, const std::string& word,
                const std::string& where, std::string_view what) {
  const auto it = std::find(words.begin(), words.end(), word);
  if (it == words.end()) {
    const std::vector<std::string> allowed(words.begin(), words.end());
    fail("{}: unknown {} '{}'{}; allowed: {}", where, what, word, did_you_mean(word, allowed), join(allowed));
  }
  return static_cast<Enum>(it - words.begin());
}

const std::string& string_member(const Json& object, const char* key, const std::string& where) {
  check(object.is_object(), "{} is {}, must be an object", where, object.type_name());
  const auto it = object.find(key);
  check(it != object.end(), "{} has no '{}'", where, key);
  check(it->is_string(), "{}: '{}' is {}, must be a string", where, key, it->type_name());
  return it->get_ref<const std::string&>();
}

Message message_from_json(const Json& json, const std::string& where) {
  Message message;
  message.role = parse_word<Role>(kRoles, string_member(json, "role", where), where, "role");
  const auto content = json.find("content");
  check(content != json.end(), "{} has no 'content'", where);
  if (content->is_string()) {
    message.parts.push_back({PartKind::text, content->get<std::string>()});
    return message;
  }
  check(content->is_array() && message.role == Role::assistant,
        "{}: the content of a {} message must be {}, got {}", where, role_name(message.role),
        message.role == Role::assistant ? "a string or a list of parts" : "a string", content->type_name());
  for (size_t i = 0; i < content->size(); ++i) {
    const Json& part = (*content)[i];
    const std::string place = fmt::format("{}.content[{}]", where, i);
    const std::string& kind = string_member(part, "type", place);
    message.parts.push_back(
        {parse_word<PartKind>(kPartKinds, kind, place, "part type"), string_member(part, "text", place)});
  }
  return message;
}

// The text of a message that may hold nothing else.
std::string plain_text(const Message& message, size_t index) {
  std::string text;
  for (const MessagePart& part : message.parts) {
    check(part.kind == PartKind::text,
          "messages[{}]: a {} message may hold only text, got a part of type '{}'", index,
          role_name(message.role), kPartKinds[static_cast<size_t>(part.kind)]);
    text += part.text;
  }
  return text;
}

class Renderer {
 public:
  explicit Renderer(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void special(const char* token, uint8_t mask) { push({tokenizer_.special(token)}, mask); }
  void text(const std::string& text, uint8_t mask) { push(tokenizer_.encode(text), mask); }
  void enclosed(const char* start, const std::string& content, const char* end, uint8_t mask) {
    special(start, mask);
    text(content, mask);
    special(end, mask);
  }
  void assistant(const Message& message) {
    special("<|assistant_start|>", 0);
    for (const MessagePart& part : message.parts) {
      switch (part.kind) {
        case PartKind::text:
          text(part.text, 1);
          break;
        case PartKind::python:
          enclosed("<|python_start|>", part.text, "<|python_end|>", 1);
          break;
        case PartKind::python_output:
          enclosed("<|output_start|>", part.text, "<|output_end|>", 0);
          break;
      }
    }
    special("<|assistant_end|>", 1);
  }
  RenderedConversation take(int64_t max_tokens) {
    if (static_cast<int64_t>(out_.ids.size()) > max_tokens) {
      out_.ids.resize(static_cast<size_t>(max_tokens));
      out_.mask.resize(static_cast<size_t>(max_tokens));
    }
    return std::move(out_);
  }

 private:
  void push(const std::vector<int32_t>& ids, uint8_t mask) {
    out_.ids.insert(out_.ids.end(), ids.begin(), ids.end());
    out_.mask.insert(out_.mask.end(), ids.size(), mask);
  }
  const Tokenizer& tokenizer_;
  RenderedConversation out_;
};

}  // namespace

Conversation conversation_from_json(const Json& json, const std::string& source) {
  check(json.is_object(), "{}: a conversation must be an object with 'messages', got {}", source,
        json.type_name());
  const auto messages = json.find("messages");
  check(messages != json.end() && messages->is_array(), "{}: a conversation needs a list 'messages'", source);
  Conversation conversation;
  for (size_t i = 0; i < messages->size(); ++i) {
    conversation.messages.push_back(
        message_from_json((*messages)[i], fmt::format("{}: messages[{}]", source, i)));
  }
  return conversation;
}

Conversation parse_conversation(std::string_view json, const std::string& source) {
  Json root;
  try {
    root = Json::parse(json);
  } catch (const Json::exception& error) {
    fail("{}: not JSON: {}", source, error.what());
  }
  return conversation_from_json(root, source);
}

RenderedConversation render_conversation(const Tokenizer& tokenizer, const Conversation& conversation,
                                         int64_t max_tokens) {
  const auto& messages = conversation.messages;
  check(max_tokens >= 1, "a conversation cannot be cut to {} tokens; at least 1", max_tokens);
  const size_t first = !messages.empty() && messages[0].role == Role::system ? 1 : 0;
  check(messages.size() > first, "a conversation needs at least one user message{}",
        first == 1 ? " after the system message" : "");
  Renderer renderer(tokenizer);
  renderer.special("<|bos|>", 0);
  for (size_t i = first; i < messages.size(); ++i) {
    const Role expected = (i - first) % 2 == 0 ? Role::user : Role::assistant;
    check(messages[i].role == expected,
          "messages[{}]: the role is '{}', must be '{}' (after an optional system message, user and "
          "assistant take "
          "turns)",
          i, role_name(messages[i].role), role_name(expected));
    if (expected == Role::assistant) {
      renderer.assistant(messages[i]);
      continue;
    }
    std::string text = plain_text(messages[i], i);
    if (i == 1 && first == 1) text = plain_text(messages[0], 0) + "\n\n" + text;
    renderer.enclosed("<|user_start|>", text, "<|user_end|>", 0);
  }
  return renderer.take(max_tokens);
}

std::vector<int32_t> render_for_completion(const Tokenizer& tokenizer, Conversation conversation,
                                           int64_t max_tokens) {
  check(!conversation.messages.empty() && conversation.messages.back().role == Role::assistant,
        "a conversation to complete must end with an assistant message, which is dropped");
  conversation.messages.pop_back();
  std::vector<int32_t> ids = render_conversation(tokenizer, conversation, max_tokens).ids;
  ids.push_back(tokenizer.special("<|assistant_start|>"));
  return ids;
}

}  // namespace flexchat

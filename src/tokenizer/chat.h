// Conversations as token ids with a loss mask, in nanochat's format.
//
//   <|bos|> then for each turn
//     <|user_start|> text <|user_end|>                                            mask 0
//     <|assistant_start|> content <|assistant_end|>                               mask 0, content 1, 1
//   with assistant content: text                                                  mask 1
//     or parts: text; <|python_start|> text <|python_end|>                        mask 1
//               <|output_start|> text <|output_end|> (what the tool printed)      mask 0
// A leading system message is put before the first user message, with "\n\n" between. Each text is encoded
// alone.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/options.h"
#include "tokenizer/tokenizer.h"

namespace flexchat {

enum class PartKind { text, python, python_output };

struct MessagePart {
  PartKind kind = PartKind::text;
  std::string text;
};

enum class Role { system, user, assistant };

struct Message {
  Role role = Role::user;
  std::vector<MessagePart> parts;  // plain content is one text part
};

struct Conversation {
  std::vector<Message> messages;
};

// {"messages": [{"role": ..., "content": string or [{"type": ..., "text": ...}]}]}. Throws Error that starts
// with `source` and names the message on anything missing, unknown or of the wrong type. Other keys are
// ignored, as data sets carry them.
Conversation conversation_from_json(const Json& json, const std::string& source);
Conversation parse_conversation(std::string_view json, const std::string& source);

struct RenderedConversation {
  std::vector<int32_t> ids;
  std::vector<uint8_t> mask;  // same length; 1: the model is trained to produce this id
};

inline constexpr int64_t kMaxConversationTokens = 2048;

// Cut on the right to max_tokens. Throws Error unless roles alternate user, assistant, user, ... after an
// optional system message, and only the assistant uses parts other than text.
RenderedConversation render_conversation(const Tokenizer& tokenizer, const Conversation& conversation,
                                         int64_t max_tokens = kMaxConversationTokens);

// Ids for the model to continue: the conversation without its last message, which must be the assistant's,
// cut to max_tokens, then <|assistant_start|>.
std::vector<int32_t> render_for_completion(const Tokenizer& tokenizer, Conversation conversation,
                                           int64_t max_tokens = kMaxConversationTokens);

}  // namespace flexchat

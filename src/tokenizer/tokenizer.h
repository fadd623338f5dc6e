// The tokenizer: a split pattern, mergeable tokens (id = rank) and special tokens, whose ids follow the
// mergeable ones in order. Encoding is tiktoken's encode_ordinary: special strings in a text are ordinary
// text.
//
// A Tokenizer never changes after it is made and may be used by several threads at once.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace flexchat {

// nanochat's nine, in the order of their ids: "<|bos|>", "<|user_start|>", ...
const std::vector<std::string>& chat_special_tokens();

struct EncodeOptions {
  std::optional<int32_t> prepend{}, append{};  // an id put before and after the ids of each text
  int64_t* replaced = nullptr;  // adds the number of invalid UTF-8 sequences replaced by U+FFFD
};

class Tokenizer {
 public:
  // tokens[id]: the bytes of each mergeable token, all 256 single bytes among them. `pattern`: as Splitter
  // takes it. Throws Error on empty or repeated tokens and specials and on a bad pattern.
  Tokenizer(std::string name, std::string_view pattern, std::vector<std::string> tokens,
            std::vector<std::string> special_tokens = chat_special_tokens());
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  // Reads `path`/tokenizer.json, or `path` itself when it is a file: our own format, or an object with
  // "pattern" (or "pat_str"), "ranks_hex" {bytes in hex: rank} and "special" (or "special_tokens": a list or
  // {string: id}). Throws Error naming the file and the entry that is wrong.
  static Tokenizer load(const std::filesystem::path& path);
  static Tokenizer parse(std::string_view json,
                         const std::string& source);  // `source`: the file's name in errors
  // Writes `directory`/tokenizer.json whole or not at all, making the directory if need be.
  void save(const std::filesystem::path& directory) const;

  const std::string& name() const;
  const std::string& pattern() const;                      // the regular expression
  const std::vector<std::string>& tokens() const;          // bytes of the mergeable tokens, by id
  const std::vector<std::string>& special_tokens() const;  // their ids start at tokens().size()
  int64_t vocab_size() const;                              // mergeable and special

  int32_t special(std::string_view token) const;  // id; throws Error naming the special tokens there are
  int32_t bos() const { return special("<|bos|>"); }
  bool is_special(int32_t id) const;
  std::string_view token(int32_t id) const;  // bytes of one token, or the special token's string
  std::vector<int32_t> token_bytes() const;  // (vocab_size) bytes of each token; 0 for special tokens

  std::vector<int32_t> encode(std::string_view text, const EncodeOptions& options = {}) const;
  // The same for many texts, by num_threads() threads. The ids do not depend on the number of threads.
  std::vector<std::vector<int32_t>> encode_batch(std::span<const std::string_view> texts,
                                                 const EncodeOptions& options = {}) const;

  // The bytes of the ids one after another; special tokens as their strings. Throws Error on an id that is
  // not in the vocabulary.
  std::string decode_bytes(std::span<const int32_t> ids) const;
  // The same as text: invalid UTF-8 becomes U+FFFD.
  std::string decode(std::span<const int32_t> ids) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace flexchat

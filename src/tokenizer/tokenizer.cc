// The parts put together: validation, splitter, encoder, one scratch for each thread.
#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "tokenizer/bpe_encoder.h"
#include "tokenizer/split.h"
#include "tokenizer/work_queue.h"

namespace flexchat {

const std::vector<std::string>& chat_special_tokens() {
  static const std::vector<std::string> list = {
      "<|bos|>",          "<|user_start|>", "<|user_end|>",     "<|assistant_start|>", "<|assistant_end|>",
      "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"};
  return list;
}

struct Tokenizer::State {
  State(std::string name_, std::string_view pattern, std::vector<std::string> tokens,
        std::vector<std::string> special)
      : name(std::move(name_)),
        splitter(pattern),
        encoder(std::move(tokens)),
        special_tokens(std::move(special)) {}

  std::string name;
  Splitter splitter;
  BpeEncoder encoder;
  std::vector<std::string> special_tokens;

  // Scratches are kept between calls, for their caches; there are as many as there were calls at the same
  // time.
  std::mutex mutex;
  std::vector<std::unique_ptr<BpeEncoder::Scratch>> idle;

  class Loan {
   public:
    explicit Loan(State& state) : state_(state) {
      {
        const std::lock_guard lock(state.mutex);
        if (!state.idle.empty()) {
          scratch_ = std::move(state.idle.back());
          state.idle.pop_back();
        }
      }
      if (!scratch_) scratch_ = std::make_unique<BpeEncoder::Scratch>();
    }
    ~Loan() {
      const std::lock_guard lock(state_.mutex);
      state_.idle.push_back(std::move(scratch_));
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    BpeEncoder::Scratch& operator*() { return *scratch_; }

   private:
    State& state_;
    std::unique_ptr<BpeEncoder::Scratch> scratch_;
  };

  std::vector<int32_t> encode(std::string_view text, const EncodeOptions& options,
                              BpeEncoder::Scratch& scratch, int64_t* replaced) const {
    std::string repaired;
    if (valid_utf8_prefix(text) != text.size()) {
      repaired = replace_invalid_utf8(text, replaced);
      text = repaired;
    }
    scratch.clear();
    const char* const end = text.data() + text.size();
    splitter.for_each(text, [&](std::string_view piece) { encoder.encode(piece, end, scratch); });
    const auto ids = scratch.ids();
    std::vector<int32_t> out;
    out.reserve(ids.size() + 2);
    if (options.prepend) out.push_back(*options.prepend);
    out.insert(out.end(), ids.begin(), ids.end());
    if (options.append) out.push_back(*options.append);
    return out;
  }
};

Tokenizer::Tokenizer(std::string name, std::string_view pattern, std::vector<std::string> tokens,
                     std::vector<std::string> special_tokens)
    : state_(
          std::make_unique<State>(std::move(name), pattern, std::move(tokens), std::move(special_tokens))) {
  check(valid_utf8_prefix(state_->name) == state_->name.size(), "the name of a tokenizer must be UTF-8 text");
  std::set<std::string_view> seen;
  for (const std::string& token : state_->special_tokens) {
    check(!token.empty() && valid_utf8_prefix(token) == token.size(),
          "a special token must be non-empty UTF-8 text, got '{}'",
          replace_invalid_utf8(token, nullptr));
    check(seen.insert(token).second, "the special token '{}' is given twice", token);
  }
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

const std::string& Tokenizer::name() const { return state_->name; }
const std::string& Tokenizer::pattern() const { return state_->splitter.pattern(); }
const std::vector<std::string>& Tokenizer::tokens() const { return state_->encoder.tokens(); }
const std::vector<std::string>& Tokenizer::special_tokens() const { return state_->special_tokens; }
int64_t Tokenizer::vocab_size() const {
  return static_cast<int64_t>(tokens().size() + state_->special_tokens.size());
}

int32_t Tokenizer::special(std::string_view token) const {
  const auto& list = state_->special_tokens;
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i] == token) return static_cast<int32_t>(tokens().size() + i);
  }
  fail("tokenizer '{}' has no special token '{}'{}; it has: {}", name(), token, did_you_mean(token, list),
       list.empty() ? "none" : join(list));
}

bool Tokenizer::is_special(int32_t id) const {
  return id >= static_cast<int64_t>(tokens().size()) && id < vocab_size();
}

std::string_view Tokenizer::token(int32_t id) const {
  check(id >= 0 && id < vocab_size(), "token id {} is not in the vocabulary of tokenizer '{}' (0..{})", id,
        name(), vocab_size() - 1);
  const auto i = static_cast<size_t>(id);
  return i < tokens().size() ? tokens()[i] : state_->special_tokens[i - tokens().size()];
}

std::vector<int32_t> Tokenizer::token_bytes() const {
  std::vector<int32_t> bytes(static_cast<size_t>(vocab_size()), 0);
  for (size_t id = 0; id < tokens().size(); ++id) bytes[id] = static_cast<int32_t>(tokens()[id].size());
  return bytes;
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, const EncodeOptions& options) const {
  State::Loan scratch(*state_);
  return state_->encode(text, options, *scratch, options.replaced);
}

std::vector<std::vector<int32_t>> Tokenizer::encode_batch(std::span<const std::string_view> texts,
                                                          const EncodeOptions& options) const {
  std::vector<std::vector<int32_t>> out(texts.size());
  std::atomic<int64_t> replaced{0};
  std::vector<std::unique_ptr<State::Loan>> scratches(
      std::min(texts.size(), static_cast<size_t>(num_threads())));
  for (auto& scratch : scratches) scratch = std::make_unique<State::Loan>(*state_);
  for_each_item(static_cast<int64_t>(texts.size()), [&](int64_t worker, int64_t item) {
    const auto i = static_cast<size_t>(item);
    int64_t here = 0;
    out[i] = state_->encode(texts[i], options, **scratches[static_cast<size_t>(worker)], &here);
    if (here > 0) replaced += here;
  });
  if (options.replaced) *options.replaced += replaced;
  return out;
}

std::string Tokenizer::decode_bytes(std::span<const int32_t> ids) const {
  std::string out;
  for (const int32_t id : ids) out += token(id);
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  return replace_invalid_utf8(decode_bytes(ids), nullptr);
}

}  // namespace flexchat

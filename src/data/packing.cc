#include "data/packing.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.h"
#include "base/strings.h"

namespace flexchat {
std::string_view packing_name(Packing packing) { return packing == Packing::classic ? "classic" : "bestfit"; }

Packing parse_packing(std::string_view name) {
  if (name == "classic") return Packing::classic;
  if (name == "bestfit") return Packing::bestfit;
  fail("unknown packing '{}': allowed are classic, bestfit{}", name,
       did_you_mean(name, {"classic", "bestfit"}));
}

PackedLoader::PackedLoader(const PackingOptions& options, std::unique_ptr<DocumentStream> stream,
                           EncodeDocuments encode)
    : options_(options), stream_(std::move(stream)), encode_(std::move(encode)) {
  check(options.batch_size >= 1 && options.sequence_len >= 1,
        "batch size {} and sequence length {} must be at least 1", options.batch_size, options.sequence_len);
  check(options.encode_documents >= 1 && options.buffer_documents >= 1,
        "documents per encoding {} and in the buffer {} must be at least 1", options.encode_documents,
        options.buffer_documents);
}

// Appends up to encode_documents documents to the buffer. At the end of a pass fewer: then starts the next
// pass and returns true.
bool PackedLoader::fetch() {
  texts_.clear();
  std::string text;
  bool end = false;
  while (std::ssize(texts_) < options_.encode_documents) {
    end = !stream_->next(text);
    if (end) break;
    texts_.push_back(std::move(text));
  }
  if (!texts_.empty()) {
    encode_(texts_, ids_);
    check(ids_.size() == texts_.size(), "the encoder returned {} documents for {}", ids_.size(),
          texts_.size());
  }
  for (size_t i = 0; i < texts_.size(); ++i) {
    std::vector<int32_t> tokens;
    tokens.reserve(ids_[i].size() + 1);
    tokens.push_back(options_.bos);
    tokens.insert(tokens.end(), ids_[i].begin(), ids_[i].end());
    pass_tokens_ += std::ssize(tokens);
    stats_.fetched_tokens += std::ssize(tokens);
    const int64_t length = std::ssize(tokens);
    buffer_.push_back({length, std::make_shared<const std::vector<int32_t>>(std::move(tokens))});
  }
  stats_.source = stream_->stats();
  pass_documents_ += std::ssize(texts_);
  if (!end) return false;
  const int64_t b = options_.batch_size, t = options_.sequence_len;
  const int64_t needed = options_.packing == Packing::classic ? b * t + 1 : b * (t + 1);
  check(pass_tokens_ > 0 && (options_.repeat_small || pass_tokens_ >= needed),
        "the data is shorter than one batch: it has {} tokens and a batch takes {} (batch size {} x sequence "
        "length {}): give more data, or a smaller batch or sequence",
        format_count(pass_tokens_), format_count(needed), b, t);
  small_data_ = pass_documents_ < options_.buffer_documents;
  pass_tokens_ = pass_documents_ = 0;
  stream_->rewind();
  return true;
}

// Appends the next `count` tokens of the queue to `out`.
void PackedLoader::pop_tokens(std::vector<int32_t>& out, size_t count) {
  const size_t end = out.size() + count;
  while (out.size() < end) {
    while (buffer_.empty()) fetch();
    const Document& first = buffer_.front();
    const auto take = std::min<int64_t>(first.length - head_, static_cast<int64_t>(end - out.size()));
    const auto from = first.tokens->begin() + head_;
    out.insert(out.end(), from, from + take);
    head_ += take;
    if (head_ < first.length) continue;
    buffer_.pop_front();
    head_ = 0;
  }
}

// Brings the buffer to buffer_documents, small data to one whole pass.
void PackedLoader::refill() {
  if (small_data_ && !buffer_.empty()) return;
  while (std::ssize(buffer_) < options_.buffer_documents) {
    if (fetch() && small_data_) return;
  }
}

// Fills one row of sequence_len + 1 tokens from the document buffer.
void PackedLoader::fill_row(std::vector<int32_t>& row) {
  const int64_t capacity = options_.sequence_len + 1;
  row.clear();
  while (std::ssize(row) < capacity) {
    refill();
    const int64_t space = capacity - std::ssize(row);
    auto longest = buffer_.end(), shortest = buffer_.begin();
    int64_t longest_length = 0;
    for (auto it = buffer_.begin(); it != buffer_.end(); ++it) {
      if (it->length <= space && it->length > longest_length) {
        longest = it;
        longest_length = it->length;
      }
      if (it->length < shortest->length) shortest = it;
    }
    const auto chosen = longest != buffer_.end() ? longest : shortest;
    const int64_t take = std::min(chosen->length, space);
    row.insert(row.end(), chosen->tokens->begin(), chosen->tokens->begin() + take);
    stats_.cropped_tokens += chosen->length - take;
    buffer_.erase(chosen);
  }
}

Batch PackedLoader::next() {
  const auto b = static_cast<size_t>(options_.batch_size), t = static_cast<size_t>(options_.sequence_len);
  Batch batch;
  batch.batch_size = options_.batch_size;
  batch.sequence_len = options_.sequence_len;
  std::vector<int32_t> tokens;
  if (options_.packing == Packing::classic) {
    tokens.reserve(b * t + 1);
    pop_tokens(tokens, b * t + 1);
    batch.inputs.assign(tokens.begin(), tokens.end() - 1);
    batch.targets.assign(tokens.begin() + 1, tokens.end());
  } else {
    batch.inputs.reserve(b * t);
    batch.targets.reserve(b * t);
    for (size_t row = 0; row < b; ++row) {
      fill_row(tokens);
      batch.inputs.insert(batch.inputs.end(), tokens.begin(), tokens.end() - 1);
      batch.targets.insert(batch.targets.end(), tokens.begin() + 1, tokens.end());
    }
  }
  batch.state = state();
  batch.stats = stats_;
  return batch;
}

LoaderState PackedLoader::state() const {
  LoaderState state;
  state.packing = options_.packing;
  state.position = stream_->position();
  state.pass_tokens = pass_tokens_;
  state.pass_documents = pass_documents_;
  state.small_data = small_data_;
  state.head = head_;
  state.documents.reserve(buffer_.size());
  for (const auto& document : buffer_) state.documents.push_back(document.tokens);
  return state;
}

void PackedLoader::restore(const LoaderState& state) {
  check(state.packing == options_.packing,
        "cannot resume: the checkpoint was packing '{}', this run packs '{}'", packing_name(state.packing),
        packing_name(options_.packing));
  stream_->seek(state.position);
  pass_tokens_ = state.pass_tokens;
  pass_documents_ = state.pass_documents;
  small_data_ = state.small_data;
  head_ = state.head;
  buffer_.clear();
  for (const auto& tokens : state.documents) buffer_.push_back({std::ssize(*tokens), tokens});
}

Json to_json(const LoaderState& state) {
  Json json;
  json["packing"] = packing_name(state.packing);
  json["position"] = to_json(state.position);
  json["pass_tokens"] = state.pass_tokens;
  json["pass_documents"] = state.pass_documents;
  json["small_data"] = state.small_data;
  json["documents"] = state.documents.size();
  return json;
}

std::vector<int32_t> buffered_tokens(const LoaderState& state) {
  std::vector<int32_t> out;
  for (size_t i = 0; i < state.documents.size(); ++i) {
    out.push_back(static_cast<int32_t>(std::ssize(*state.documents[i]) - (i == 0 ? state.head : 0)));
  }
  for (size_t i = 0; i < state.documents.size(); ++i) {
    const auto& tokens = *state.documents[i];
    out.insert(out.end(), tokens.begin() + (i == 0 ? state.head : 0), tokens.end());
  }
  return out;
}

LoaderState loader_state_from(const Json& json, const std::vector<int32_t>& tokens,
                              const std::string& source) {
  check(json.is_object() && json.size() == 6 && json.contains("packing") && json["packing"].is_string() &&
            json.contains("position") && json.contains("small_data") && json["small_data"].is_boolean(),
        "{}: not the state of a data loader", source);
  const auto integer = [&](const char* name) {
    check(json.contains(name) && json[name].is_number_integer() && json[name].get<int64_t>() >= 0,
          "{}: data loader: '{}' must be an integer of at least 0", source, name);
    return json[name].get<int64_t>();
  };
  LoaderState state;
  state.packing = parse_packing(json["packing"].get<std::string>());
  state.position = source_position_from_json(json["position"], source);
  state.pass_tokens = integer("pass_tokens");
  state.pass_documents = integer("pass_documents");
  state.small_data = json["small_data"].get<bool>();
  const int64_t documents = integer("documents");
  check(documents <= std::ssize(tokens), "{}: data loader: {} values cannot hold {} documents", source,
        tokens.size(), documents);
  auto from = tokens.begin() + documents;
  for (int64_t i = 0; i < documents; ++i) {
    const int32_t length = tokens[static_cast<size_t>(i)];
    check(length >= 1 && length <= tokens.end() - from,
          "{}: data loader: document {} of {} has a length of {}", source, i, documents, length);
    state.documents.push_back(std::make_shared<const std::vector<int32_t>>(from, from + length));
    from += length;
  }
  check(from == tokens.end(), "{}: data loader: {} tokens too many", source, tokens.end() - from);
  return state;
}

}  // namespace flexchat

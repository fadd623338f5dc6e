// Training a byte-pair vocabulary on a stream of documents that need not fit in memory: documents are split
// into pieces and counted by all threads while the next ones are read; then the merges are found. The result
// depends only on the documents and the options, never on the number of threads.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tokenizer/bpe_merge.h"

namespace flexchat {

struct BpeTrainOptions {
  int64_t n_tokens = 32768 - 9;       // mergeable tokens wanted, the 256 bytes included; >= 256
  std::string pattern = "nanochat";   // as Splitter takes it
  int64_t doc_cap = 10'000;           // characters used of each document; 0: all
  int64_t max_chars = 2'000'000'000;  // stop after the document that exceeds this total; 0: never
  bool show_progress = false;
};

struct BpeTrainResult {
  std::vector<Merge> merges;           // n_tokens - 256, or fewer when the text holds no further pair
  int64_t documents = 0, cropped = 0;  // cropped: documents longer than doc_cap
  int64_t characters = 0, bytes = 0;   // used
  int64_t pieces = 0, distinct_pieces = 0;
  int64_t replaced = 0;  // invalid UTF-8 sequences replaced by U+FFFD
  double count_seconds = 0, merge_seconds = 0;
};

// `next` fills in a document and returns true, or returns false at the end; it is called from one other
// thread at a time. Throws Error if there is no text at all.
BpeTrainResult train_bpe(const std::function<bool(std::string&)>& next, const BpeTrainOptions& options);

// The bytes of every token by id: the 256 bytes, then the merges. Byte strings that two merges made keep only
// the later id and the ids close up, as the reference's table keyed by bytes has it.
std::vector<std::string> tokens_of_merges(const std::vector<Merge>& merges);

}  // namespace flexchat

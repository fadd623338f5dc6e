// Streams of documents (UTF-8 text) out of .txt, .md, .jsonl and .parquet files, forward only and never
// loaded whole. A stream's position names its next document exactly, so a run resumes on the document it
// would have read. Not thread safe: one thread uses a stream at a time.
//
// Documents. A record of a parquet file (column "text") or a JSON-lines file (field "text") is one document.
// A text file is one document up to 16 KiB and is cut at blank lines into documents of at most that size
// beyond it; the line <|endoftext|> always ends a document. Null and empty documents are passed over, invalid
// UTF-8 is replaced by U+FFFD; both are counted.
//
// Split. Two or more files, all parquet: the last by name is val, the others train. Otherwise by document
// number in the pass: each 100th document is val (99, 199, ...), each 10th when there are fewer than 100
// documents, the last when there are fewer than 10. A single document is all train and there is no val.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/options.h"

namespace flexchat {

enum class Split { train, val, all };
std::string_view split_name(Split split);

struct SourceFile {
  std::string path;
  int64_t bytes = 0;
};

// Counted since the stream was opened, over all passes.
struct SourceStats {
  int64_t documents = 0;          // handed out
  int64_t bytes = 0;              // of their text
  int64_t empty_documents = 0;    // passed over: null or empty
  int64_t invalid_utf8 = 0;       // invalid sequences replaced
  int64_t invalid_documents = 0;  // documents that had any
};

// The next document of a stream. Valid only for a stream over the same files (names and sizes), split, rank
// and world: `identity` spells those out.
struct SourcePosition {
  std::string identity;
  int64_t epoch = 1;     // pass over the data, from 1
  int64_t file = 0;      // index among the split's files, sorted by name
  int64_t offset = 0;    // text, jsonl: byte of the file; parquet: row group
  int64_t row = 0;       // jsonl: lines before it; parquet: row in the group
  int64_t document = 0;  // records passed in this epoch, of every split and rank
  int64_t selected = 0;  // those of this split

  bool operator==(const SourcePosition&) const = default;
};
Json to_json(const SourcePosition& position);
// Throws Error starting with `source` on missing or unknown keys, wrong types and negative numbers.
SourcePosition source_position_from_json(const Json& json, const std::string& source);

class DocumentStream {
 public:
  virtual ~DocumentStream() = default;
  // The next document (never empty) of this split and rank; false at the end of the pass.
  virtual bool next(std::string& text) = 0;
  // To the start of the next pass: epoch + 1, first document.
  virtual void rewind() = 0;
  virtual SourcePosition position() const = 0;
  // Continues at `position`. Throws Error when it was taken from other data.
  virtual void seek(const SourcePosition& position) = 0;
  virtual const SourceStats& stats() const = 0;
  virtual const std::vector<SourceFile>& files() const = 0;  // of this split, sorted by name
};

// Every supported file among `paths` (files, globs, folders searched recursively without hidden names),
// sorted by path, each once. Throws Error when a path or glob matches nothing, a named file has another
// extension, a file is unreadable, or nothing is found.
std::vector<SourceFile> find_source_files(const std::vector<std::string>& paths);

// Rank r of `world` gets the split's documents r, r + world, ... Throws Error as find_source_files and when
// the split has no document for this rank, or a parquet file is damaged or has no string column "text".
std::unique_ptr<DocumentStream> open_documents(const std::vector<std::string>& paths, Split split,
                                               int rank = 0, int world = 1);

}  // namespace flexchat

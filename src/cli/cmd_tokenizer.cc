// flexchat tokenizer train | encode | decode | eval | render
#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>

#include "base/error.h"
#include "base/file.h"
#include "base/options.h"
#include "base/parallel.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "cli/command.h"
#include "data/source.h"
#include "report/table.h"
#include "tokenizer/bpe_train.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

namespace flexchat {
namespace {

std::string read_stdin() {
  std::string out;
  char buffer[1 << 16];
  while (const size_t n = std::fread(buffer, 1, sizeof buffer, stdin)) out.append(buffer, n);
  check(std::ferror(stdin) == 0, "cannot read standard input");
  return out;
}

void write_stdout(std::string_view bytes) {
  if (std::fwrite(bytes.data(), 1, bytes.size(), stdout) != bytes.size() || std::fflush(stdout) != 0) {
    fail_run("cannot write to standard output");
  }
}

void write_json(const Json& json, int indent = -1) {  // paths in it need not be UTF-8
  write_stdout(json.dump(indent, ' ', false, Json::error_handler_t::replace) + "\n");
}

std::string ids_text(std::span<const int32_t> ids) {
  std::string out = "[";
  for (const int32_t id : ids) {
    if (out.size() > 1) out += ", ";
    out += std::to_string(id);
  }
  return out + "]";
}

void note_replaced(int64_t replaced, std::string_view where) {
  if (replaced == 0) return;
  fmt::print(stderr, "flexchat: note: {} invalid UTF-8 sequence{} in {} became U+FFFD\n",
             format_count(replaced), replaced == 1 ? "" : "s", where);
}

Split parse_split(const std::string& word) { return word == "train" ? Split::train : Split::all; }

// --tokenizer DIR or --ranks FILE.
struct TokenizerChoice {
  std::string tokenizer, ranks;

  void declare(Options& o) {
    o.add("--tokenizer", &tokenizer, "folder that 'flexchat tokenizer train' wrote");
    o.add("--ranks", &ranks, "instead: a JSON file with pattern, special tokens and ranks_hex");
  }
  Tokenizer load() const {
    check(tokenizer.empty() != ranks.empty(), "give either --tokenizer DIR or --ranks FILE{}",
          tokenizer.empty() ? "" : ", not both");
    return Tokenizer::load(tokenizer.empty() ? ranks : tokenizer);
  }
};

// ---- train ------------------------------------------------------------------------------------------------

struct TrainCommand {
  std::vector<std::string> data;
  std::string out, pattern = "nanochat", split = "train";
  int64_t vocab_size = 32768, max_chars = 2'000'000'000, doc_cap = 10'000, threads = num_threads();
  bool json = false;

  void declare(Options& o) {
    o.add("--data", &data,
          "files, globs or folders of .txt, .md, .jsonl (field text), .parquet (column text)")
        .required();
    o.add("--vocab-size", &vocab_size, "size of the vocabulary, the 9 special tokens included");
    o.add("--out", &out, "folder for tokenizer.json").required().not_recorded();
    o.add("--pattern", &pattern, "split pattern: nanochat, gpt4 or a regular expression");
    o.add("--doc-cap", &doc_cap, "characters used of each document; 0: all").at_least(0);
    o.add("--max-chars", &max_chars, "stop after the document that exceeds this total; 0: never").at_least(0);
    o.add("--split", &split, "documents to use").choices({"train", "all"});
    o.add("--threads", &threads, "threads").at_least(1).at_most(1024);
    o.add("--json", &json, "print the result as JSON").not_recorded();
  }
};

Json train_summary(const TrainCommand& c, const Tokenizer& tokenizer, const BpeTrainResult& r) {
  return {{"vocab_size", tokenizer.vocab_size()},
          {"merges", r.merges.size()},
          {"documents", r.documents},
          {"cropped_documents", r.cropped},
          {"characters", r.characters},
          {"bytes", r.bytes},
          {"pieces", r.pieces},
          {"distinct_pieces", r.distinct_pieces},
          {"invalid_utf8", r.replaced},
          {"count_seconds", r.count_seconds},
          {"merge_seconds", r.merge_seconds},
          {"threads", c.threads},
          {"out", c.out}};
}

void print_training(const TrainCommand& c, const Tokenizer& tokenizer, const BpeTrainResult& r) {
  const auto line = [](const char* label, const std::string& text) { fmt::print("{:<11}{}\n", label, text); };
  line("text", fmt::format("{} documents, {} characters, {}", format_count(r.documents),
                           format_count(r.characters), format_bytes(static_cast<double>(r.bytes))));
  if (r.cropped > 0) {
    line("", fmt::format("{} of them cropped to {} characters (--doc-cap)", format_count(r.cropped),
                         format_count(c.doc_cap)));
  }
  line("pieces", fmt::format("{}, {} distinct", format_count(r.pieces), format_count(r.distinct_pieces)));
  line("vocabulary",
       fmt::format("{} tokens: 256 bytes, {} merges, {} special", format_count(tokenizer.vocab_size()),
                   format_count(static_cast<int64_t>(r.merges.size())), tokenizer.special_tokens().size()));
  line("time", fmt::format("{} reading and counting, {} merging, {} threads",
                           format_duration(r.count_seconds), format_duration(r.merge_seconds), c.threads));
  line("written", c.out + "/tokenizer.json");
}

int train_command(const Words& words) {
  TrainCommand c;
  Options options("flexchat tokenizer train", "Learn a byte-pair vocabulary from text.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  const auto n_special = static_cast<int64_t>(chat_special_tokens().size());
  check(c.vocab_size >= 256 + n_special,
        "--vocab-size {} is too small: at least {} (256 bytes and {} special tokens)", c.vocab_size,
        256 + n_special, n_special);
  check(c.vocab_size <= std::numeric_limits<int32_t>::max(), "--vocab-size {} is too large: at most {}",
        c.vocab_size, std::numeric_limits<int32_t>::max());
  set_num_threads(static_cast<int>(c.threads));

  const auto documents = open_documents(c.data, parse_split(c.split));
  BpeTrainOptions train;
  train.n_tokens = c.vocab_size - n_special;
  train.pattern = c.pattern;
  train.doc_cap = c.doc_cap;
  train.max_chars = c.max_chars;
  train.show_progress = true;
  BpeTrainResult result = train_bpe([&](std::string& text) { return documents->next(text); }, train);
  result.replaced += documents->stats().invalid_utf8;
  const Tokenizer tokenizer("flexchat", c.pattern, tokens_of_merges(result.merges));
  tokenizer.save(c.out);

  note_replaced(result.replaced, "the data");
  const auto n_merges = static_cast<int64_t>(result.merges.size());
  if (n_merges < train.n_tokens - 256) {
    fmt::print(
        stderr,
        "flexchat: warning: the text is too small for a vocabulary of {}: no pair was left after {} merges; "
        "saved a vocabulary of {}\n",
        format_count(c.vocab_size), format_count(n_merges), format_count(tokenizer.vocab_size()));
  }
  if (c.json) {
    write_json(train_summary(c, tokenizer, result));
  } else {
    print_training(c, tokenizer, result);
  }
  return 0;
}

// ---- encode and decode ------------------------------------------------------------------------------------

struct EncodeCommand {
  TokenizerChoice choice;
  std::vector<std::string> data;
  std::string out, split = "all";
  int64_t threads = num_threads();
  bool bos = false;

  void declare(Options& o) {
    choice.declare(o);
    o.add("--bos", &bos, "put <|bos|> before each text");
    o.add("--data", &data, "encode the documents of these files, globs or folders instead of standard input");
    o.add("--split", &split, "with --data: documents to encode").choices({"train", "all"});
    o.add("--out", &out, "with --data: file for the ids, one after another as 32-bit little-endian integers")
        .not_recorded();
    o.add("--threads", &threads, "threads").at_least(1).at_most(1024);
  }
};

// Documents in batches of at least this many bytes: enough work for all threads, bounded memory.
constexpr size_t kEncodeBatchBytes = size_t{32} << 20;

// Reads, encodes and writes batch after batch; the time is that of encoding texts in memory to ids in memory.
Json encode_documents(const EncodeCommand& c, const Tokenizer& tokenizer, const EncodeOptions& encode) {
  const auto documents = open_documents(c.data, parse_split(c.split));
  int64_t n_documents = 0, n_bytes = 0, n_tokens = 0;
  double seconds = 0;
  write_file_atomic(c.out, [&](const ByteSink& sink) {
    for (bool more = true; more;) {
      std::vector<std::string> texts;
      size_t bytes = 0;
      for (std::string text; bytes < kEncodeBatchBytes && (more = documents->next(text));) {
        bytes += text.size();
        texts.push_back(std::move(text));
      }
      const std::vector<std::string_view> views(texts.begin(), texts.end());
      const auto start = std::chrono::steady_clock::now();
      const auto ids = tokenizer.encode_batch(views, encode);
      seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      for (const auto& row : ids) {
        sink(row.data(), row.size() * sizeof(int32_t));
        n_tokens += static_cast<int64_t>(row.size());
      }
      n_documents += static_cast<int64_t>(texts.size());
      n_bytes += static_cast<int64_t>(bytes);
    }
  });
  *encode.replaced += documents->stats().invalid_utf8;
  return {{"documents", n_documents},  {"bytes", n_bytes},     {"tokens", n_tokens},
          {"encode_seconds", seconds}, {"threads", c.threads}, {"out", c.out}};
}

int encode_command(const Words& words) {
  EncodeCommand c;
  Options options("flexchat tokenizer encode", "Text from standard input to a JSON list of ids.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  check(c.data.empty() == c.out.empty(),
        "--data and --out go together: ids of documents are written to a file");
  set_num_threads(static_cast<int>(c.threads));
  const Tokenizer tokenizer = c.choice.load();
  int64_t replaced = 0;
  EncodeOptions encode{.replaced = &replaced};
  if (c.bos) encode.prepend = tokenizer.bos();
  if (c.data.empty()) {
    write_stdout(ids_text(tokenizer.encode(read_stdin(), encode)) + "\n");
  } else {
    write_json(encode_documents(c, tokenizer, encode));
  }
  note_replaced(replaced, c.data.empty() ? "standard input" : "the data");
  return 0;
}

std::vector<int32_t> parse_ids(const std::string& text) {
  Json list;
  try {
    list = Json::parse(text);
  } catch (const Json::exception& error) {
    fail("standard input: not JSON: {}", error.what());
  }
  check(list.is_array(), "standard input: must be a JSON list of ids, got {}", list.type_name());
  std::vector<int32_t> ids;
  ids.reserve(list.size());
  for (const Json& entry : list) {
    check(entry.is_number_integer() && entry >= 0 && entry <= std::numeric_limits<int32_t>::max(),
          "standard input: entry {} is {}, must be an id", ids.size(), entry.dump().substr(0, 40));
    ids.push_back(entry.get<int32_t>());
  }
  return ids;
}

int decode_command(const Words& words) {
  TokenizerChoice choice;
  Options options("flexchat tokenizer decode", "A JSON list of ids from standard input to text.");
  choice.declare(options);
  if (!options.parse(words)) return 0;
  const Tokenizer tokenizer = choice.load();
  write_stdout(tokenizer.decode(parse_ids(read_stdin())));
  return 0;
}

// ---- eval -------------------------------------------------------------------------------------------------

struct Sample {
  const char *name, *text;
};
// A little of what a chat model reads, so that vocabularies can be compared without any data at hand.
constexpr Sample kSamples[] = {
    {"prose",
     "The harbour was quiet that morning. A single fishing boat came in with the tide, and the old man at "
     "the wheel "
     "didn't look up when the children called to him from the quay. \"There's weather coming,\" he said at "
     "last, "
     "tying the rope without hurry, \"so you'd better be home before noon.\" They laughed, but by eleven "
     "o'clock the "
     "sky over the hills had turned the colour of slate.\n"},
    {"chat",
     "Sure! Here are three ideas:\n\n1. **Plan the week on Sunday.** Write down the five meals you'll "
     "cook.\n2. "
     "**Buy only what's on the list.** It's cheaper, and you'll waste less.\n3. **Cook double.** Soup, rice "
     "and beans "
     "keep for days.\n\nWould you like a shopping list for two people?\n"},
    {"python",
     "def moving_average(values, window):\n    \"\"\"Mean of each run of `window` values.\"\"\"\n    if "
     "window <= 0 or "
     "window > len(values):\n        raise ValueError(f\"bad window: {window}\")\n    total = "
     "sum(values[:window])\n    "
     "out = [total / window]\n    for i in range(window, len(values)):\n        total += values[i] - "
     "values[i - "
     "window]\n        out.append(total / window)\n    return out\n"},
    {"c++",
     "template <class T>\nstd::optional<size_t> find_last(const std::vector<T>& items, const T& wanted) {\n  "
     "for "
     "(size_t i = items.size(); i-- > 0;) {\n    if (items[i] == wanted) return i;\n  }\n  return "
     "std::nullopt;\n}\n"},
    {"numbers",
     "In 1969 the total was 1,204,377; by 2024 it had grown to 98,450,112 (+8,074%). sqrt(2) = 1.41421356, "
     "17 * 23 = "
     "391, 0x1F = 31, 12:45:09, 2023-11-05T08:30:00Z.\n"},
    {"european",
     "Der Zug fährt um halb acht ab; wir müssen uns beeilen. Où est la bibliothèque, s'il vous plaît ? El "
     "niño comió "
     "una manzana y se quedó dormido. Příliš žluťoučký kůň úpěl ďábelské ódy.\n"},
    {"asian",
     "今天下午我们去图书馆看书。明日は雨が降るかもしれません。오늘은 날씨가 정말 좋네요. आज मौसम बहुत अच्छा "
     "है।\n"},
};

struct Compression {
  int64_t bytes = 0, characters = 0, words = 0, tokens = 0;

  void add(const Tokenizer& tokenizer, const std::vector<std::string>& texts) {
    const std::vector<std::string_view> views(texts.begin(), texts.end());
    for (const auto& ids : tokenizer.encode_batch(views)) tokens += static_cast<int64_t>(ids.size());
    for (const std::string& text : texts) {
      bytes += static_cast<int64_t>(text.size());
      characters += count_characters(text);
      bool in_word = false;
      for (const char c : text) {
        const bool space = c == ' ' || (c >= '\t' && c <= '\r');
        words += !space && !in_word ? 1 : 0;
        in_word = !space;
      }
    }
  }
  void add(const Compression& other) {
    bytes += other.bytes;
    characters += other.characters;
    words += other.words;
    tokens += other.tokens;
  }
  double bytes_per_token() const {
    return static_cast<double>(bytes) / static_cast<double>(std::max<int64_t>(tokens, 1));
  }
  double tokens_per_word() const {
    return static_cast<double>(tokens) / static_cast<double>(std::max<int64_t>(words, 1));
  }
};

struct EvalCommand {
  TokenizerChoice choice;
  std::vector<std::string> data;
  int64_t max_chars = 20'000'000, threads = num_threads();
  bool json = false;

  void declare(Options& o) {
    choice.declare(o);
    o.add("--data", &data, "files, globs or folders to measure on; without it, small built-in samples");
    o.add("--max-chars", &max_chars, "of each --data word use about this many characters; 0: all")
        .at_least(0);
    o.add("--threads", &threads, "threads").at_least(1).at_most(1024);
    o.add("--json", &json, "print JSON instead of the table").not_recorded();
  }
};

Compression measure_data(const Tokenizer& tokenizer, const std::string& path, int64_t max_chars) {
  const auto documents = open_documents({path}, Split::all);
  Compression sum;
  for (bool more = true; more && (max_chars == 0 || sum.characters < max_chars);) {
    std::vector<std::string> texts;
    int64_t bytes = 0;
    const int64_t wanted =
        max_chars == 0 ? int64_t{8} << 20 : std::min(max_chars - sum.characters, int64_t{8} << 20);
    for (std::string text; bytes < wanted && (more = documents->next(text));) {
      bytes += static_cast<int64_t>(text.size());
      texts.push_back(std::move(text));
    }
    sum.add(tokenizer, texts);
  }
  note_replaced(documents->stats().invalid_utf8, path);
  return sum;
}

int eval_command(const Words& words) {
  EvalCommand c;
  Options options("flexchat tokenizer eval", "How far a tokenizer compresses text.");
  c.declare(options);
  if (!options.parse(words)) return 0;
  set_num_threads(static_cast<int>(c.threads));
  const Tokenizer tokenizer = c.choice.load();
  std::vector<std::pair<std::string, Compression>> rows;
  if (c.data.empty()) {
    for (const Sample& sample : kSamples) {
      rows.emplace_back(sample.name, Compression{}).second.add(tokenizer, {sample.text});
    }
  }
  for (const std::string& path : c.data) rows.emplace_back(path, measure_data(tokenizer, path, c.max_chars));
  Compression total;
  for (const auto& [name, compression] : rows) total.add(compression);
  if (rows.size() > 1) rows.emplace_back("all", total);

  Table table({"text", "bytes", "characters", "words", "tokens", "bytes/token", "tokens/word"});
  Json list = Json::array();
  for (const auto& [name, x] : rows) {
    table.row({name, format_count(x.bytes), format_count(x.characters), format_count(x.words),
               format_count(x.tokens), fmt::format("{:.3f}", x.bytes_per_token()),
               fmt::format("{:.3f}", x.tokens_per_word())});
    list.push_back({{"text", name},
                    {"bytes", x.bytes},
                    {"characters", x.characters},
                    {"words", x.words},
                    {"tokens", x.tokens},
                    {"bytes_per_token", x.bytes_per_token()},
                    {"tokens_per_word", x.tokens_per_word()}});
  }
  if (c.json) {
    const Json summary = {{"vocab_size", tokenizer.vocab_size()}, {"texts", list}};
    write_json(summary, 2);
  } else {
    write_stdout(
        fmt::format("vocabulary of {} tokens\n{}", format_count(tokenizer.vocab_size()), table.text()));
  }
  return 0;
}

// ---- render -----------------------------------------------------------------------------------------------

int render_command(const Words& words) {
  TokenizerChoice choice;
  int64_t max_tokens = kMaxConversationTokens;
  bool completion = false;
  Options options("flexchat tokenizer render",
                  "A conversation (JSON) from standard input to ids and loss mask.");
  choice.declare(options);
  options.add("--max-tokens", &max_tokens, "cut to this many tokens").at_least(1);
  options.add("--completion", &completion,
              "drop the last assistant message and leave its start open: ids only");
  if (!options.parse(words)) return 0;
  const Tokenizer tokenizer = choice.load();
  const Conversation conversation = parse_conversation(read_stdin(), "standard input");
  if (completion) {
    write_stdout(fmt::format("{{\"ids\": {}}}\n",
                             ids_text(render_for_completion(tokenizer, conversation, max_tokens))));
    return 0;
  }
  const RenderedConversation rendered = render_conversation(tokenizer, conversation, max_tokens);
  write_stdout(fmt::format("{{\"ids\": {}, \"mask\": {}}}\n", ids_text(rendered.ids),
                           ids_text(std::vector<int32_t>(rendered.mask.begin(), rendered.mask.end()))));
  return 0;
}

}  // namespace

int cmd_tokenizer(const Words& words) {
  return run_subcommand("tokenizer",
                        {{"train", train_command, "learn a vocabulary from text"},
                         {"encode", encode_command, "text to ids"},
                         {"decode", decode_command, "ids to text"},
                         {"eval", eval_command, "bytes per token and tokens per word"},
                         {"render", render_command, "a conversation to ids and loss mask"}},
                        words);
}

}  // namespace flexchat

// Every format, the split, exact resume and bad input of the document streams.
#include "data/source.h"

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/rng.h"
#include "base/strings.h"
#include "base/utf8.h"
#include "data/readers.h"
#include "data_sources/helpers.h"

namespace flexchat {
namespace {

std::vector<std::string> read_all(const std::vector<std::string>& paths, Split split = Split::all) {
  return drain(*open_documents(paths, split));
}

// What tests/data/sources/generate.py wrote as row i.
std::string fixture_text(const std::string& name, int i) {
  std::string out = name + " document " + std::to_string(i) + ": ";
  for (int k = 0; k < i * 7 % 23; ++k) out += "word ";
  return out + "caf\u00e9 \U0001F600";
}

// ---- text -------------------------------------------------------------------------------------------------

TEST(TextSource, SmallFilesAreOneDocumentEachInNameOrder) {
  TempDir dir;
  dir.write("b.txt", "second\n\nfile\n");
  dir.write("a.MD", "# first");
  dir.write("sub/c.txt", "\xEF\xBB\xBFthird");  // byte order mark
  dir.write(".hidden/x.txt", "never");
  dir.write(".hidden.txt", "never");
  dir.write("d.html", "never");
  dir.write("e.txt", "");
  EXPECT_EQ(read_all({dir.path()}), (std::vector<std::string>{"# first", "second\n\nfile\n", "third"}));
}

TEST(TextSource, LargeFilesAreCutAndNothingIsLost) {
  TempDir dir;
  Rng rng(1);
  std::string bytes;
  while (bytes.size() < 500000) {
    const uint64_t kind = rng.below(40);
    if (kind == 0) {
      bytes += "\n\n";
    } else if (kind == 1) {
      bytes += "\r\n\r\n";
    } else if (kind < 5) {
      bytes += "\n";
    } else {
      bytes += kind < 10 ? "\u20ac" : "word ";
    }
  }
  bytes += std::string(40000, 'x');                   // no place to cut
  for (int i = 0; i < 20000; ++i) bytes += "\u20ac";  // must not be cut inside a character
  std::string joined;
  const auto documents = read_all({dir.write("big.txt", bytes)});
  for (size_t i = 0; i < documents.size(); ++i) {
    EXPECT_LE(std::ssize(documents[i]), kTextDocumentBytes);
    if (joined.size() < 480000) {
      EXPECT_TRUE(documents[i].ends_with("\n\n") || documents[i].ends_with("\n\r\n")) << "document " << i;
    }
    joined += documents[i];
  }
  EXPECT_EQ(joined, bytes);
  EXPECT_LT(documents.size(), 2 * bytes.size() / kTextDocumentBytes + 2);
}

TEST(TextSource, CutsAtLineEndsThenSpaces) {
  TempDir dir;
  const std::string lines =
      std::string(10000, 'a') + "\n" + std::string(10000, 'b') + " " + std::string(10000, 'c');
  const auto documents = read_all({dir.write("big.txt", lines)});
  ASSERT_EQ(documents.size(), 3u);
  EXPECT_EQ(documents[0], std::string(10000, 'a') + "\n");
  EXPECT_EQ(documents[1], std::string(10000, 'b') + " ");
  EXPECT_EQ(documents[2], std::string(10000, 'c'));
}

TEST(TextSource, EndOfTextSeparatesDocuments) {
  TempDir dir;
  // The last separator starts exactly on the size limit, where a cut would fall too.
  const std::string full(static_cast<size_t>(kTextDocumentBytes), 'x');
  const std::string path =
      dir.write("a.txt", "one\n<|endoftext|>\ntwo<|endoftext|>\r\n<|endoftext|>\n\nthree<|endoftext|>" +
                             full + "<|endoftext|>");
  auto stream = open_documents({path}, Split::all);
  EXPECT_EQ(drain(*stream), (std::vector<std::string>{"one\n", "two", "\nthree", full}));
  EXPECT_EQ(stream->stats().empty_documents, 1);
}

// ---- JSON lines -------------------------------------------------------------------------------------------

TEST(JsonlSource, ReadsTheTextField) {
  TempDir dir;
  const std::string path = dir.write(
      "a.jsonl",
      "{\"id\": 1, \"text\": \"one\\n\\u20ac\", \"meta\": {\"text\": \"inner\", \"deep\": [[1, {}]]}}\r\n"
      "\n  \n"
      "{\"text\": null}\n{\"text\": \"\"}\n"
      "{\"meta\": [\"text\", \"no\"], \"text\": \"\\ud83d\\ude00\"}\n"
      "{\"text\": \"last, without a line end\"}");
  auto stream = open_documents({path}, Split::all);
  EXPECT_EQ(drain(*stream),
            (std::vector<std::string>{"one\n\u20ac", "\U0001F600", "last, without a line end"}));
  EXPECT_EQ(stream->stats().documents, 3);
  EXPECT_EQ(stream->stats().empty_documents, 2);
  EXPECT_EQ(stream->stats().invalid_utf8, 0);
}

TEST(JsonlSource, LongLinesCrossReadBoundaries) {
  TempDir dir;
  std::string lines;
  std::vector<std::string> expected;
  for (int i = 0; i < 12; ++i) {
    expected.push_back(std::string(static_cast<size_t>(i) * 100003 + 7, static_cast<char>('a' + i)));
    lines += "{\"text\":\"" + expected.back() + "\"}\n";
  }
  EXPECT_EQ(read_all({dir.write("long.jsonl", lines)}), expected);
}

TEST(JsonlSource, BadLinesNameTheirPlace) {
  TempDir dir;
  const auto message = [&](const std::string& line) {
    const std::string path = dir.write("bad.jsonl", "{\"text\": \"fine\"}\n\n" + line + "\n");
    const std::string text = error_of([&] { read_all({path}); });
    expect_contains(text, path + ":3: ");
    return text;
  };
  expect_contains(message("{\"text\": \"cut"), "not valid JSON at byte 14");
  expect_contains(message("{\"text\": \"a\"} x"), "not valid JSON");
  expect_contains(message("{\"id\": 1, \"body\": \"a\"}"), "no field 'text' (fields: id, body)");
  expect_contains(message("{}"), "no field 'text' (fields: none)");
  expect_contains(message("{\"text\": 5}"), "field 'text' is a number, not a string");
  expect_contains(message("{\"text\": true}"), "is a boolean");
  expect_contains(message("{\"text\": {\"text\": \"a\"}}"), "is an object");
  expect_contains(message("{\"text\": [\"a\"]}"), "is an array");
  expect_contains(message("[{\"text\": \"a\"}]"), "not a JSON object");
  expect_contains(message("\"text\""), "not a JSON object");
  expect_contains(message(std::string(100000, '[')), "not a JSON object");
}

TEST(JsonlSource, DeepNestingIsHarmless) {
  const std::string deep(1000000, '['), back(1000000, ']');
  EXPECT_EQ(parse_jsonl_line("{\"a\": " + deep + back + ", \"text\": \"x\"}", "f:1", nullptr), "x");
}

TEST(JsonlSource, LoneSurrogatesAreReplaced) {
  const auto parse = [](const std::string& text, int64_t* n) {
    return parse_jsonl_line("{\"text\": \"" + text + "\"}", "f:1", n);
  };
  int64_t replaced = 0;
  EXPECT_EQ(parse("a\\ud83db", &replaced), "a\uFFFDb");
  EXPECT_EQ(parse("\\uDE00\\uD83D\\uDE00", &replaced), "\uFFFD\U0001F600");
  EXPECT_EQ(parse("\\ud83d\\ud83d\\ude00", &replaced), "\uFFFD\U0001F600");
  EXPECT_EQ(parse("\\ud83d", &replaced), "\uFFFD");
  EXPECT_EQ(replaced, 4);
  EXPECT_EQ(parse("\\\\ud83d", &replaced), "\\ud83d");  // an escaped backslash, not an escape of a character
  EXPECT_EQ(replaced, 4);
}

TEST(Source, InvalidUtf8IsReplacedAndCounted) {
  TempDir dir;
  dir.write("a.txt", "bad \xFF\xFE end");
  dir.write("b.jsonl", "{\"text\": \"x\xC3\"}\n{\"text\": \"fine \u00e9\"}\n");
  dir.copy_fixture("binary.parquet", "c.parquet");
  auto stream = open_documents({dir.path()}, Split::all);
  EXPECT_EQ(drain(*stream), (std::vector<std::string>{"bad \uFFFD\uFFFD end", "x\uFFFD", "fine \u00e9",
                                                      "ab\uFFFD\uFFFDc", "plain"}));
  EXPECT_EQ(stream->stats().invalid_utf8, 5);
  EXPECT_EQ(stream->stats().invalid_documents, 3);
  EXPECT_EQ(stream->stats().documents, 5);
}

// ---- parquet ----------------------------------------------------------------------------------------------

TEST(ParquetSource, ReadsEveryEncoding) {
  std::vector<std::string> zstd, snappy, delta, categories;
  for (int i = 0; i < 23; ++i) zstd.push_back(fixture_text("zstd", i));
  for (int i = 0; i < 14; ++i) {
    if (i % 4 != 1 && i % 4 != 2) snappy.push_back(fixture_text("snappy", i));
  }
  for (int i = 0; i < 80; ++i) delta.push_back(fixture_text("delta", i));
  for (int i = 0; i < 7; ++i) categories.push_back(fixture_text("cat", i % 3));
  EXPECT_EQ(read_all({fixture_path("zstd.parquet")}), zstd);
  EXPECT_EQ(read_all({fixture_path("delta.parquet")}), delta);
  EXPECT_EQ(read_all({fixture_path("categories.parquet")}), categories);
  auto stream = open_documents({fixture_path("snappy_large.parquet")}, Split::all);
  EXPECT_EQ(drain(*stream), snappy);
  EXPECT_EQ(stream->stats().empty_documents, 7);
}

TEST(ParquetSource, ColumnErrorsNameTheColumns) {
  const auto message = [](const std::string& name) {
    const std::string path = fixture_path(name);
    const std::string text = error_of([&] { open_documents({path}, Split::all); });
    expect_contains(text, path);
    return text;
  };
  expect_contains(message("no_text.parquet"), "no column 'text' (columns: id, url)");
  expect_contains(message("int_text.parquet"), "column 'text' is INT64, not a string");
  expect_contains(message("list_text.parquet"), "column 'text' is nested, not a string");
}

TEST(ParquetSource, DamagedFilesAreFoundWhenOpening) {
  TempDir dir;
  const std::string bytes = read_file(fixture_path("zstd.parquet"));
  for (const size_t keep : {size_t{0}, size_t{3}, size_t{11}, bytes.size() / 2, bytes.size() - 1}) {
    dir.copy_fixture("delta.parquet", "a.parquet");
    dir.copy_fixture("delta.parquet", "z.parquet");
    const std::string cut = dir.write("m.parquet", bytes.substr(0, keep));
    const std::string text = error_of([&] { open_documents({dir.path()}, Split::train); });
    expect_contains(text, cut + ": damaged or foreign parquet file");
    std::filesystem::remove(dir.path("a.parquet"));
    std::filesystem::remove(dir.path("z.parquet"));
  }
  error_of([&] { open_documents({dir.write("m.parquet", "just text, no parquet at all")}, Split::all); });
}

// Bytes changed at random: documents or one Error, nothing else.
TEST(ParquetSource, MutatedBytesNeverCrash) {
  Rng rng(7);
  int errors = 0, cases = 0;
  for (const char* name : {"zstd.parquet", "snappy_large.parquet", "delta.parquet", "categories.parquet"}) {
    const std::string original = read_file(fixture_path(name));
    for (int i = 0; i < 250; ++i, ++cases) {
      std::string bytes = original;
      for (uint64_t n = rng.below(4) + 1; n > 0; --n)
        bytes[rng.below(bytes.size())] = static_cast<char>(rng.next_u32());
      if (rng.below(10) == 0) bytes.erase(rng.below(bytes.size()), rng.below(64));
      try {
        const auto reader = open_parquet_bytes(bytes, name, {});
        int64_t replaced = 0, invalid = 0;
        for (std::string text; reader->next(&text, &replaced);) {
          replace_invalid_utf8(text, &invalid);
          ASSERT_EQ(invalid, 0);
        }
      } catch (const Error& e) {
        expect_contains(e.what(), name);
        ++errors;
      }
    }
  }
  EXPECT_GT(errors, cases / 10);
  EXPECT_LT(errors, cases);
}

// ---- split, ranks, positions ------------------------------------------------------------------------------

TEST(Split, LastParquetFileIsVal) {
  TempDir dir;
  dir.copy_fixture("zstd.parquet", "shard_00000.parquet");
  dir.copy_fixture("delta.parquet", "shard_00001.parquet");
  dir.copy_fixture("categories.parquet", "shard_00002.parquet");
  const auto all = read_all({dir.path()});
  EXPECT_EQ(all.size(), 23u + 80u + 7u);
  EXPECT_EQ(read_all({dir.path()}, Split::train), std::vector<std::string>(all.begin(), all.end() - 7));
  EXPECT_EQ(read_all({dir.path()}, Split::val), std::vector<std::string>(all.end() - 7, all.end()));
  EXPECT_EQ(open_documents({dir.path()}, Split::train)->files().size(), 2u);
}

TEST(Split, DocumentsAreSpreadEvenly) {
  for (const int n : {2, 3, 9, 10, 11, 25, 99, 100, 101, 250}) {
    TempDir dir;
    dir.write_jsonl("a.jsonl", "doc ", n / 2);
    dir.write_jsonl("b.jsonl", "more ", n - n / 2);
    const auto all = read_all({dir.path()}), val = read_all({dir.path()}, Split::val);
    ASSERT_EQ(std::ssize(all), n);
    std::vector<std::string> expected_val, expected_train;
    for (int i = 0; i < n; ++i) {
      const bool is_val = n >= 100 ? i % 100 == 99 : n >= 10 ? i % 10 == 9 : i == n - 1;
      (is_val ? expected_val : expected_train).push_back(all[static_cast<size_t>(i)]);
    }
    EXPECT_EQ(val, expected_val) << n;
    EXPECT_EQ(read_all({dir.path()}, Split::train), expected_train) << n;
    EXPECT_FALSE(val.empty());
  }
}

TEST(Split, ASingleDocumentIsTrain) {
  TempDir dir;
  const std::string path = dir.write("a.txt", "only one");
  EXPECT_EQ(read_all({path}, Split::train).size(), 1u);
  const std::string text = error_of([&] { open_documents({path}, Split::val); });
  expect_contains(text, "no document is left for validation");
  expect_contains(text, path);
}

TEST(Source, RanksShareTheDocumentsRoundRobin) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "doc ", 37);
  const auto whole = read_all({path}, Split::train);
  for (int rank = 0; rank < 3; ++rank) {
    std::vector<std::string> expected;
    for (size_t i = static_cast<size_t>(rank); i < whole.size(); i += 3) expected.push_back(whole[i]);
    EXPECT_EQ(drain(*open_documents({path}, Split::train, rank, 3)), expected);
  }
  expect_contains(error_of([&] { open_documents({path}, Split::val, 3, 4); }), "no document for rank 3 of 4");
  expect_contains(error_of([&] { open_documents({path}, Split::val, 4, 4); }), "rank 4 must be in [0, 4)");
}

TEST(Source, ResumesAtEveryPosition) {
  TempDir dir;
  dir.write_jsonl("a.jsonl", "a \u00e9", 13);
  dir.copy_fixture("zstd.parquet", "b.parquet");
  dir.copy_fixture("snappy_large.parquet", "c.parquet");
  dir.write("d.txt", std::string(50000, 'x') + "\n\n" + std::string(20000, 'y'));
  dir.copy_fixture("delta.parquet", "e.parquet");
  dir.write("f.txt", "tail");
  for (const auto& [split, rank, world] :
       {std::tuple{Split::all, 0, 1}, {Split::train, 1, 2}, {Split::val, 0, 1}}) {
    auto stream = open_documents({dir.path()}, split, rank, world);
    std::vector<SourcePosition> positions = {stream->position()};
    std::vector<std::string> documents;
    for (int pass = 0; pass < 2; ++pass) {
      for (std::string text; stream->next(text);) {
        documents.push_back(text);
        positions.push_back(stream->position());
      }
      EXPECT_EQ(stream->position().epoch, pass + 1);
      stream->rewind();
    }
    ASSERT_GE(documents.size(), 2u);
    auto other = open_documents({dir.path()}, split, rank, world);
    for (size_t i = 0; i < positions.size(); ++i) {
      other->seek(source_position_from_json(to_json(positions[i]), "test"));
      EXPECT_EQ(other->position(), positions[i]);
      std::vector<std::string> rest = drain(*other);
      while (other->position().epoch < 2) {
        other->rewind();
        const auto pass = drain(*other);
        rest.insert(rest.end(), pass.begin(), pass.end());
      }
      EXPECT_EQ(rest,
                std::vector<std::string>(documents.begin() + static_cast<ptrdiff_t>(i), documents.end()));
    }
  }
}

TEST(Source, RefusesPositionsOfOtherData) {
  TempDir dir;
  const std::string path = dir.write_jsonl("a.jsonl", "doc ", 20);
  const SourcePosition position = open_documents({path}, Split::train)->position();
  const auto refuse = [&](DocumentStream& stream) {
    const std::string text = error_of([&] { stream.seek(position); });
    expect_contains(text, "cannot resume");
    expect_contains(text, position.identity);
  };
  refuse(*open_documents({path}, Split::all));
  refuse(*open_documents({path}, Split::train, 0, 2));
  dir.write_jsonl("b.jsonl", "doc ", 20);
  refuse(*open_documents({dir.path()}, Split::train));
  dir.write_jsonl("a.jsonl", "dox ", 21);
  refuse(*open_documents({path}, Split::train));
}

TEST(Source, MovedDataIsTheSameData) {
  TempDir one, two;
  const std::string a = one.write_jsonl("a.jsonl", "doc ", 20), b = two.write_jsonl("a.jsonl", "doc ", 20);
  auto stream = open_documents({a}, Split::train), moved = open_documents({b}, Split::train);
  std::string text;
  for (int i = 0; i < 5; ++i) stream->next(text);
  moved->seek(stream->position());
  EXPECT_EQ(drain(*moved), drain(*stream));
}

TEST(Source, BadPositionsAreErrors) {
  TempDir dir;
  auto stream = open_documents({dir.write_jsonl("a.jsonl", "doc ", 20)}, Split::train);
  const Json good = to_json(stream->position());
  const auto reject = [&](const std::function<void(Json&)>& change) {
    Json json = good;
    change(json);
    expect_contains(error_of([&] { stream->seek(source_position_from_json(json, "state.json")); }),
                    "position");
  };
  reject([](Json& j) { j.erase("row"); });
  reject([](Json& j) { j["extra"] = 1; });
  reject([](Json& j) { j["row"] = -1; });
  reject([](Json& j) { j["row"] = 1.5; });
  reject([](Json& j) { j["identity"] = 3; });
  reject([](Json& j) { j["file"] = 2; });
  reject([](Json& j) { j["epoch"] = 0; });
  reject([](Json& j) { j = Json::array(); });
  SourcePosition position = open_documents({fixture_path("zstd.parquet")}, Split::all)->position();
  auto parquet = open_documents({fixture_path("zstd.parquet")}, Split::all);
  std::string text;
  position.offset = 99;
  parquet->seek(position);
  expect_contains(error_of([&] { parquet->next(text); }), "no row group 99");
  position.offset = 1;
  position.row = 10;
  parquet->seek(position);
  expect_contains(error_of([&] { parquet->next(text); }), "row group 1 has no row 10");
}

// ---- finding files ----------------------------------------------------------------------------------------

TEST(FindFiles, GlobsFoldersAndFiles) {
  TempDir dir;
  const std::string a = dir.write("x/a.txt", "a"), b = dir.write("x/b.jsonl", "{\"text\":\"b\"}");
  const std::string c = dir.write("y/c.txt", "c");
  dir.write("x/ignored.bin", "?");
  const auto paths = [](const std::vector<std::string>& given) {
    std::vector<std::string> out;
    for (const auto& file : find_source_files(given)) out.push_back(file.path);
    return out;
  };
  EXPECT_EQ(paths({dir.path()}), (std::vector<std::string>{a, b, c}));
  EXPECT_EQ(paths({dir.path("x/*")}), (std::vector<std::string>{a, b}));
  EXPECT_EQ(paths({dir.path("*/?.txt")}), (std::vector<std::string>{a, c}));
  EXPECT_EQ(paths({dir.path("[xy]")}), (std::vector<std::string>{a, b, c}));
  EXPECT_EQ(paths({c, a, dir.path("x/../x/a.txt"), dir.path("x") + "/"}),
            (std::vector<std::string>{a, b, c}));
  const std::string odd = dir.write("odd[1].txt", "a name that looks like a glob");
  EXPECT_EQ(paths({odd}), (std::vector<std::string>{odd}));
  EXPECT_EQ(find_source_files({c})[0].bytes, 1);
}

TEST(FindFiles, ErrorsNameThePath) {
  TempDir dir;
  const auto message = [](const std::string& path) {
    const std::string text = error_of([&] { find_source_files({path}); });
    expect_contains(text, path);
    return text;
  };
  expect_contains(message(dir.path("absent.txt")), "no such data file or folder");
  expect_contains(message(dir.path("absent/*.txt")), "no .txt, .md, .jsonl, .parquet files match");
  expect_contains(message(dir.path()), "no .txt, .md, .jsonl, .parquet files in the folder");
  expect_contains(message(dir.write("a.csv", "x")), "allowed are .txt, .md, .jsonl, .parquet");
  std::filesystem::create_symlink("nowhere", dir.path("dangling.txt"));
  expect_contains(message(dir.path("dangling.txt")), "no such data file");
  expect_contains(error_of([&] { find_source_files({dir.path()}); }),
                  "cannot read " + dir.path("dangling.txt"));
  expect_contains(error_of([] { find_source_files({}); }), "no data given");
}

TEST(Source, EmptyDataIsAnError) {
  TempDir dir;
  const std::string empty = dir.write("a.txt", ""), blank = dir.write("b.jsonl", "\n\n");
  const std::string nothing = dir.write("c.jsonl", "{\"text\": \"\"}\n{\"text\": null}\n");
  for (const Split split : {Split::train, Split::val, Split::all}) {
    expect_contains(error_of([&] { open_documents({empty, blank}, split); }), "no documents in the data");
    expect_contains(error_of([&] { open_documents({empty, blank, nothing}, split); }), "no text in the data");
  }
}

}  // namespace
}  // namespace flexchat

// The safetensors reader and writer: a file built byte by byte, round trips, conversions, and every kind of
// bad file.
#include "checkpoint/safetensors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "base/error.h"
#include "base/file.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

std::string with_length(const std::string& header, const std::string& data) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 0xFF);
  return bytes + header + data;
}

SafetensorsFile parse(const std::string& bytes) { return SafetensorsFile::parse(bytes, "x.safetensors"); }

std::string parse_error(const std::string& header, const std::string& data) {
  return message_of<Error>([&] { parse(with_length(header, data)); });
}

std::string streamed(const NamedTensors& tensors, const StringMap& metadata) {
  std::string bytes;
  write_safetensors([&](const void* p, size_t n) { bytes.append(static_cast<const char*>(p), n); }, tensors,
                    metadata);
  return bytes;
}

TEST(SafetensorsReader, ReadsAFileBuiltByHand) {
  // a: 1.5, -2 as f32; b: scalar i32 7; c: no elements; spaces after the header as other writers leave them.
  const std::string header =
      R"({"b":{"dtype":"I32","shape":[],"data_offsets":[8,12]},"__metadata__":{"config":"{\"n\": 1}"},)"
      R"("a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},"c":{"data_offsets":[12,12],"shape":[0,5],"dtype":"U8"}}   )";
  const std::string data("\x00\x00\xc0\x3f\x00\x00\x00\xc0\x07\x00\x00\x00", 12);
  const std::string bytes = with_length(header, data);
  const SafetensorsFile f = parse(bytes);
  ASSERT_EQ(f.entries().size(), 3u);
  EXPECT_EQ(f.entries()[0].name, "a");
  EXPECT_EQ(f.entries()[2].name, "c");
  EXPECT_EQ(f.metadata().at("config"), "{\"n\": 1}");
  const Tensor a = f.load("a"), b = f.load("b"), c = f.load("c");
  EXPECT_EQ(a.shape(), (Shape{1, 2}));
  EXPECT_EQ(a.get(0), 1.5);
  EXPECT_EQ(a.get(1), -2.0);
  EXPECT_EQ(b.shape(), Shape{});
  EXPECT_EQ(b.item(), 7.0);
  EXPECT_EQ(c.shape(), (Shape{0, 5}));
  EXPECT_TRUE(f.contains("a"));
  EXPECT_FALSE(f.contains("z"));
}

TEST(SafetensorsReader, AcceptsAFileWithoutTensors) {
  const std::string bytes = with_length("{}", "");
  EXPECT_TRUE(parse(bytes).entries().empty());
}

TEST(SafetensorsReader, ReadsUnalignedData) {
  const std::string header = R"({"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("d":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}})";
  const std::string bytes = with_length(header, std::string("\x05\0\0\0\0\0\0\xf8\x3f", 9));
  EXPECT_EQ(parse(bytes).load("d").item(), 1.5);
  EXPECT_EQ(parse(bytes).load("d", {1}, DType::f32).item(), 1.5);
}

struct BadHeader {
  const char* name;
  std::string header, data, expected;  // expected: parts of the message, separated by '|'
};

class SafetensorsBadHeader : public ::testing::TestWithParam<BadHeader> {};

TEST_P(SafetensorsBadHeader, IsRefusedAndNamed) {
  const std::string message = parse_error(GetParam().header, GetParam().data);
  EXPECT_TRUE(message.starts_with("x.safetensors: ")) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos);
  std::string parts = GetParam().expected;
  for (size_t bar = 0; bar != std::string::npos;) {
    bar = parts.find('|');
    EXPECT_NE(message.find(parts.substr(0, bar)), std::string::npos)
        << message << "\nlacks: " << parts.substr(0, bar);
    parts = bar == std::string::npos ? "" : parts.substr(bar + 1);
  }
}

std::string one(const std::string& fields) { return "{\"w\":{" + fields + "}}"; }

INSTANTIATE_TEST_SUITE_P(
    Safetensors, SafetensorsBadHeader,
    ::testing::Values(
        BadHeader{"Empty", "", "", "must start with"},
        BadHeader{"NotJson", "{nonsense", "", "not valid JSON"},
        BadHeader{"Unfinished", "{\"w\":{", "", "not valid JSON"},
        BadHeader{"Array", "[]", "", "must start with"},
        BadHeader{"LeadingSpace", " {}", "", "must start with"},
        BadHeader{"ZeroByte", std::string("{}\0", 3), "", "zero byte"},
        BadHeader{"TrailingJson", "{}{}", "", "not valid JSON"},
        BadHeader{"BadUtf8", "{\"\xff\":{}}", "", "not valid JSON"},
        BadHeader{"TensorIsNumber", "{\"w\":3}", "", "'w'|must be an object"},
        BadHeader{"UnknownDtype", one(R"("dtype":"BOOL","shape":[1],"data_offsets":[0,1])"), "a",
                  "'w'|'BOOL'|allowed: F64, F32, BF16"},
        BadHeader{"DtypeNumber", one(R"("dtype":5,"shape":[1],"data_offsets":[0,1])"), "a",
                  "'w'|'dtype'|a number"},
        BadHeader{"ShapeNegative", one(R"("dtype":"U8","shape":[-1],"data_offsets":[0,1])"), "a",
                  "'w'|negative"},
        BadHeader{"ShapeFraction", one(R"("dtype":"U8","shape":[1.0],"data_offsets":[0,1])"), "a",
                  "'w'|fraction"},
        BadHeader{"ShapeNested", one(R"("dtype":"U8","shape":[[1]],"data_offsets":[0,1])"), "a",
                  "'w'|an array"},
        BadHeader{"ShapeObject", one(R"("dtype":"U8","shape":{},"data_offsets":[0,1])"), "a",
                  "'w'|an object"},
        BadHeader{"ShapeString", one(R"("dtype":"U8","shape":["1"],"data_offsets":[0,1])"), "a",
                  "'w'|a string"},
        BadHeader{"ShapeNull", one(R"("dtype":"U8","shape":null,"data_offsets":[0,1])"), "a", "'w'|null"},
        BadHeader{"ShapeHuge", one(R"("dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1])"), "a",
                  "'w'|2^63"},
        BadHeader{"ProductOverflows",
                  one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"), "",
                  "'w'|64 bits"},
        BadHeader{"BytesOverflow", one(R"("dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0])"),
                  "", "'w'|64 bits"},
        BadHeader{"NoShape", one(R"("dtype":"U8","data_offsets":[0,1])"), "a", "'w'|no 'shape'"},
        BadHeader{"NoDtype", one(R"("shape":[1],"data_offsets":[0,1])"), "a", "'w'|no 'dtype'"},
        BadHeader{"NoOffsets", one(R"("dtype":"U8","shape":[1])"), "a", "'w'|no 'data_offsets'"},
        BadHeader{"OneOffset", one(R"("dtype":"U8","shape":[1],"data_offsets":[0])"), "a", "'w'|two numbers"},
        BadHeader{"ThreeOffsets", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1,2])"), "a",
                  "'w'|two numbers"},
        BadHeader{"Backwards", one(R"("dtype":"U8","shape":[1],"data_offsets":[1,0])"), "a", "'w'|backwards"},
        BadHeader{"BeyondEnd", one(R"("dtype":"U8","shape":[2],"data_offsets":[0,2])"), "a", "'w'|beyond"},
        BadHeader{
            "HugeOffsets",
            one(R"("dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615])"),
            "a", "'w'|beyond"},
        BadHeader{"WrongSize", one(R"("dtype":"F32","shape":[2],"data_offsets":[0,4])"), "abcd",
                  "'w'|needs 8"},
        BadHeader{"Trailing", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1])"), "ab", "1 bytes after"},
        BadHeader{"GapAtStart", one(R"("dtype":"U8","shape":[1],"data_offsets":[1,2])"), "ab",
                  "'w'|1 unused bytes"},
        BadHeader{
            "Overlap",
            R"({"v":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
            "abc", "'w'|overlap"},
        BadHeader{
            "DuplicateTensor",
            R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
            "ab", "'w'|twice"},
        BadHeader{"DuplicateKey", one(R"("dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1])"), "a",
                  "'w'|'dtype'|twice"},
        BadHeader{"UnknownKey", one(R"("dtype":"U8","shape":[1],"data_offsets":[0,1],"scale":2)"), "a",
                  "'w'|'scale'|allowed"},
        BadHeader{"MetadataNumber", R"({"__metadata__":{"a":1}})", "", "'a'|must be a string"},
        BadHeader{"MetadataNested", R"({"__metadata__":{"a":{}}})", "", "'a'|must be a string"},
        BadHeader{"MetadataTwice", R"({"__metadata__":{},"__metadata__":{}})", "", "__metadata__|twice"},
        BadHeader{"NewlineInName", "{\"a\\nb\":3}", "", "a\\x0ab"}),
    [](const auto& test) { return test.param.name; });

TEST(SafetensorsReader, RefusesBadLengthWords) {
  const auto error = [](const std::string& bytes) { return message_of<Error>([&] { parse(bytes); }); };
  EXPECT_NE(error("").find("too short"), std::string::npos);
  EXPECT_NE(error("1234567").find("too short"), std::string::npos);
  EXPECT_NE(error(std::string(8, '\xff') + "{}").find("at most 100000000"), std::string::npos);
  EXPECT_NE(error(std::string("\x09\0\0\0\0\0\0\0{}", 10)).find("truncated"), std::string::npos);
}

TEST(SafetensorsReader, SurvivesDeepNesting) {
  const std::string deep(200000, '[');
  EXPECT_NE(parse_error("{\"w\":" + deep, "").find("'w'"), std::string::npos);
}

TEST(SafetensorsReader, EveryTruncationIsAnError) {
  const NamedTensors tensors = {{"first", Tensor::zeros(host_arena(), {3}, DType::f32)},
                                {"second", Tensor::zeros(host_arena(), {5}, DType::u8)}};
  const std::string whole = streamed(tensors, {{"k", "v"}});
  for (size_t n = 0; n < whole.size(); ++n) {
    const std::string cut = whole.substr(0, n);
    EXPECT_THROW(parse(cut), Error) << n;
  }
  const std::string cut = whole.substr(0, whole.size() - 1);
  EXPECT_NE(message_of<Error>([&] { parse(cut); }).find("'second'"), std::string::npos);
}

TEST(SafetensorsReader, MissingFilesAndFoldersAreNamed) {
  const TempFolder folder;
  EXPECT_NE(
      message_of<Error>([&] { SafetensorsFile::open(folder / "none.safetensors"); }).find("none.safetensors"),
      std::string::npos);
  EXPECT_NE(message_of<Error>([&] { SafetensorsFile::open(folder.path()); }).find("not a regular file"),
            std::string::npos);
  write_file_atomic(folder / "empty", "");
  EXPECT_NE(message_of<Error>([&] { SafetensorsFile::open(folder / "empty"); }).find("too short"),
            std::string::npos);
}

TEST(SafetensorsReader, UnknownTensorNamesTheNearest) {
  const std::string bytes =
      streamed({{"blocks.0.attn.weight", Tensor::zeros(host_arena(), {1}, DType::f32)}}, {});
  const SafetensorsFile f = parse(bytes);
  EXPECT_EQ(message_of<Error>([&] { f.load("blocks.0.atn.weight"); }),
            "x.safetensors: no tensor 'blocks.0.atn.weight' (did you mean 'blocks.0.attn.weight'?)");
}

TEST(SafetensorsReader, PrintableNamesStayShortAndValid) {
  EXPECT_EQ(printable_name("a\tb\x7f"), "a\\x09b\\x7f");
  EXPECT_EQ(printable_name(std::string(160, 'x')), std::string(160, 'x'));
  EXPECT_EQ(printable_name(std::string(159, 'x') + "\u00fcber"), std::string(159, 'x') + "...");
  EXPECT_EQ(printable_name(""), "");
}

TEST(SafetensorsReader, RequireNamesWhatDiffers) {
  const std::string bytes = streamed({{"a", Tensor::zeros(host_arena(), {2, 3}, DType::f32)},
                                      {"b", Tensor::zeros(host_arena(), {1}, DType::f32)}},
                                     {});
  const SafetensorsFile f = parse(bytes);
  EXPECT_NO_THROW(f.require({{"b", {1}}, {"a", {2, 3}}}));
  EXPECT_EQ(message_of<Error>([&] {
              f.require({{"a", {3, 2}}, {"b", {1}}});
            }),
            "x.safetensors: tensor 'a' has shape (2, 3), expected (3, 2)");
  EXPECT_EQ(message_of<Error>([&] {
              f.require({{"a", {2, 3}}});
            }),
            "x.safetensors: unexpected tensor 'b' (1)");
  EXPECT_EQ(message_of<Error>([&] {
              f.require({{"a", {2, 3}}, {"b", {1}}, {"long name", {1}}});
            }),
            "x.safetensors: no tensor 'long name'");
}

// ---- conversions ---------------------------------------------------------------------------------------

TEST(SafetensorsLoad, FloatsConvertToFloats) {
  const std::vector<double> values = {0.0, -0.0, 1.0, -1.25, 3.14159265358979, 1e-3, 65504.0, 6.1e-5, -7.77};
  for (DType from : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    const Tensor source = Tensor::from<double>(values, {9}, from);
    const std::string bytes = streamed({{"w", source}}, {});
    for (DType to : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
      const Tensor got = parse(bytes).load("w", {9}, to);
      ASSERT_EQ(got.dtype(), to);
      Tensor expected(host_arena(), {9}, to);
      for (int64_t i = 0; i < 9; ++i) {
        expected.set(i, source.get(i));
        EXPECT_EQ(got.get(i), expected.get(i)) << dtype_name(from) << " to " << dtype_name(to) << " at " << i;
        EXPECT_EQ(std::signbit(got.get(i)), std::signbit(expected.get(i)));
      }
    }
  }
}

TEST(SafetensorsLoad, LargeConversionsReachEveryElement) {
  const int64_t n = (int64_t{1} << 17) + 3;
  Tensor source(host_arena(), {n}, DType::bf16);
  for (int64_t i = 0; i < n; ++i) source.set(i, static_cast<double>(i % 251));
  const std::string bytes = streamed({{"w", source}}, {});
  const Tensor got = parse(bytes).load("w", {n}, DType::f32);
  for (int64_t i = 0; i < n; ++i) ASSERT_EQ(got.as<float>()[i], static_cast<float>(i % 251));
}

TEST(SafetensorsLoad, IntegersConvertWhenTheyFit) {
  const std::vector<double> values = {0, 255, 17};
  const std::string bytes = streamed({{"w", Tensor::from<double>(values, {3}, DType::i64)}}, {});
  for (DType to : {DType::i64, DType::i32, DType::u8}) {
    const Tensor got = parse(bytes).load("w", {3}, to);
    for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(got.get(i), values[static_cast<size_t>(i)]);
  }
  const std::vector<double> large = {1, -1, 3e9};
  const std::string wide = streamed({{"w", Tensor::from<double>(large, {3}, DType::i64)}}, {});
  EXPECT_EQ(message_of<Error>([&] { parse(wide).load("w", {3}, DType::i32); }),
            "x.safetensors: tensor 'w': element 2 is 3000000000, which does not fit i32");
  EXPECT_EQ(message_of<Error>([&] { parse(wide).load("w", {3}, DType::u8); }),
            "x.safetensors: tensor 'w': element 1 is -1, which does not fit u8");
}

TEST(SafetensorsLoad, OtherConversionsAndShapesAreRefused) {
  const std::string bytes = streamed({{"i", Tensor::zeros(host_arena(), {2}, DType::i32)},
                                      {"f", Tensor::zeros(host_arena(), {2}, DType::f32)},
                                      {"e", Tensor::zeros(host_arena(), {2}, DType::f8e4m3)}},
                                     {});
  const SafetensorsFile f = parse(bytes);
  EXPECT_THROW(f.load("i", {2}, DType::f32), Error);
  EXPECT_THROW(f.load("f", {2}, DType::i32), Error);
  EXPECT_THROW(f.load("e", {2}, DType::f32), Error);
  EXPECT_EQ(f.load("e").dtype(), DType::f8e4m3);
  EXPECT_EQ(message_of<Error>([&] {
              f.load("f", {2, 1}, DType::f32);
            }),
            "x.safetensors: tensor 'f' has shape (2), expected (2, 1)");
  EXPECT_THROW(f.load("f", {int64_t{1} << 60}, DType::f32), Error);  // must not try to allocate
}

// ---- writer --------------------------------------------------------------------------------------------

TEST(SafetensorsWriter, RoundTripsEveryDtypeAlignedAndInOrder) {
  const TempFolder folder;
  NamedTensors tensors;
  const DType all[] = {DType::u8,  DType::f16, DType::f32,    DType::i64,   DType::bf16,
                       DType::i32, DType::f64, DType::f8e4m3, DType::f8e5m2};
  for (DType dtype : all) {
    Tensor t(host_arena(), {3, 5}, dtype);
    for (int64_t i = 0; i < t.bytes(); ++i)
      t.as<unsigned char>()[i] = static_cast<unsigned char>(i * 37 + 11);
    tensors.emplace_back(std::string("t.") + std::string(dtype_name(dtype)), t);
  }
  tensors.emplace_back("none", Tensor(host_arena(), {4, 0}, DType::f32));
  tensors.emplace_back("schön \"quoted\"\n", Tensor::zeros(host_arena(), {}, DType::f32));
  const auto path = folder / "all.safetensors";
  write_safetensors(path, tensors, {{"config", "{\"a\": \"ü\"}"}, {"z", ""}});
  const SafetensorsFile f = SafetensorsFile::open(path);
  EXPECT_EQ(f.metadata(), (StringMap{{"config", "{\"a\": \"ü\"}"}, {"z", ""}}));
  ASSERT_EQ(f.entries().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const SafetensorsEntry& e = f.entry(name);
    EXPECT_EQ(e.dtype, tensor.dtype());
    EXPECT_EQ(e.shape, tensor.shape());
    const auto address = reinterpret_cast<uintptr_t>(f.bytes(e).data());
    EXPECT_EQ(address % static_cast<uintptr_t>(dtype_size(e.dtype)), 0u) << name;
    const Tensor got = f.load(name);
    ASSERT_EQ(got.bytes(), tensor.bytes());
    EXPECT_EQ(std::memcmp(got.data(), tensor.data(), static_cast<size_t>(got.bytes())), 0) << name;
  }
}

TEST(SafetensorsWriter, SameInputGivesSameBytes) {
  const NamedTensors tensors = {{"b", Tensor::zeros(host_arena(), {3}, DType::f32)},
                                {"a", Tensor::zeros(host_arena(), {2}, DType::f64)}};
  const std::string bytes = streamed(tensors, {{"y", "1"}, {"x", "2"}});
  EXPECT_EQ(bytes, streamed(tensors, {{"x", "2"}, {"y", "1"}}));
  EXPECT_EQ(bytes.size() % 4, 0u);
}

TEST(SafetensorsWriter, RefusesWhatTheFormatCannotHold) {
  const Tensor t = Tensor::zeros(host_arena(), {1}, DType::f32);
  EXPECT_THROW(streamed({{"a", t}, {"a", t}}, {}), Error);
  EXPECT_THROW(streamed({{"__metadata__", t}}, {}), Error);
  EXPECT_THROW(streamed({{"a", Tensor()}}, {}), Error);
  EXPECT_THROW(streamed({{"\xff", t}}, {}), Error);
  EXPECT_THROW(streamed({{"a", t}}, {{"k", "\xff"}}), Error);
}

TEST(SafetensorsWriter, FailureLeavesTheOldFile) {
  const TempFolder folder;
  const auto path = folder / "m.safetensors";
  const Tensor t = Tensor::from<double>(std::vector<double>{4.0}, {1}, DType::f32);
  write_safetensors(path, {{"a", t}}, {});
  EXPECT_THROW(write_safetensors(path, {{"a", t}, {"a", t}}, {}), Error);
  EXPECT_EQ(SafetensorsFile::open(path).load("a").item(), 4.0);
  EXPECT_THROW(write_safetensors(folder / "no/such/m.safetensors", {{"a", t}}, {}), RunError);
}

}  // namespace
}  // namespace flexchat

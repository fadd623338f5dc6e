// Checkpoint folders: round trip, pruning, damage of every file, a full disk, and a kill in the middle of a
// save.
#include "checkpoint/checkpoint.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/state_json.h"
#include "support/temp_folder.h"

namespace flexchat {
namespace {

namespace fs = std::filesystem;

std::vector<TensorGroup> groups_with(double value, int64_t size = 64) {
  Tensor weight(host_arena(), {size}, DType::f32), moment(host_arena(), {size}, DType::f64);
  for (int64_t i = 0; i < size; ++i) {
    weight.set(i, value + static_cast<double>(i));
    moment.set(i, -value);
  }
  return {{"model", {{"wte", weight}, {"head", moment}}, {{"config", "{}"}}},
          {"optimizer", {{"m.wte", moment}}, {}}};
}

Json state_with(int64_t step) {
  return Json{{"step", step}, {"rng", {{"position", 77}}}, {"loss", 2.0 / 3.0}};
}

double first_weight(const fs::path& folder) {
  return load_checkpoint(folder).group("model").load("wte").get(0);
}

std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& item : fs::directory_iterator(folder)) names.push_back(item.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

TEST(Checkpoint, RoundTrip) {
  const TempFolder run;
  const fs::path path = save_checkpoint(run.path(), 123, groups_with(5), state_with(123), 0);
  EXPECT_EQ(path, run.path() / "checkpoints" / "step_000123");
  EXPECT_EQ(names_in(path), (std::vector<std::string>{"manifest.json", "model.safetensors",
                                                      "optimizer.safetensors", "state.json"}));
  const Checkpoint c = load_checkpoint(path);
  EXPECT_EQ(c.step(), 123);
  EXPECT_EQ(c.state(), state_with(123));
  EXPECT_EQ(StateReader(c.state(), c.state_source()).object("rng").integer("position"), 77);
  EXPECT_TRUE(c.contains("optimizer"));
  EXPECT_EQ(c.group("model").load("wte").get(3), 8.0);
  EXPECT_EQ(c.group("model").metadata().at("config"), "{}");
  EXPECT_EQ(c.group("optimizer").load("m.wte").get(0), -5.0);
  EXPECT_NE(message_of<Error>([&] { c.group("loader"); }).find("no loader.safetensors"), std::string::npos);
}

TEST(Checkpoint, LatestGoesByNumberAndIgnoresTheUnfinished) {
  const TempFolder run;
  EXPECT_FALSE(find_latest_checkpoint(run.path()).has_value());
  for (int64_t step : {5, 999999, 1000000, 20})
    save_checkpoint(run.path(), step, groups_with(1), state_with(step), 0);
  const fs::path folder = run.path() / "checkpoints";
  fs::create_directories(folder / "step_2000000");           // no manifest
  fs::create_directories(folder / "step_3000000.tmp-12");    // a killed writer's
  fs::copy(folder / "step_000005", folder / "step_00000x");  // not a step
  EXPECT_EQ(find_latest_checkpoint(run.path()), folder / "step_1000000");
  EXPECT_EQ(list_checkpoints(run.path()).size(), 4u);
  EXPECT_EQ(list_checkpoints(run.path()).front(), folder / "step_000005");
}

TEST(Checkpoint, KeepsTheNewestAndAlwaysTheNewOne) {
  const TempFolder run;
  for (int64_t step : {10, 20, 30, 40})
    save_checkpoint(run.path(), step, groups_with(1), state_with(step), 2);
  EXPECT_EQ(names_in(run / "checkpoints"), (std::vector<std::string>{"step_000030", "step_000040"}));
  save_checkpoint(run.path(), 15, groups_with(1), state_with(15), 1);  // a run gone back to an earlier step
  EXPECT_EQ(names_in(run / "checkpoints"), (std::vector<std::string>{"step_000015"}));
}

TEST(Checkpoint, SavingAStepAgainReplacesIt) {
  const TempFolder run;
  const fs::path path = save_checkpoint(run.path(), 7, groups_with(1), state_with(7), 0);
  save_checkpoint(run.path(), 7, groups_with(2), state_with(7), 0);
  EXPECT_EQ(first_weight(path), 2.0);
  EXPECT_EQ(names_in(run / "checkpoints"), (std::vector<std::string>{"step_000007"}));
}

TEST(Checkpoint, LeftoversOfDeadWritersGoThoseOfLiveOnesStay) {
  const TempFolder run;
  const pid_t child = ::fork();
  if (child == 0) ::_exit(0);
  ::waitpid(child, nullptr, 0);  // now surely no process has this id
  const fs::path folder = run.path() / "checkpoints";
  const fs::path dead = folder / ("step_000001.tmp-" + std::to_string(child));
  const fs::path live = folder / ("step_000002.tmp-" + std::to_string(::getppid()));
  const fs::path own = folder / ("step_000003.tmp-" + std::to_string(::getpid()));
  for (const auto& path : {dead, live, own, folder / "notes.tmp-1"}) fs::create_directories(path / "inside");
  save_checkpoint(run.path(), 9, groups_with(1), state_with(9), 0);
  EXPECT_FALSE(fs::exists(dead));
  EXPECT_FALSE(fs::exists(own));
  EXPECT_TRUE(fs::exists(live));
  EXPECT_TRUE(fs::exists(folder / "notes.tmp-1"));
}

// ---- damage --------------------------------------------------------------------------------------------

class CheckpointDamage : public ::testing::Test {
 protected:
  void SetUp() override { path_ = save_checkpoint(run_.path(), 1, groups_with(3), state_with(1), 0); }
  void rewrite(const std::string& file, const std::function<void(std::string&)>& change) const {
    std::string bytes = read_file(path_ / file);
    change(bytes);
    overwrite(file, bytes);
  }
  void overwrite(const std::string& file, const std::string& bytes) const {
    std::ofstream(path_ / file, std::ios::binary | std::ios::trunc) << bytes;
  }
  std::string error() const {
    return message_of<Error>([&] { load_checkpoint(path_); });
  }
  TempFolder run_;
  fs::path path_;
};

TEST_F(CheckpointDamage, FlippedBitNamesFileAndTensor) {
  const SafetensorsFile f = SafetensorsFile::open(path_ / "model.safetensors");
  const size_t header = f.header().size();
  const auto wte = f.entry("wte").begin;
  rewrite("model.safetensors", [&](std::string& b) { b[header + wte + 9] ^= 4; });
  EXPECT_EQ(error(), (path_ / "model.safetensors").string() +
                         ": checksum mismatch in tensor 'wte': the file is damaged");
}

TEST_F(CheckpointDamage, EveryFlippedByteOfAFileIsFound) {
  for (const char* file : {"model.safetensors", "state.json"}) {
    const std::string whole = read_file(path_ / file);
    for (size_t i = 0; i < whole.size(); i += 13) {
      rewrite(file, [&](std::string& b) { b[i] ^= 1; });
      EXPECT_NE(error().find(file), std::string::npos) << i << ": " << error();
      overwrite(file, whole);
    }
  }
  EXPECT_EQ(error(), "");
}

TEST_F(CheckpointDamage, TruncationNamesFileAndTensor) {
  rewrite("model.safetensors", [](std::string& b) { b.resize(b.size() - 3); });
  EXPECT_NE(error().find("model.safetensors: tensor 'wte'"), std::string::npos) << error();
  EXPECT_NE(error().find("the manifest says"), std::string::npos);
}

TEST_F(CheckpointDamage, GrownAndEmptyFilesAreNamed) {
  rewrite("state.json", [](std::string& b) { b += " "; });
  EXPECT_NE(error().find("state.json: truncated or replaced"), std::string::npos) << error();
  rewrite("state.json", [](std::string& b) { b.clear(); });
  EXPECT_NE(error().find("state.json: truncated or replaced: 0 bytes"), std::string::npos) << error();
}

TEST_F(CheckpointDamage, AnotherValidFileInItsPlaceIsFound) {
  fs::remove(path_ / "model.safetensors");
  write_safetensors(path_ / "model.safetensors", groups_with(4)[0].tensors, {{"config", "{}"}});
  EXPECT_NE(error().find("checksum mismatch in tensor"), std::string::npos) << error();
  write_safetensors(path_ / "model.safetensors", groups_with(3)[0].tensors, {{"config", "[]"}});
  EXPECT_NE(error().find("checksum mismatch in the header"), std::string::npos) << error();
}

TEST_F(CheckpointDamage, MissingFilesAreNamed) {
  fs::remove(path_ / "optimizer.safetensors");
  EXPECT_NE(error().find("optimizer.safetensors: missing"), std::string::npos) << error();
  fs::remove(path_ / "manifest.json");
  EXPECT_NE(error().find("manifest.json is missing"), std::string::npos) << error();
  fs::remove_all(path_);
  EXPECT_NE(error().find("no such checkpoint folder"), std::string::npos) << error();
}

TEST(Manifest, BadOnesAreRefused) {
  const auto error = [](const std::string& text) {
    return message_of<Error>([&] { parse_manifest(text, "m"); });
  };
  const auto text = [](const std::string& files) {
    return R"({"format":"flexchat checkpoint","version":1,"step":3,"files":{)" + files + "}}";
  };
  const std::string state = R"("state.json":{"bytes":2,"crc32c":1})";
  EXPECT_EQ(error(text(state)), "");
  EXPECT_EQ(parse_manifest(text(state), "m").step, 3);
  EXPECT_NE(error("{}").find("'format' is missing"), std::string::npos);
  EXPECT_NE(error(R"({"format":"other"})").find("'other'"), std::string::npos);
  EXPECT_NE(error(R"({"format":"flexchat checkpoint","version":2})").find("version 2"), std::string::npos);
  EXPECT_NE(error(text("")).find("lists no state.json"), std::string::npos);
  for (const char* name :
       {"../x.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.bin", ""}) {
    EXPECT_NE(error(text(state + ",\"" + name + R"(":{"bytes":2,"crc32c":1})"))
                  .find("not one a checkpoint can hold"),
              std::string::npos)
        << name;
  }
  EXPECT_NE(error(text(R"("state.json":{"bytes":-2,"crc32c":1})")).find("files.state.json.bytes"),
            std::string::npos);
  EXPECT_NE(error(text(R"("state.json":{"bytes":2,"crc32c":4294967296})")).find("32 bits"),
            std::string::npos);
  EXPECT_NE(error(text(R"("state.json":{"bytes":2,"crc32c":1,"tensors":{"a":"b"}})")).find("tensors.a"),
            std::string::npos);
}

// ---- failing and being killed --------------------------------------------------------------------------

// While it lives, this process cannot write files beyond `bytes`: what a full disk looks like to a writer.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    ::getrlimit(RLIMIT_FSIZE, &old_);
    handler_ = ::signal(SIGXFSZ, SIG_IGN);  // let write() report it instead
    const rlimit limit{bytes, old_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  }
  ~FileSizeLimit() {
    ::setrlimit(RLIMIT_FSIZE, &old_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit old_{};
  void (*handler_)(int) = SIG_DFL;
};

TEST(CheckpointFailure, FullDiskKeepsTheOldOneAndCleansUp) {
  const TempFolder run;
  const fs::path old = save_checkpoint(run.path(), 1, groups_with(1), state_with(1), 1);
  std::string message;
  {
    const FileSizeLimit limit(16 << 10);
    message = message_of<RunError>(
        [&] { save_checkpoint(run.path(), 2, groups_with(2, 1 << 16), state_with(2), 1); });
  }
  EXPECT_NE(message.find("cannot save checkpoint"), std::string::npos) << message;
  EXPECT_NE(message.find("step_000002"), std::string::npos) << message;
  EXPECT_NE(message.find("File too large"), std::string::npos) << message;
  EXPECT_EQ(names_in(run / "checkpoints"), (std::vector<std::string>{"step_000001"}));
  EXPECT_EQ(find_latest_checkpoint(run.path()), old);
  EXPECT_EQ(first_weight(old), 1.0);
  save_checkpoint(run.path(), 2, groups_with(2, 1 << 16), state_with(2), 1);  // works again
  EXPECT_EQ(names_in(run / "checkpoints"), (std::vector<std::string>{"step_000002"}));
}

TEST(CheckpointFailure, BadStateOrGroupsLeaveNothingBehind) {
  const TempFolder run;
  Json infinite = state_with(1);
  infinite["loss"] = std::numeric_limits<double>::infinity();
  EXPECT_THROW(save_checkpoint(run.path(), 1, groups_with(1), infinite, 1), RunError);
  EXPECT_TRUE(names_in(run / "checkpoints").empty());
  auto groups = groups_with(1);
  groups[1].name = "../model";
  EXPECT_THROW(save_checkpoint(run.path(), 1, groups, state_with(1), 1), Error);
  groups[1].name = "model";
  EXPECT_THROW(save_checkpoint(run.path(), 1, groups, state_with(1), 1), Error);
  EXPECT_THROW(save_checkpoint(run.path(), -1, groups_with(1), state_with(1), 1), Error);
  EXPECT_THROW(save_checkpoint(run.path(), 1, groups_with(1), Json::array(), 1), Error);
}

TEST(CheckpointFailure, UnwritableFolderIsARunError) {
  const TempFolder run;
  write_file_atomic(run / "checkpoints", "a file where the folder should be");
  EXPECT_THROW(save_checkpoint(run.path(), 1, groups_with(1), state_with(1), 1), RunError);
}

TEST(CheckpointFailure, KilledAtAnyMomentLeavesAWholeNewestCheckpoint) {
  const TempFolder run;
  const auto started = std::chrono::steady_clock::now();
  save_checkpoint(run.path(), 0, groups_with(0, 20000), state_with(0), 2);
  const auto one_save = std::chrono::steady_clock::now() - started;
  int64_t newest = 0;
  int interrupted = 0;
  // At least eight kills, at other parts of a save each time; more where the disk's pace made them all alike.
  for (int trial = 0; trial < 8 || (trial < 40 && (interrupted == 0 || newest == 0)); ++trial) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (int64_t step = newest + 1;; ++step) {
        // Every other save replaces the step before it, so that the exchange is killed as well.
        save_checkpoint(run.path(), step / 2, groups_with(static_cast<double>(step / 2), 20000),
                        state_with(step / 2), 2);
      }
    }
    std::this_thread::sleep_for(one_save * (trial % 8 + 1) * 2 / 5);
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const std::string own = ".tmp-" + std::to_string(child);
    const auto names = names_in(run / "checkpoints");
    interrupted += std::any_of(names.begin(), names.end(), [&](const auto& n) { return n.ends_with(own); });
    const auto latest = find_latest_checkpoint(run.path());
    ASSERT_TRUE(latest.has_value());
    const Checkpoint c = load_checkpoint(*latest);
    EXPECT_EQ(c.group("model").load("wte").get(0), static_cast<double>(c.step()));
    EXPECT_EQ(c.state(), state_with(c.step()));
    newest = std::max(newest, 2 * c.step());
  }
  EXPECT_GT(interrupted, 0) << "no kill came in the middle of a save: nothing was tested";
  EXPECT_GT(newest, 0) << "no save came to its end";
  EXPECT_LE(list_checkpoints(run.path()).size(), 3u);
}

}  // namespace
}  // namespace flexchat

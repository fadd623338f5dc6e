// Progress lines in both forms: redrawn on a terminal (a pseudo terminal here), sparse plain lines elsewhere.
#include "base/progress.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

namespace flexchat {
namespace {

// Runs `fn` with stderr on a pseudo terminal of `columns` and gives what it wrote.
template <class Fn>
std::string on_terminal(unsigned short columns, const Fn& fn) {
  const int master = ::posix_openpt(O_RDWR | O_NOCTTY);
  EXPECT_GE(master, 0);
  EXPECT_EQ(::grantpt(master), 0);
  EXPECT_EQ(::unlockpt(master), 0);
  const int slave = ::open(::ptsname(master), O_RDWR | O_NOCTTY);
  EXPECT_GE(slave, 0);
  const winsize size{24, columns, 0, 0};
  EXPECT_EQ(::ioctl(slave, TIOCSWINSZ, &size), 0);
  std::fflush(stderr);
  const int saved = ::dup(STDERR_FILENO);
  ::dup2(slave, STDERR_FILENO);
  std::string text;
  std::thread reader([&] {  // a terminal's buffer is small
    char buffer[4096];
    ssize_t n = 0;
    while ((n = ::read(master, buffer, sizeof buffer)) > 0) text.append(buffer, static_cast<size_t>(n));
  });
  fn();
  std::fflush(stderr);
  ::dup2(saved, STDERR_FILENO);
  ::close(saved);
  ::close(slave);
  reader.join();
  ::close(master);
  return text;
}

template <class Fn>
std::string on_file(const Fn& fn) {
  testing::internal::CaptureStderr();
  fn();
  return testing::internal::GetCapturedStderr();
}

int64_t count(const std::string& text, char c) { return std::count(text.begin(), text.end(), c); }

TEST(Progress, PlainOutputIsOneFinalLineForAShortJob) {
  const std::string text = on_file([] {
    Progress p("training", 2000, "steps");
    for (int i = 0; i <= 2000; ++i) p.update(i, "loss 3.21");
  });
  EXPECT_EQ(count(text, '\n'), 1) << text;
  EXPECT_EQ(count(text, '\r'), 0);
  EXPECT_EQ(text.rfind("training 100%  2,000/2,000 steps", 0), 0u) << text;
  EXPECT_NE(text.find(" steps/s  in "), std::string::npos) << text;
  EXPECT_NE(text.find("  loss 3.21\n"), std::string::npos) << text;
}

TEST(Progress, FinishIsOnceAndNothingIsPrintedWithoutAnUpdate) {
  EXPECT_EQ(on_file([] { Progress p("idle", 10, "steps"); }), "");
  const std::string text = on_file([] {
    Progress p("reading", 0, "docs");
    p.update(7);
    p.finish();
    p.finish();
  });
  EXPECT_EQ(count(text, '\n'), 1) << text;
  EXPECT_EQ(text.rfind("reading  7 docs  in ", 0), 0u) << text;
}

TEST(Progress, MessagesStandOnTheirOwnLine) {
  EXPECT_EQ(on_file([] {
              Progress p("x", 3, "steps");
              p.message("saved a checkpoint");
            }),
            "saved a checkpoint\n");
}

TEST(Progress, ATerminalIsRedrawnAtMostTenTimesASecond) {
  const auto begin = std::chrono::steady_clock::now();
  const std::string text = on_terminal(200, [] {
    Progress p("training", 100'000, "steps");
    for (int i = 0; i < 50'000; ++i) p.update(i);
    std::this_thread::sleep_for(std::chrono::milliseconds(120));
    p.update(50'000, "loss 1.5");
    p.message("hello");
  });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  EXPECT_LE(count(text, '\r'), 2 * (4 + static_cast<int64_t>(seconds * 10)))
      << text;  // the terminal adds one a line
  EXPECT_GE(count(text, '\r'), 3);
  EXPECT_NE(text.find("training [..........."), std::string::npos) << text;
  EXPECT_NE(text.find("[##########..........]  50%  50,000/100,000 steps"), std::string::npos) << text;
  EXPECT_NE(text.find("ETA "), std::string::npos) << text;
  EXPECT_NE(text.find("\r\033[Khello\r\n\r\033[Ktraining"), std::string::npos) << text;
  EXPECT_EQ(count(text, '\n'), 2) << "the message and the end";
}

// A resumed job starts at a high count: that must not count into the rate.
TEST(Progress, RateComesFromWhatWasDoneSinceTheFirstUpdate) {
  const std::string text = on_terminal(200, [] {
    Progress p("resumed", 1'000'020, "steps");
    p.update(1'000'000);
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    p.update(1'000'010);
  });
  const size_t at = text.find("1,000,010/1,000,020 steps  ");
  ASSERT_NE(at, std::string::npos) << text;
  const double rate = std::atof(text.c_str() + at + std::string("1,000,010/1,000,020 steps  ").size());
  EXPECT_LE(rate, 50.0) << text;
  EXPECT_GE(rate, 0.5) << text;
}

TEST(Progress, LongLinesAreCutToTheTerminalNotInsideACharacter) {
  const std::string text = on_terminal(40, [] {
    Progress p("x", 0, "steps");
    std::string note;
    for (int i = 0; i < 60; ++i) note += "\xC3\xA9";
    p.update(1, note);
  });
  size_t begin = 0;
  for (size_t at = text.find("\r\033[K"); at != std::string::npos; at = text.find("\r\033[K", begin)) {
    begin = at + 4;
    const size_t end = text.find('\r', begin);
    const std::string line = text.substr(begin, end - begin);
    EXPECT_LE(line.size(), 39u);
    EXPECT_GE(line.size(), 38u);
    EXPECT_EQ(line.substr(line.size() - 2), "\xC3\xA9");
  }
  EXPECT_GT(begin, 0u);
}

}  // namespace
}  // namespace flexchat

// Alignment, markdown escaping and number formats.
#include "report/table.h"

#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"

namespace flexchat {
namespace {

TEST(Table, AlignsNumbersRightAndTextLeft) {
  Table t({"check", "max abs", "size"});
  t.row({"logits", "1.5e-06", "3 KiB"});
  t.row({"größe", "-12", "10.25 MiB"});
  EXPECT_EQ(t.text("  "),
            "  check   max abs       size\n"
            "  ------  -------  ---------\n"
            "  logits  1.5e-06      3 KiB\n"
            "  größe       -12  10.25 MiB\n");
}

TEST(Table, HasNoTrailingSpacesAndStandsWithoutRows) {
  Table t({"a", "b"});
  t.row({"x", "short"});
  t.row({"y", "a longer cell"});
  EXPECT_EQ(t.text(), "a  b\n-  -------------\nx  short\ny  a longer cell\n");
  EXPECT_EQ(Table({"a", "b"}).text(), "a  b\n-  -\n");
}

TEST(Table, MarkdownEscapesWhatWouldBreakIt) {
  Table t({"name", "value"});
  t.row({"a|b\nc", "1"});
  t.row({"<b>*x*_y_`a_b", "2"});
  EXPECT_EQ(t.markdown(),
            "| name | value |\n| --- | ---: |\n| a\\|b c | 1 |\n| &lt;b&gt;\\*x\\*\\_y\\_\\`a_b | 2 |\n");
}

TEST(Table, RefusesRowsOfAnotherWidth) {
  Table t({"a", "b"});
  EXPECT_THROW(t.row({"1"}), Error);
  EXPECT_THROW(t.row({"1", "2", "3"}), Error);
}

TEST(LooksNumeric, NumbersWithUnitsButNotDatesOrWords) {
  for (const char* yes :
       {"", "-", "1", "-1.5", "1,234", "3e-5", "12.5%", "1.5 KiB", "2x", "nan", "inf", "3 tok/s"}) {
    EXPECT_TRUE(looks_numeric(yes)) << yes;
  }
  for (const char* no : {"abc", "2025-01-31", "3 of 4", "x1", "yes", "1 and a whole sentence"}) {
    EXPECT_FALSE(looks_numeric(no)) << no;
  }
}

TEST(FormatNumber, IntegersWholeOthersShort) {
  EXPECT_EQ(format_number(3), "3");
  EXPECT_EQ(format_number(-1234567), "-1234567");
  EXPECT_EQ(format_number(0.1 + 0.2), "0.3");
  EXPECT_EQ(format_number(1.23456789e-7, 3), "1.23e-07");
  EXPECT_EQ(format_number(std::numeric_limits<double>::quiet_NaN()), "nan");
  EXPECT_EQ(format_number(-std::numeric_limits<double>::infinity()), "-inf");
}

}  // namespace
}  // namespace flexchat

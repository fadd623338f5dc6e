"""Writes the parquet fixtures of tests/data_sources beside this file (needs pyarrow)."""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).parent


def text(name, i):
    return f"{name} document {i}: " + "word " * (i * 7 % 23) + "caf\u00e9 \U0001F600"


def write(name, columns, **options):
    pq.write_table(pa.table(columns), HERE / f"{name}.parquet", **options)


# Three row groups, pages of a few rows.
rows = 23
write("zstd", {"id": pa.array(range(rows)), "text": pa.array([text("zstd", i) for i in range(rows)])},
      compression="zstd", row_group_size=9, data_page_size=64, write_batch_size=2, use_dictionary=False)

# Row i is null when i % 4 == 1 and empty when i % 4 == 2; dictionary pages.
rows = 14
values = [None if i % 4 == 1 else "" if i % 4 == 2 else text("snappy", i) for i in range(rows)]
write("snappy_large", {"text": pa.array(values, pa.large_string()), "n": pa.array([1] * rows)},
      compression="snappy", row_group_size=5)

# A required column, front-coded, pages of version 2, checksums.
schema = pa.schema([pa.field("text", pa.string(), nullable=False)])
pq.write_table(pa.table({"text": [text("delta", i) for i in range(80)]}, schema), HERE / "delta.parquet",
               compression="none", use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"},
               data_page_version="2.0", write_page_checksum=True)

# An Arrow dictionary, and bytes that are not UTF-8.
write("categories", {"text": pa.array([text("cat", i % 3) for i in range(7)]).dictionary_encode()})
write("binary", {"text": pa.array([b"ab\xff\xfec", b"plain"], pa.binary())})

# Nothing to read.
write("no_text", {"id": pa.array([1, 2]), "url": pa.array(["a", "b"])})
write("int_text", {"text": pa.array([1, 2])})
write("list_text", {"text": pa.array([["a"], ["b", "c"]])})

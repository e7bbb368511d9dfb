"""Writes the Parquet files beside this script, and what PyArrow reads from them, for ../data_files.rs.

pip install pyarrow polars; last run with pyarrow 26.0, polars 2.1.
"""

import json
import math
from pathlib import Path

import polars
import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).parent

message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
schema = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        ("prompt", pa.string()),
        ("messages", pa.list_(message)),
        ("tags", pa.list_(pa.string())),
        ("grid", pa.list_(pa.list_(pa.int32()))),
        ("turns", pa.list_(pa.struct([("says", pa.list_(pa.string())), ("n", pa.int16())]))),
        ("meta", pa.struct([("lang", pa.string()), ("deep", pa.struct([("x", pa.float64())]))])),
        ("labels", pa.map_(pa.string(), pa.int32())),
        ("score", pa.float32()),
        ("exact", pa.float64()),
        ("good", pa.bool_()),
        ("small", pa.uint32()),
        ("raw", pa.binary()),
    ]
)


def row(i: int) -> dict:
    maybe = lambda k, value: None if i % k == 0 else value
    return {
        "id": i * i * (-1) ** i,
        "prompt": maybe(7, f"Question {i % 5}: 你好 é\n" + "ab" * (i % 11)),
        "messages": maybe(5, [{"role": r, "content": maybe(3, f"{r} {i}"), "name": None} for r in ["user", "assistant"][: i % 3]]),
        "tags": maybe(4, [None if (i + j) % 3 == 0 else f"tag{j}" for j in range(i % 4)]),
        "grid": maybe(6, [[i + j] * j if j != 1 else None for j in range(i % 5)]),
        "turns": [{"says": maybe(2, [f"s{j}"] * (j % 3)), "n": maybe(8, j)} for j in range(i % 4)],
        "meta": maybe(9, {"lang": maybe(2, "en"), "deep": maybe(3, {"x": maybe(4, i / 8)})}),
        "labels": maybe(3, {f"k{j}": maybe(2, j) for j in range(i % 3)}),
        "score": maybe(5, i / 4),
        "exact": math.nan if i == 10 else i / 3,
        "good": maybe(4, i % 3 == 0),
        "small": (1 << 32) - 1 - i,
        "raw": b"\xff\xfe" if i % 2 else b"text",
    }


def plain(value):
    """What rlflow makes of a value: nulls are left out of structs, NaN is null, bytes are text or null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if plain(item) is not None}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bytes):
        return None if value == b"\xff\xfe" else value.decode()
    return value


table = pa.Table.from_pylist([row(i) for i in range(60)], schema=schema)
few = {"data_page_size": 300, "write_batch_size": 8, "row_group_size": 25}
strings = ["prompt", "messages.list.element.role", "tags.list.element"]
delta = {column: "DELTA_LENGTH_BYTE_ARRAY" for column in strings} | {"id": "DELTA_BINARY_PACKED", "small": "DELTA_BINARY_PACKED"}
prefix = {column: "DELTA_BYTE_ARRAY" for column in strings} | {"score": "BYTE_STREAM_SPLIT", "exact": "BYTE_STREAM_SPLIT", "good": "RLE"}
pq.write_table(table, HERE / "snappy.parquet", compression="snappy", **few)
pq.write_table(table, HERE / "zstd_v2.parquet", compression="zstd", data_page_version="2.0", **few)
pq.write_table(table, HERE / "gzip_plain.parquet", compression="gzip", use_dictionary=False, row_group_size=60)
pq.write_table(table, HERE / "delta.parquet", compression="none", use_dictionary=False, column_encoding=delta, row_group_size=60)
pq.write_table(table, HERE / "prefix_v2.parquet", compression="zstd", use_dictionary=False, column_encoding=prefix, data_page_version="2.0", **few)
pq.write_table(table.select(["prompt"]), HERE / "brotli.parquet", compression="brotli")
pq.write_table(table.slice(0, 0), HERE / "no_rows.parquet")
# Polars has a writer of its own. It knows no maps.
polars.from_arrow(table.drop(["labels"])).write_parquet(HERE / "polars.parquet", compression="zstd", row_group_size=25)

for name in ["snappy", "zstd_v2", "gzip_plain", "delta", "prefix_v2"]:
    assert str(pq.read_table(HERE / f"{name}.parquet").to_pylist()) == str(table.to_pylist()), name
rows = [dict(item, labels=dict(item["labels"]) if item["labels"] is not None else None) for item in table.to_pylist()]
lines = [json.dumps(plain(item), ensure_ascii=False) for item in rows]
(HERE / "rows.jsonl").write_text("\n".join(lines) + "\n")

"""Small parquet files in the schema of HuggingFaceH4/llava-instruct-mix-vsft."""

import io
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (number * 7 % 256, number * 31 % 256, number // 256)).save(buffer, "PNG")
    return buffer.getvalue()


def row(image: bytes | None, question: str = "What?", answer: str = "That.") -> dict[str, Any]:
    """One row as the data set on the hub has it, its nulls included."""
    user = [{"type": "text", "text": question, "index": None}]
    if image is not None:
        user.append({"type": "image", "text": None, "index": 0})
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer, "index": None}]},
        ],
        "images": [] if image is None else [{"bytes": image, "path": None}],
    }


PART = pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string()), ("index", pyarrow.int64())])
SCHEMA = pyarrow.schema(
    [
        ("messages", pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.list_(PART))]))),
        ("images", pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))),
    ]
)


def write_parquet(file: Path, rows: list[dict[str, Any]], row_group_size: int = 50) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=SCHEMA), file, row_group_size=row_group_size)

#!/usr/bin/env python3
"""Receipt lines with their normalized form to shards: raw line -> normalized##product##brand##category.

    python shards/receipt_lines.py --source receipts_dataset.jsonl --out OUT [--gold standard.csv]

--source: a file or a folder of them: .jsonl with {"dialogue": [{"human": line, "assistant": answer}]} or with
{"text": line, "answer": answer}; .csv with the columns text and answer.

An answer has three or four fields ("-" where there is none). Rows are dealt to the splits by raw line (case and spaces
aside), so no line is in two splits. A line with its answer that comes again is dropped unless --keep-repeats; several
answers to one line stay together. --gold: a hand-labelled file (columns Название or text, product, brand, category)
becomes OUT/gold; it has no normalized text, so only its product, brand and category scores mean something. Rows of
--source whose line is in it are left out.
"""

import _environment  # noqa: F401  # isort: skip

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmdist.data.convert.corpora import (
    CorpusWriter,
    Row,
    add_bad_share,
    count,
    make_parser,
    question_and_answer,
    run_script,
    scratch_folder,
    share,
)
from vlmdist.data.convert.instructions import LINE_SEPARATOR, NONE, RECEIPT_LINE
from vlmdist.data.convert.splits import assign_splits, move_leaks
from vlmdist.errors import BadSample, UserError

SUFFIXES = (".jsonl", ".csv")
GOLD_LINE_COLUMNS = ("Название", "text")  # the first is that of slgero/receipt_parser's standard.csv
GOLD_COLUMNS = ("product", "brand", "category")


@dataclass(frozen=True)
class Item:
    place: str
    """FILE:ROW in the source."""
    raw: str
    answer: str

    @property
    def group(self) -> str:
        return " ".join(self.raw.casefold().split())


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help=".jsonl or .csv file, or a folder of them")
    parser.add_argument("--gold", type=Path, help="hand-labelled .csv, becomes OUT/gold")
    parser.add_argument(
        "--fractions",
        type=share,
        nargs=3,
        default=(0.9, 0.05, 0.05),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="shares of the splits, summing to 1 (default: 0.9 0.05 0.05)",
    )
    parser.add_argument("--seed", type=count, default=0, help="of the splits (default: %(default)s)")
    parser.add_argument("--keep-repeats", action="store_true", help="keep rows that repeat a line with its answer")
    add_bad_share(parser)
    options = parser.parse_args(arguments)
    files = find_files(options.source)
    about = {"script": "receipt_lines", "source": options.source.resolve().name, "seed": options.seed}
    with CorpusWriter(
        options.out, overwrite=options.overwrite, about=about, max_bad_share=options.max_bad_share
    ) as corpus:
        items = drop_repeats(read_items(files, corpus), options.keep_repeats)
        gold = read_gold(options.gold, corpus) if options.gold else []
        items = keep_off_gold(items, gold, corpus)
        if not items:
            corpus.refuse_empty(f"--source {options.source}: holds no usable row")
        fractions = dict(zip(("train", "validation", "test"), options.fractions, strict=True))
        split_of_each = assign_splits([item.group for item in items], fractions, options.seed)
        for split, fraction in fractions.items():
            if fraction:
                chosen = [item for item, s in zip(items, split_of_each, strict=True) if s == split]
                corpus.write_split(split, to_rows(split, chosen), total=len(chosen))
        if gold:
            corpus.write_split("gold", to_rows("gold", gold), total=len(gold))


# --- reading ----------------------------------------------------------------------------------------------------------


def find_files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES)
    else:
        files = [source] if source.is_file() else []
    if not files or any(f.suffix.lower() not in SUFFIXES for f in files):
        raise UserError(f"--source {source}: give a file that ends in {' or '.join(SUFFIXES)}, or a folder with some")
    return files


def read_items(files: Sequence[Path], corpus: CorpusWriter) -> list[Item]:
    """All usable rows, in the order of the files; the others are counted by name."""
    items = []
    for file in files:
        for number, row in enumerate(read_rows(file), start=1):
            place = f"{file.name}:{number}"
            try:
                items += [Item(place, raw, checked(answer)) for raw, answer in pairs_of(row)]
            except BadSample as e:
                corpus.leave_out_bad(place, str(e))
    return items


def read_rows(file: Path) -> Iterator[Any]:
    """Rows of a .jsonl file (as parsed, or the text itself where it is no JSON) or a .csv file (all values text)."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # local files: no server is asked
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    is_csv = file.suffix.lower() == ".csv"
    with scratch_folder() as cache:
        try:
            # lines, not the JSON reader: that one fails the whole file for one malformed row
            form, options = ("csv", _text_columns(file)) if is_csv else ("text", {})
            rows = load_dataset(form, data_files=str(file), split="train", streaming=True, cache_dir=cache, **options)
            for row in rows:
                if is_csv:
                    yield row
                elif row["text"].strip():
                    yield _parse(row["text"])
        except (OSError, ValueError, DatasetGenerationError) as e:
            reason = " ".join(str(e.__cause__ or e).split())[:200]
            raise UserError(f"{file} can't be read as {'CSV' if is_csv else 'JSON lines'} in UTF-8: {reason}") from None


def _text_columns(file: Path) -> dict[str, Any]:
    """Options of the CSV reader that keep every value as it is written ("0.50", "NA", "007")."""
    from datasets import Features, Value

    with file.open(encoding="utf-8", newline="") as f:
        header = next(csv.reader(f), [])
    return {"features": Features({name: Value("string") for name in header}), "keep_default_na": False}


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


def pairs_of(row: Any) -> list[tuple[str, str]]:
    """(raw line, answer) of one row; BadSample where it has none of the known forms."""
    if not isinstance(row, dict):
        raise BadSample("not a JSON object")
    turns, names = [row], ("text", "answer")
    if "dialogue" in row:
        turns, names = row["dialogue"], ("human", "assistant")
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            raise BadSample('"dialogue" must be a list of {"human": ..., "assistant": ...}')
    pairs = []
    for turn in turns:
        for name in names:
            if not isinstance(turn.get(name), str) or not turn[name].strip():
                raise BadSample(f'no text in "{name}"')
        pairs.append((turn[names[0]].strip(), turn[names[1]].strip()))
    return pairs


def checked(answer: str) -> str:
    num_fields = len(answer.split(LINE_SEPARATOR))
    if num_fields not in (3, 4) or "\n" in answer:
        raise BadSample(f"the answer must be one line of 3 or 4 fields between {LINE_SEPARATOR}, not {num_fields}")
    return answer


def read_gold(file: Path, corpus: CorpusWriter) -> list[Item]:
    if not file.is_file() or file.suffix.lower() != ".csv":
        raise UserError(f"--gold {file}: give a .csv file")
    items = []
    for number, row in enumerate(read_rows(file), start=1):
        line_column = next((c for c in GOLD_LINE_COLUMNS if c in row), None)
        if line_column is None or not all(c in row for c in GOLD_COLUMNS):
            raise UserError(
                f"--gold {file}: needs the columns {' or '.join(GOLD_LINE_COLUMNS)}, {', '.join(GOLD_COLUMNS)}; "
                f"found {', '.join(row)}"
            )
        raw = row[line_column].strip()
        if raw:
            answer = LINE_SEPARATOR.join([NONE, *(row[c].strip() or NONE for c in GOLD_COLUMNS)])
            items.append(Item(f"{file.name}:{number}", raw, answer))
        else:
            corpus.leave_out_bad(f"{file.name}:{number}", f"no text in {line_column}")
    if not items:
        raise UserError(f"--gold {file}: holds no rows")
    return items


# --- choosing and writing ---------------------------------------------------------------------------------------------


def drop_repeats(items: list[Item], keep_repeats: bool) -> list[Item]:
    if keep_repeats:
        return items
    kept = list({(item.group, item.answer): item for item in reversed(items)}.values())[::-1]
    if len(kept) < len(items):
        print(f"repeats: {len(items) - len(kept)} of {len(items)} rows repeat a line with its answer and were dropped")
    return kept


def keep_off_gold(items: list[Item], gold: list[Item], corpus: CorpusWriter) -> list[Item]:
    both = items + gold
    splits = ["train"] * len(items) + ["gold"] * len(gold)
    mended, leaks = move_leaks(
        splits, [i.group for i in both], priority=("gold", "train"), names=[i.place for i in both]
    )
    corpus.leave_out_leaks(leaks)
    return [item for item, split in zip(items, mended, strict=False) if split == "train"]


def to_rows(split: str, items: Sequence[Item]) -> Iterator[Row]:
    for number, item in enumerate(items):
        messages = question_and_answer(RECEIPT_LINE + item.raw, item.answer)
        yield Row(f"{split}-{number:06d}", messages, item.answer, meta={"raw": item.raw, "source": item.place})


if __name__ == "__main__":
    sys.exit(run_script(main))

#!/usr/bin/env python3
"""Make receipts out of nothing but a seed: to try the whole chain without any data of one's own.

    python shards/synthetic_receipts.py --kind lines --out DIR     raw line -> normalized##product##brand##category
    python shards/synthetic_receipts.py --kind images --out DIR    picture of a receipt -> company, date, address, total

Writes DIR/train, DIR/validation and DIR/test. The three never share a line (upper and lower case and spaces aside) or
a picture. In the test split about half the lines are of a product and brand that never meet in the other two splits,
and about a third of the pictures of a shop that is in no other split; "meta" of the sample says so. The test split
depends on --seed and --test alone. The same options give the same tars (pictures: with the same Pillow).
"""

import _environment  # noqa: F401  # isort: skip

import sys
from collections.abc import Iterable, Mapping

from synthetic_images import make_images
from synthetic_lines import make_lines

from vlmdist.data.convert.corpora import CorpusWriter, Row, count, make_parser, run_script
from vlmdist.errors import UserError

DEFAULT_SIZES = {"lines": (2000, 100, 200), "images": (400, 40, 60)}


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kind", choices=sorted(DEFAULT_SIZES), required=True)
    parser.add_argument("--train", type=count, metavar="N", help="samples (default: 2000 lines, 400 images)")
    parser.add_argument("--validation", type=count, metavar="N", help="samples (default: 100 lines, 40 images)")
    parser.add_argument("--test", type=count, metavar="N", help="samples (default: 200 lines, 60 images)")
    parser.add_argument("--seed", type=count, default=0, help="default: %(default)s")
    parser.add_argument("--width", type=count, default=336, help="pixels of an image (default: %(default)s)")
    options = parser.parse_args(arguments)
    defaults = dict(zip(("train", "validation", "test"), DEFAULT_SIZES[options.kind], strict=True))
    sizes = {
        split: getattr(options, split) if getattr(options, split) is not None else n for split, n in defaults.items()
    }
    if not any(sizes.values()):
        raise UserError("--train, --validation and --test are all 0: there is nothing to make")
    if not 100 <= options.width <= 4000:
        raise UserError(f"--width {options.width}: a readable receipt is 100 to 4000 pixels wide")
    about = {"script": "synthetic_receipts", "kind": options.kind, "seed": options.seed}
    with CorpusWriter(options.out, overwrite=options.overwrite, about=about) as corpus:
        rows: Mapping[str, Iterable[Row]] = (
            make_lines(sizes, options.seed)
            if options.kind == "lines"
            else make_images(sizes, options.seed, options.width)
        )
        for split, number in sizes.items():
            if number:
                corpus.write_split(split, rows[split], total=number)


if __name__ == "__main__":
    sys.exit(run_script(main))

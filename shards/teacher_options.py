"""The options of label_with_teacher.py, and what is made of them."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from vlmdist.data.convert.corpora import count, share
from vlmdist.data.convert.instructions import RECEIPT_FIELDS
from vlmdist.data.teacher.budget import REQUESTS_FILE, Budget, Prices
from vlmdist.data.teacher.endpoint import DEFAULT_BASE_URL, Teacher, answer_limit
from vlmdist.errors import UserError

DEFAULT_REQUEST = {"temperature": 0, "max_tokens": 512}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", choices=("lines", "images"), default="lines", help="of the inputs (default: %(default)s)")
    add("--source", type=Path, required=True, help="file or folder")
    add("--out", type=Path, required=True, help="folder of the labels; given again, it goes on")
    add("--column", default="text", help="of .jsonl and .csv (default: %(default)s)")
    add("--fields", nargs="+", default=list(RECEIPT_FIELDS), help="of the JSON (default: %(default)s)")
    add("--prompt", type=Path, metavar="FILE", help="system text, instead of the default one")
    add("--examples", type=Path, metavar="FILE", help=".jsonl or .csv of worked examples: text (or image) and answer")
    add("--model", required=True, help="name of the teacher")
    add("--base-url", help=f"default: OPENAI_BASE_URL, else {DEFAULT_BASE_URL}")
    add(
        "--key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key (default: %(default)s)"
    )
    add("--allow-http", action="store_true", help="send the key over http:// to another machine")
    add(
        "--request",
        type=request_fields,
        default={},
        metavar="JSON",
        help=f"further fields of each request, over {json.dumps(DEFAULT_REQUEST)}; null takes one out",
    )
    add("--concurrency", type=positive, default=8, metavar="N", help="requests at once (default: %(default)s)")
    add("--requests-per-minute", type=amount, metavar="N")
    add("--tokens-per-minute", type=amount, metavar="N", help="counted before a request at its most, then as used")
    add("--timeout", type=amount, default=120.0, metavar="SECONDS", help="of a request (default: %(default)s)")
    add("--max-attempts", type=positive, default=5, metavar="N", help="for one answer (default: %(default)s)")
    add(
        "--backoff", type=amount, default=1.0, metavar="SECONDS", help="after a failure; doubles (default: %(default)s)"
    )
    add("--retry-rejected", type=count, default=0, metavar="N", help="ask again so often (default: %(default)s)")
    add("--max-requests", type=positive, metavar="N", help="budget of all starts, failed requests included")
    add("--max-cost", type=amount, metavar="MONEY", help="budget of all starts; needs the prices")
    add("--price-in", type=amount, metavar="MONEY", help="per million tokens of prompt")
    add("--price-out", type=amount, metavar="MONEY", help="per million tokens of answer")
    add(
        "--image-tokens",
        type=positive,
        default=20_000,
        metavar="N",
        help="the most that a picture counts, to keep --max-cost (default: %(default)s)",
    )
    add(
        "--max-rejected-share",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="write no labels when more than this share of what was asked can't be used (default: %(default)s)",
    )
    add(
        "--fractions",
        type=share,
        nargs=3,
        default=(0.9, 0.05, 0.05),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="of the corpus of images (default: 0.9 0.05 0.05)",
    )
    add("--seed", type=count, default=0, help="of the splits (default: %(default)s)")
    return parser


def positive(text: str) -> int:
    value = count(text)
    if not value:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


def amount(text: str) -> float:
    """A number over 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number over 0")
    return value


def request_fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = None
    taken = ("model", "messages", "stream", "n")
    if not isinstance(fields, dict) or any(name in fields for name in taken):
        raise argparse.ArgumentTypeError(f"must be a JSON object without {', '.join(taken)}")
    return fields


def read_options(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what depends on the environment or on other options; UserError where they don't go together."""
    options.base_url = options.base_url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_BASE_URL
    request = {**DEFAULT_REQUEST, **options.request}
    if "max_completion_tokens" in options.request:  # the newer name of max_tokens; endpoints refuse both together
        request.pop("max_tokens", None)
    options.request = request
    problems = []
    if (options.price_in is None) != (options.price_out is None):
        problems.append("--price-in and --price-out: give both or none")
    if options.max_cost is not None and options.price_in is None:
        problems.append("--max-cost: needs --price-in and --price-out, the teacher's prices per million tokens")
    if options.max_cost is not None and answer_limit(request) is None:
        problems.append("--request: without max_tokens or max_completion_tokens an answer could cost anything")
    if problems:
        raise UserError(problems)
    return options


def make_teacher(options: argparse.Namespace) -> Teacher:
    return Teacher(
        options.model,
        options.base_url,
        key_env=options.key_env,
        request=options.request,
        timeout_s=options.timeout,
        allow_http=options.allow_http,
    )


def make_budget(options: argparse.Namespace) -> Budget:
    prices = Prices(options.price_in, options.price_out) if options.price_in is not None else None
    return Budget(
        options.out / REQUESTS_FILE, max_requests=options.max_requests, max_cost=options.max_cost, prices=prices
    )

"""shards/synthetic_receipts.py"""

import io
import json
from pathlib import Path

import pytest
from corpus_sources import answer_of, bytes_of, call, call_as_user, question_of, read_samples, refused
from PIL import Image

from vlmdist.data.shards.corpus import Corpus

LINE_PROMPT = (
    "Expand abbreviations for products (receipt items), additionally highlight the product, brand and category: "
)
IMAGE_PROMPT = "Extract the company, date, address and total in json format. Respond with a valid JSON only."
SCRIPT = "synthetic_receipts"


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lines")
    done = call_as_user(
        f"shards/{SCRIPT}.py",
        folder,
        "--kind",
        "lines",
        "--out",
        "out",
        "--train",
        3000,
        "--validation",
        50,
        "--test",
        150,
    )
    assert done.returncode == 0, done.stderr
    assert not [p.name for p in folder.iterdir() if p.name != "out"]  # no staging folder left
    return folder / "out"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images") / "out"
    sizes = ("--train", 30, "--validation", 4, "--test", 30)
    assert call(SCRIPT, "--kind", "images", "--out", out, *sizes) == 0
    return out


def test_lines_have_the_recipes_prompt_and_answer_form(lines: Path) -> None:
    for split, number in {"train": 3000, "validation": 50, "test": 150}.items():
        samples = read_samples(lines / split)
        assert len(samples) == number
        for record, pictures in samples.values():
            assert not pictures
            assert question_of(record) == LINE_PROMPT + record["meta"]["raw"]
            assert record["answer"] == answer_of(record)
            assert record["answer"].count("##") == 3
            assert all(field.strip() for field in record["answer"].split("##"))


def test_lines_are_varied_and_their_parts_consistent(lines: Path) -> None:
    answers = [r["answer"].split("##") for r, _ in read_samples(lines / "train").values()]
    category_of: dict[str, set[str]] = {}
    for _, product, brand, category in answers:
        category_of.setdefault(product, set()).add(category)
        category_of.setdefault(brand, set()).add(category)
    assert len({product for _, product, _, _ in answers}) >= 150
    assert len({brand for _, _, brand, _ in answers}) >= 80
    assert len({category for *_, category in answers}) >= 12
    without_brand = category_of.pop("-")
    assert len(without_brand) > 5
    assert all(len(categories) == 1 for categories in category_of.values())


def test_a_normalized_line_spells_the_raw_one_out(lines: Path) -> None:
    """Word for word: each printed word begins like the one it stands for (quotes, noise and sizes aside)."""
    for record, _ in read_samples(lines / "validation").values():
        normalized, _, brand, _ = record["answer"].split("##")
        raw = record["meta"]["raw"].casefold().replace("'", "")
        if brand != "-":
            assert brand in normalized
            assert brand.casefold().replace(" ", "") in raw.replace(" ", "")
        words = [w for w in normalized.casefold().split() if w[0].isalpha() and w not in UNIT_WORDS]
        place = 0
        for word in words:  # in the same order
            place = raw.find(word[0], place)
            assert place >= 0, (raw, normalized)
            place += 1


UNIT_WORDS = {u + s for u in ("liter", "milliliter", "gram", "kilogram", "piece") for s in ("", "s")}


def test_no_line_is_in_two_splits_and_the_test_split_has_unseen_pairs(lines: Path) -> None:
    groups: dict[str, str] = {}
    pairs: dict[str, set[tuple[str, str]]] = {}
    for split in ("train", "validation", "test"):
        for record, _ in read_samples(lines / split).values():
            group = " ".join(record["meta"]["raw"].casefold().split())
            assert group not in groups
            groups[group] = split
            _, product, brand, _ = record["answer"].split("##")
            which = f"{split} {record['meta']['pair']}"
            pairs.setdefault(which, set()).add((product, brand))
    assert not pairs["test unseen"] & (pairs["train seen"] | pairs["validation seen"])
    assert len(pairs["test unseen"]) > 20
    seen_products = {product for product, _ in pairs["train seen"]}
    seen_brands = {brand for _, brand in pairs["train seen"]}
    assert {p for p, _ in pairs["test unseen"]} <= seen_products
    assert {b for _, b in pairs["test unseen"]} <= seen_brands


@pytest.mark.parametrize("kind", ["lines", "images"])
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path, kind: str) -> None:
    sizes = ("--train", 12, "--validation", 0, "--test", 12)
    for name, seed, first in (("a", 5, 12), ("b", 5, 12), ("c", 6, 12), ("d", 5, 20)):
        options = ("--kind", kind, "--out", tmp_path / name, "--seed", seed)
        assert call(SCRIPT, *options, *sizes, "--train", first) == 0
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a" / "test") != bytes_of(tmp_path / "c" / "test")
    assert bytes_of(tmp_path / "a" / "test") == bytes_of(tmp_path / "d" / "test")
    assert not (tmp_path / "a" / "validation").exists()


def test_images_show_what_the_answer_says(images: Path) -> None:
    seen: set[bytes] = set()
    for split, number in {"train": 30, "validation": 4, "test": 30}.items():
        samples = read_samples(images / split)
        assert len(samples) == number
        for record, (picture,) in samples.values():
            assert question_of(record) == IMAGE_PROMPT
            assert [p["type"] for p in record["messages"][0]["content"]] == ["image", "text"]
            fields = json.loads(record["answer"])
            assert list(fields) == ["company", "date", "address", "total"]
            assert record["answer"] == answer_of(record)
            opened = Image.open(io.BytesIO(picture))
            assert (opened.size, opened.format) == ((336, 480), "JPEG")
            light, dark = opened.convert("L").getextrema()[::-1]
            assert light - dark > 100  # there is ink on it
            assert picture not in seen
            seen.add(picture)


def test_unseen_shops_are_in_the_test_split_alone(images: Path) -> None:
    shops: dict[str, set[str]] = {"seen": set(), "unseen": set()}
    for split in ("train", "validation", "test"):
        for record, _ in read_samples(images / split).values():
            shops[record["meta"]["shop"]].add(json.loads(record["answer"])["company"])
            assert split == "test" or record["meta"]["shop"] == "seen"
    assert shops["unseen"]
    assert not shops["unseen"] & shops["seen"]


def test_width_is_an_option_and_the_corpus_opens(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ("--train", 2, "--validation", 0, "--test", 0)
    assert call(SCRIPT, "--kind", "images", "--width", 700, "--out", out, *sizes) == 0
    assert len(Corpus.open(out / "train")) == 2
    ((_, (picture,)), *_) = read_samples(out / "train").values()
    assert Image.open(io.BytesIO(picture)).size == (700, 1000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kind", "lines", "--train", "0", "--validation", "0", "--test", "0"), "nothing to make"),
        (("--kind", "images", "--width", "5"), "--width 5"),
        (("--kind", "lines", "--train", "-3"), "-3"),
        (("--kind", "poems"), "lines"),
        ((), "--kind"),
    ],
)
def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, SCRIPT, "--out", tmp_path / "out", *arguments)
    assert not list(tmp_path.iterdir())

"""What is in a corpus, from its index alone: seconds for millions of samples."""

import shlex
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmdist.data.images.decode import decode_image
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample, UserError
from vlmdist.sample import ImagePart, Message, Sample

MAX_LISTED = 20
_PERCENTILES = (0, 50, 90, 99, 100)


def inspect_corpus(corpus: Corpus, key: str | None = None) -> dict[str, Any]:
    """Counts, bytes, sizes, quarantined samples of a corpus as plain JSON values; with ``key`` also that sample.

    UserError where no sample has the key.
    """
    members = corpus.member_columns()
    is_image = members["width"] > 0
    verified = corpus.verified
    quarantined = np.flatnonzero(corpus.quarantined).tolist()
    reasons = Counter(str(corpus.quarantine_reason(i)) for i in quarantined)
    found: dict[str, Any] = {
        "folder": corpus.name,
        "fingerprint": corpus.fingerprint,
        "verified": verified,
        "samples": len(corpus),
        "shards": len(corpus.shards),
        "shard_bytes": sum(s["bytes"] for s in corpus.shards),
        "member_bytes": int(members["length"].sum()),
        "members": {e: int(n) for e, n in sorted(corpus.count_extensions().items())},
        "images": int(corpus.num_images.sum()),
        "samples_without_image": int((corpus.num_images == 0).sum()),
        "images_per_sample_max": int(corpus.num_images.max(initial=0)),
        "image_width": _distribution(members["width"][is_image]),
        "image_height": _distribution(members["height"][is_image]),
        "image_pixels": _distribution(members["width"][is_image].astype(np.int64) * members["height"][is_image]),
        "text_bytes": _distribution(corpus.text_bytes[~corpus.quarantined]),
        "identical_images": _num_repeated(members["crc32"][is_image], members["length"][is_image])
        if verified
        else None,
        "quarantined": len(quarantined),
        "quarantine_reasons": dict(reasons.most_common(MAX_LISTED)),
        "quarantined_samples": [_quarantined(corpus, i) for i in quarantined[:MAX_LISTED]],
    }
    if key is not None:
        found["sample"] = _inspect_sample(corpus, key)
    return found


def format_inspection(found: dict[str, Any]) -> str:
    """The findings of ``inspect_corpus`` for people. Names from the tars are shown with control characters escaped."""
    lines = [
        f"{found['folder']}",
        f"  samples       {found['samples']:,} in {found['shards']:,} shards, {_megabytes(found['shard_bytes'])}",
        "  members       " + ", ".join(f"{n:,} .{_shown(e)}" for e, n in _most(found["members"])),
        f"  images        {found['images']:,}; {found['samples_without_image']:,} samples without, "
        f"at most {found['images_per_sample_max']} a sample"
        + (f"; {found['identical_images']:,} identical to another" if found["verified"] else ""),
    ]
    text = "text, bytes" if found["verified"] else ".json, bytes"
    for name, label in (("image_width", "width, px"), ("image_height", "height, px"), ("text_bytes", text)):
        if found[name] is not None:
            d = found[name]
            lines.append(
                f"  {label:<13} median {d['p50']:,}, 90 % up to {d['p90']:,}, 99 % {d['p99']:,}, "
                f"from {d['min']:,} to {d['max']:,}, mean {d['mean']:,.1f}"
            )
    lines.append(f"  fingerprint   {found['fingerprint']}")
    lines.append(f"  quarantined   {found['quarantined']:,} samples that can't be used")
    if not found["verified"]:
        lines += [
            "  not verified  the index was made from headers only: what is inside the members, image sizes and broken",
            "                samples included, is not known before they are read. Complete it before training (its",
            f"                fingerprint changes) with: vlmdist index {shlex.quote(found['folder'])}",
        ]
    lines += [f"    {n:>8,} x {_shown(reason)}" for reason, n in found["quarantine_reasons"].items()]
    lines += [f"    {_shown(q['shard'])} {_shown(q['key'])}: {_shown(q['why'])}" for q in found["quarantined_samples"]]
    if "sample" in found:
        lines += _sample_lines(found["sample"])
    return "\n".join(lines)


def _inspect_sample(corpus: Corpus, key: str) -> dict[str, Any]:
    number = corpus.find(key)
    if number is None:
        some = ", ".join(repr(corpus.key(i)) for i in range(min(3, len(corpus))))
        raise UserError(f"{corpus.name}: no sample has the key {key!r}; its first keys are {some}")
    facts: dict[str, Any] = {
        "number": number,
        "key": key,
        "shard": corpus.shard_name(number),
        "image_sizes": [list(size) for size in corpus.image_sizes(number)],
    }
    try:
        sample = corpus.read(number)
        for i, image in enumerate(sample.images):
            _decode(i, image)
    except BadSample as e:
        return {**facts, "problem": str(e)}
    return {**facts, **_record(sample)}


def _decode(number: int, image: bytes) -> None:
    try:
        decode_image(image)
    except BadSample as e:
        raise BadSample(f"image {number}: {e}") from None


def _record(sample: Sample) -> dict[str, Any]:
    return {
        "messages": [{"role": m.role, "content": _content(m)} for m in sample.messages],
        "answer": sample.answer,
        "meta": sample.meta,
        "image_bytes": [len(image) for image in sample.images],
    }


def _content(message: Message) -> list[dict[str, Any]]:
    return [
        {"type": "image", "index": p.index} if isinstance(p, ImagePart) else {"type": "text", "text": p.text}
        for p in message.content
    ]


def _sample_lines(sample: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{w}x{h}" for w, h in sample["image_sizes"]) or "none"
    lines = [f"sample {sample['number']}, key {_shown(sample['key'])}, in {_shown(sample['shard'])}; images: {sizes}"]
    if "problem" in sample:
        return [*lines, f"  can't be used: {_shown(sample['problem'])}"]
    for message in sample["messages"]:
        said = "".join(p["text"] if p["type"] == "text" else f"<image {p['index']}>" for p in message["content"])
        lines.append(f"  {message['role']}: {_shown(said, keep=chr(10))}")
    if sample["answer"] is not None:
        lines.append(f"  (answer) {_shown(sample['answer'], keep=chr(10))}")
    if sample["meta"]:
        lines.append(f"  (meta) {_shown(str(sample['meta']))}")
    return lines


def _quarantined(corpus: Corpus, i: int) -> dict[str, Any]:
    return {"number": i, "shard": corpus.shard_name(i), "key": corpus.key(i), "why": corpus.quarantine_reason(i)}


def _distribution(values: NDArray[Any]) -> dict[str, float] | None:
    if not len(values):
        return None
    low, median, p90, p99, high = np.percentile(values, _PERCENTILES, method="nearest").tolist()
    return {"min": low, "p50": median, "p90": p90, "p99": p99, "max": high, "mean": float(values.mean())}


def _num_repeated(crc32: NDArray[np.uint32], length: NDArray[np.int64]) -> int:
    """Members beyond the first of each content; contents count as equal by checksum and length."""
    pairs = crc32.astype(np.uint64) << np.uint64(32) | (length.astype(np.uint64) & np.uint64(0xFFFFFFFF))
    return len(pairs) - len(np.unique(pairs))


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda kv: -kv[1])[:8]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _shown(text: str, keep: str = "") -> str:
    """Without control characters: names come from tars that anyone wrote, and terminals obey escape sequences."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)

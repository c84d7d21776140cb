"""Real samples through the real processor: is the mask proven, do they fit, how long are the longest?"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from vlmdist.config import RunConfig
from vlmdist.data.costs import apply_rule, measure_rule
from vlmdist.data.prompt import Encoded, Prompter
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import BadSample, RunFailed, UserError

_NUM_TEXT, _NUM_IMAGES = 200, 16
"""Samples looked at, spread evenly over a corpus: of text, and with images, which take longer."""
_NUM_MEASURED_TEXT, _NUM_MEASURED_IMAGES = 64, 8
_NUM_LONGEST = 4
"""More of them: those that the index says are the longest."""
_ANY_LENGTH = 1 << 30
_NAMED = 3


@dataclass(frozen=True)
class Taken:
    """A sample as training would take it."""

    corpus: int
    """Its number among those looked at."""
    encoded: Encoded
    cpu_s: float
    """CPU time to read, decode and tokenize it here, of all threads."""


@dataclass
class Seen:
    """What was found in the training corpora."""

    num_seen: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of the samples spread evenly, too long ones included."""
    even: list[Taken] = field(default_factory=list)
    """Of those, the ones that fit, in the order in which they were read."""
    num_loss_tokens: int = 0
    num_tokens: int = 0
    longest: list[Encoded] = field(default_factory=list)
    """Longest first, none over data.max_length."""
    longest_key: str | None = None
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def look_at_samples(config: RunConfig, corpora: Sequence[Corpus], prompter: Prompter) -> Seen:
    """Encode samples of each corpus as training would."""
    seen = Seen()
    unlimited = copy.copy(prompter)
    unlimited.max_length = _ANY_LENGTH
    found: list[tuple[Encoded, str]] = []
    for number, corpus in enumerate(corpora):
        found += _look(config, number, corpus, unlimited, seen)
    fitting = [(e, key) for e, key in found if len(e.input_ids) <= config.data.max_length]
    fitting.sort(key=lambda pair: -len(pair[0].input_ids))
    seen.longest = [e for e, _ in fitting]
    seen.longest_key = fitting[0][1] if fitting else None
    if prompter.has_images and corpora and not any(c.num_images.any() for c in corpora):
        seen.warnings.append("data.train: no sample has an image, the model takes images: is this the right corpus?")
    return seen


def _look(
    config: RunConfig, corpus_number: int, corpus: Corpus, prompter: Prompter, seen: Seen
) -> list[tuple[Encoded, str]]:
    """The samples of one corpus that can be used, and their keys."""
    quarantined = np.flatnonzero(corpus.quarantined)
    good = np.flatnonzero(~corpus.quarantined)
    allowed = config.data.max_bad_fraction
    _tell_quarantined(corpus, quarantined, allowed, seen)
    if not len(good):
        return []
    count = _NUM_IMAGES if corpus.num_images.any() else _NUM_TEXT
    evenly = np.unique(np.linspace(0, len(good) - 1, min(len(good), count)).astype(int))
    chosen = [int(good[i]) for i in evenly]
    bad: list[tuple[str, str]] = []
    long: list[tuple[str, int]] = []
    usable: list[tuple[Encoded, str]] = []
    for number in [*chosen, *_longest(corpus, prompter, set(chosen))]:
        is_even = number in chosen
        begun_s = time.process_time()
        try:
            encoded = prompter.encode_training(corpus.read(number))
        except BadSample as e:
            bad.append((corpus.key(number), str(e)))
            continue
        except (RunFailed, UserError) as e:  # a shard that can't be had
            seen.problems.append(f"data.train: {e}")
            break
        usable.append((encoded, corpus.key(number)))
        if len(encoded.input_ids) > config.data.max_length:
            long.append((corpus.key(number), len(encoded.input_ids)))
        if is_even:
            seen.lengths.append(len(encoded.input_ids))
            if len(encoded.input_ids) <= config.data.max_length:
                seen.even.append(Taken(corpus_number, encoded, time.process_time() - begun_s))
            seen.num_tokens += len(encoded.input_ids)
            seen.num_loss_tokens += encoded.num_loss_tokens
    num_looked = len(usable) + len(bad)
    seen.num_seen += num_looked
    _tell_bad(corpus, bad, num_looked, allowed, seen)
    _tell_long(config, corpus, long, num_looked, seen)
    return usable


def _longest(corpus: Corpus, prompter: Prompter, but: set[int]) -> list[int]:
    """Numbers of the samples that the index says are the longest."""
    good = np.flatnonzero(~corpus.quarantined)
    count = _NUM_MEASURED_IMAGES if corpus.num_images.any() else _NUM_MEASURED_TEXT
    measured = [(0, int(good[i])) for i in np.unique(np.linspace(0, len(good) - 1, min(len(good), count)).astype(int))]
    rule = replace(measure_rule([corpus], measured, prompter, patch_work=0.0), headroom=1024)
    tokens = apply_rule(rule, corpus, prompter).tokens.copy()
    tokens[corpus.quarantined] = 0
    return [int(i) for i in np.argsort(-tokens, kind="stable")[:_NUM_LONGEST] if int(i) not in but and tokens[i] > 0]


def _tell_quarantined(corpus: Corpus, numbers: "np.ndarray", allowed: float, seen: Seen) -> None:
    if not len(numbers):
        return
    first = "; ".join(f"{corpus.key(int(i))}: {corpus.quarantine_reason(int(i))}" for i in numbers[:_NAMED])
    text = f"{corpus.name}: {len(numbers)} of {len(corpus)} samples can't be used ({first})"
    if len(numbers) > np.ceil(allowed * len(corpus)):
        seen.problems.append(
            f"data.train: {text}, more than data.max_bad_fraction {allowed} allows; mend them (vlmdist inspect lists "
            "them) or raise it"
        )
    else:
        seen.warnings.append(f"data.train: {text}; they are left out and counted")


def _tell_bad(corpus: Corpus, bad: list[tuple[str, str]], num_looked: int, allowed: float, seen: Seen) -> None:
    if not bad:
        return
    text = (
        f"data.train: {corpus.name}: {len(bad)} of the {num_looked} samples looked at can't be used "
        f"({'; '.join(f'{key}: {why}' for key, why in bad[:_NAMED])})"
    )
    if len(bad) > max(1, np.ceil(allowed * num_looked)) or len(bad) == num_looked:
        seen.problems.append(f"{text}, more than data.max_bad_fraction {allowed} allows; mend them or raise it")
    else:
        seen.warnings.append(f"{text}; they are left out and counted")


def _tell_long(config: RunConfig, corpus: Corpus, long: list[tuple[str, int]], num_looked: int, seen: Seen) -> None:
    if not long:
        return
    d = config.data
    key, longest = max(long, key=lambda pair: pair[1])
    text = (
        f"data.max_length: {len(long)} of the {num_looked} samples of {corpus.name} looked at are longer than "
        f"{d.max_length} tokens (longest: {longest}, {key})"
    )
    if d.too_long == "refuse":
        seen.problems.append(f"{text} and data.too_long is refuse: the run would end; raise data.max_length")
    elif sum(n > d.max_length for n in seen.lengths) > max(1, np.ceil(d.max_bad_fraction * len(seen.lengths))):
        seen.problems.append(
            f"{text}, more than data.max_bad_fraction {d.max_bad_fraction} allows; raise data.max_length"
        )
    else:
        seen.warnings.append(f"{text}; they are left out and counted")


def made_up(prompter: Prompter, max_length: int) -> list[Encoded]:
    """A sample of max_length tokens, all in the loss, for where no real one can be had."""
    start = prompter.placeholder(prompter.has_images)
    more = max(0, max_length - len(start.input_ids))
    ids = start.input_ids + [prompter.pad_token_id] * more
    per_token = {name: row + [0] * more for name, row in start.per_token.items()}
    return [Encoded(ids, [True] * len(ids), per_token, start.features)]

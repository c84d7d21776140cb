"""How sure a figure is, and whether two differ: bootstrap intervals and a permutation test, over clusters of samples.

Samples of one cluster (the same image, raw line or question) come and go together, since they are right or wrong
together. Legend: S systems (1, or 2 that are compared), C clusters, F figures, R resamples; a figure is a ratio of two
sums, the last axis.

The same answers give the same intervals on every machine: all sums are of whole numbers below 2**53, which no order of
adding rounds; the draws are made here from PCG64's raw stream, which NumPy keeps stable (NEP 19), seeded by the data.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.random import PCG64
from numpy.typing import NDArray

from vlmdist.evaluate.figures import Figure

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
MOST_CLUSTERS = 4096
"""More are dealt into that many groups first: time stays at a second, and the spread of so many is known to 1 %."""
INTERVAL_DIGITS = 4

_FRACTION_BITS = 20  # numerators count in millionths of a percent
_DRAWS_AT_A_TIME = 2**20

Floats = NDArray[np.float64]
Interval = tuple[float, float]


def sum_clusters(systems: Sequence[Sequence[Figure]], cluster_numbers: Sequence[int]) -> tuple[Floats, Floats]:
    """Whole-numbered sums of every figure's terms by cluster [S, C, F, 2], and the unit of the numerators [F].

    cluster_numbers [N]: of each sample. Clusters over MOST_CLUSTERS are dealt into groups in a fixed random order.
    """
    numbers = np.asarray(cluster_numbers, dtype=np.int64)
    num_clusters = int(numbers.max()) + 1
    if num_clusters > MOST_CLUSTERS:
        shuffled = np.argsort(PCG64(0).random_raw(num_clusters), kind="stable")
        group = np.empty(num_clusters, dtype=np.int64)
        group[shuffled] = np.arange(num_clusters) % MOST_CLUSTERS
        numbers, num_clusters = group[numbers], MOST_CLUSTERS
    most_samples = int(np.bincount(numbers).max())
    figures_of_all = list(zip(*systems, strict=True))
    sums = np.zeros((len(systems), num_clusters, len(figures_of_all), 2))
    units = np.ones(len(figures_of_all))
    for f, of_systems in enumerate(figures_of_all):
        largest = max((abs(x) for figure in of_systems for x in figure.numerators), default=0.0)
        bits = min(_FRACTION_BITS, 52 - math.frexp(largest * most_samples * num_clusters)[1])
        units[f] = math.ldexp(1.0, -bits)
        for s, figure in enumerate(of_systems):
            cluster = numbers[figure.samples]
            whole = np.rint(np.ldexp(np.asarray(figure.numerators, dtype=np.float64), bits))
            sums[s, :, f, 0] = np.bincount(cluster, weights=whole, minlength=num_clusters)
            sums[s, :, f, 1] = np.bincount(cluster, weights=figure.denominators, minlength=num_clusters)
    return sums + 0.0, units  # + 0.0: a zero has no sign, which the seed would see


def intervals(
    sums: Floats, units: Floats, are_percent: Sequence[bool] | None = None, num_resamples: int = NUM_RESAMPLES
) -> list[Interval | None]:
    """95 % confidence interval of each of F figures, of one system, or of the difference second - first of two.

    BCa bootstrap over clusters: percentiles corrected for bias and skew (Efron, Better Bootstrap Confidence Intervals,
    JASA 1987, https://doi.org/10.1080/01621459.1987.10478410), since scores near 100 are skewed, where plain
    percentiles miss to one side. None with fewer than two clusters; with fewer than about twenty it is too narrow, as
    any bootstrap. are_percent [F]: figures of one system that end at 0 and 100. Where every cluster is at such an end,
    resampling can't tell what else there is, and the other end is Clopper and Pearson's (1934).
    """
    if sums.shape[1] < 2:
        return [None] * len(units)
    totals = sums.sum(axis=1)  # [S, F, 2]
    values = _values(totals, units)  # [F]
    resampled = np.concatenate([_values(r, units) for r in _resampled_sums(sums, num_resamples)])  # [R, F]
    left_out = _values(totals[:, None] - sums, units)  # [C, F]
    found: list[Interval | None] = []
    for f, value in enumerate(values):
        num_present = int((sums[:, :, f, 1] > 0).all(axis=0).sum())
        if num_present < 2:
            found.append(None)
            continue
        interval = _bca(float(value), resampled[:, f], left_out[:, f])
        if are_percent is not None and are_percent[f]:
            interval = _open_end(interval, num_present)
        found.append((round(interval[0], INTERVAL_DIGITS), round(interval[1], INTERVAL_DIGITS)))
    return found


def p_values(sums: Floats, units: Floats, num_resamples: int = NUM_RESAMPLES) -> list[float | None]:
    """Two-sided p of "the two systems are equally good" for each of F figures; sums [2, C, F, 2].

    Paired permutation test: if they are, each cluster's pair of results might as well be swapped (Fisher 1935; for
    language tasks Dror et al., ACL 2018, https://aclanthology.org/P18-1128). p is the share of random swaps with a
    difference as large as the one found; equal ones count half (mid-p), without which the test of right and wrong
    answers is too shy (Fagerland et al. 2013, https://doi.org/10.1186/1471-2288-13-91). None with fewer than two
    clusters, and where a system has no value.
    """
    if sums.shape[1] < 2:
        return [None] * len(units)
    found = np.abs(_values(sums.sum(axis=1), units))  # [F]
    larger, equal = np.zeros(len(units)), np.zeros(len(units))
    for swapped in _swapped_sums(sums, num_resamples):
        differences = np.abs(_values(swapped, units))  # [r, F]
        larger += (differences > found).sum(axis=0)
        equal += (differences == found).sum(axis=0)
    mid = (larger + 0.5 * (equal + 1)) / (num_resamples + 1)
    is_same = (sums[0] == sums[1]).all(axis=(0, 2))  # every cluster the same: nothing speaks for a difference
    chances = np.where(np.isnan(found), np.nan, np.where(is_same, 1.0, mid))
    return [None if math.isnan(p) else round(float(p), 6) for p in chances]


def _values(sums: Floats, units: Floats) -> Floats:
    """Sums [S, ..., F, 2] to values [..., F]: of one system, or second - first. nan where nothing is below the line."""
    above, below = sums[..., 0], sums[..., 1]  # [S, ..., F]
    with np.errstate(divide="ignore", invalid="ignore"):
        if len(sums) == 1:
            one: Floats = above[0] / below[0] * units
            return one
        # over the same number, the difference is taken before it is rounded: equal differences stay equal
        same = (above[1] - above[0]) / below[0]
        return np.where(below[0] == below[1], same, above[1] / below[1] - above[0] / below[0]) * units


def _resampled_sums(sums: Floats, num_resamples: int) -> Iterator[Floats]:
    """Draw C clusters out of C, again and again: their sums, as chunks [S, r, F, 2] of in all R resamples."""
    num_clusters = sums.shape[1]
    raw = _raw_stream(sums, "bootstrap")

    def draw(num: int) -> Floats:
        words = raw((num * num_clusters + 1) // 2)
        halves = np.concatenate([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)])[: num * num_clusters]
        drawn = ((halves * np.uint64(num_clusters)) >> np.uint64(32)).astype(np.int64).reshape(num, num_clusters)
        drawn += np.arange(num)[:, None] * num_clusters
        counts = np.bincount(drawn.ravel(), minlength=num * num_clusters)
        return counts.reshape(num, num_clusters).astype(np.float64)

    yield from _weighted(sums, draw, num_resamples)


def _swapped_sums(sums: Floats, num_resamples: int) -> Iterator[Floats]:
    """Swap each cluster's two systems or don't, by a coin: chunks [2, r, F, 2] of in all R swaps."""
    num_clusters = sums.shape[1]
    raw = _raw_stream(sums, "permutation")

    def toss(num: int) -> Floats:
        words = raw((num * num_clusters + 63) // 64)
        coins = np.unpackbits(words.astype("<u8").view(np.uint8), count=num * num_clusters)
        return coins.reshape(num, num_clusters).astype(np.float64)

    totals = sums.sum(axis=1)[:, None]  # [2, 1, F, 2]
    for moved in _weighted((sums[1] - sums[0])[None], toss, num_resamples):  # [1, r, F, 2]
        yield np.concatenate([totals[:1] + moved, totals[1:] - moved])


def _weighted(sums: Floats, weights: Callable[[int], Floats], num_resamples: int) -> Iterator[Floats]:
    num_systems, num_clusters, num_figures, _ = sums.shape
    by_cluster = sums.transpose(1, 0, 2, 3).reshape(num_clusters, -1)  # [C, S*F*2]
    at_a_time = max(1, _DRAWS_AT_A_TIME // num_clusters)
    for start in range(0, num_resamples, at_a_time):
        num = min(at_a_time, num_resamples - start)
        weighted = weights(num) @ by_cluster  # exact: whole numbers, so BLAS may add them as it likes
        yield weighted.reshape(num, num_systems, num_figures, 2).transpose(1, 0, 2, 3)


def _raw_stream(sums: Floats, purpose: str) -> Callable[[int], NDArray[np.uint64]]:
    seed = hashlib.sha256(purpose.encode() + np.ascontiguousarray(sums, dtype="<f8").tobytes()).digest()
    generator = PCG64(int.from_bytes(seed[:16], "little"))
    return lambda num: np.asarray(generator.random_raw(num))


def _bca(value: float, resampled: Floats, left_out: Floats) -> Interval:
    """value: as found; resampled [R]; left_out [C]: the value without each cluster."""
    resampled = np.sort(resampled[~np.isnan(resampled)])
    num = len(resampled)
    below = float((resampled < value).sum() + 0.5 * (resampled == value).sum())
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 0.5), num - 0.5) / num)
    skew = _acceleration(left_out[~np.isnan(left_out)])
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    lower, upper = (normal.cdf(bias + (bias + end) / (1 - skew * (bias + end))) for end in (-z, z))
    first = math.floor((num + 1) * lower)
    last = num + 1 - math.floor((num + 1) * (1 - upper))
    return float(resampled[max(first, 1) - 1]), float(resampled[min(last, num) - 1])


def _acceleration(left_out: Floats) -> float:
    mean = math.fsum(left_out) / len(left_out)
    distances = [mean - float(x) for x in left_out]
    spread = math.fsum(d * d for d in distances)
    return math.fsum(d * d * d for d in distances) / (6 * spread**1.5) if spread > 0 else 0.0


def _open_end(interval: Interval, num_clusters: int) -> Interval:
    reach = 100 * (1 - ((1 - CONFIDENCE) / 2) ** (1 / num_clusters))
    if interval == (0.0, 0.0):
        return 0.0, reach
    return (100.0 - reach, 100.0) if interval == (100.0, 100.0) else interval

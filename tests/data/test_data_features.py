"""Vision features on disk: what was written whole is found by everyone, what was cut or changed is as if not there."""

import logging
import shutil
from pathlib import Path

import pytest
import torch

from vlmdist.data.features import FEATURES, FeatureWriter, KeptSamples, ToKeep, VisionRows, vision_rows
from vlmdist.data.prompt import Encoded

NUM_SAMPLES = 10


def tokens(sample: int) -> Encoded:
    ids = list(range(sample, sample + 5))
    return Encoded(ids, [i % 2 == 0 for i in ids], {"token_type_ids": [1] * 5}, {})


def features(sample: int, num_tiles: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(num_tiles, 3, 8, generator=torch.Generator().manual_seed(sample)).to(dtype)


def write(folder: Path, *samples: int, rank: int = 0, reserve_bytes: int = 0, num_tiles: int = 2) -> None:
    writer = FeatureWriter(rank, reserve_bytes)
    to_keep = tuple(ToKeep(folder, sample, num_tiles, tokens(sample)) for sample in samples)
    placeholder = features(99, 1)  # behind them, and nobody's
    writer.keep(to_keep, torch.cat([*(features(sample, num_tiles) for sample in samples), placeholder]))
    writer.wait()


def kept_samples(folder: Path) -> KeptSamples:
    kept = KeptSamples(folder, NUM_SAMPLES)
    kept.search()
    return kept


def is_whole(found: Encoded | None, sample: int, num_tiles: int = 2) -> bool:
    if found is None:
        return False
    expected = tokens(sample)
    assert (found.input_ids, found.in_loss, found.per_token) == (
        expected.input_ids,
        expected.in_loss,
        expected.per_token,
    )
    stored = found.features[FEATURES]
    assert isinstance(stored, torch.Tensor)
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, features(sample, num_tiles))
    return True


def only(folder: Path, ending: str) -> Path:
    (file,) = folder.glob(f"*.{ending}")
    return file


def test_what_any_rank_wrote_is_read_by_all(tmp_path: Path) -> None:
    write(tmp_path, 3, 1)
    kept = kept_samples(tmp_path)
    write(tmp_path, 8, rank=1, num_tiles=4)
    assert len(kept) == 2
    kept.search()
    assert len(kept) == 3
    assert is_whole(kept.read(3), 3)
    assert is_whole(kept.read(1), 1)
    assert is_whole(kept.read(8), 8, num_tiles=4)
    assert kept.read(0) is None
    assert kept.will_need([3, 0, 8, 9]) == [0, 9]


def test_a_sample_is_found_without_being_told_that_it_came(tmp_path: Path) -> None:
    kept = kept_samples(tmp_path)
    write(tmp_path, 5)
    kept._next_search_s = 0.0  # the pause is over
    assert is_whole(kept.read(5), 5)


@pytest.mark.parametrize("cut", ["index", "records"])
def test_a_tail_cut_by_a_kill_is_not_there(tmp_path: Path, cut: str) -> None:
    write(tmp_path, 2, 4)
    file = only(tmp_path, cut)
    file.write_bytes(file.read_bytes()[:-7])
    kept = kept_samples(tmp_path)
    assert is_whole(kept.read(2), 2)
    assert kept.read(4) is None
    write(tmp_path, 4, rank=1)  # made anew, by whoever takes it next
    kept.search()
    assert is_whole(kept.read(4), 4)


def test_a_changed_record_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    file = only(tmp_path, "records")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    kept = kept_samples(tmp_path)
    assert is_whole(kept.read(2), 2)
    assert kept.read(4) is None


def test_nonsense_in_an_index_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 2)
    for number, row in enumerate([b"\xff" * 32, b"\0" * 32, (10**6).to_bytes(8, "little") + b"\1" * 24]):
        (tmp_path / f"other-{number}.index").write_bytes(row)
    kept = kept_samples(tmp_path)
    assert len(kept) == 1
    assert is_whole(kept.read(2), 2)


def test_a_folder_that_was_cleared_is_empty(tmp_path: Path) -> None:
    write(tmp_path, 2)
    kept = kept_samples(tmp_path)
    shutil.rmtree(tmp_path)
    assert kept.will_need([2]) == []
    assert kept.read(2) is None
    kept.search()
    assert kept.read(2) is None


def test_room_for_checkpoints_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "vlmdist"):
        write(tmp_path, 2, 4, reserve_bytes=1 << 60)
    assert caplog.messages == [
        f"vision features: {tmp_path} has room for little more than two checkpoints: no more are kept, the run goes on "
        "without"
    ]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_ends_the_keeping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone = tmp_path / "gone"
    with caplog.at_level(logging.WARNING, "vlmdist"):
        write(gone, *range(6))
    (message,) = caplog.messages
    assert str(gone) in message
    assert "No such file or directory" in message


def test_a_sample_is_written_once(tmp_path: Path) -> None:
    writer = FeatureWriter(0, 0)
    for _ in range(3):
        writer.keep((ToKeep(tmp_path, 7, 2, tokens(7)),), features(7, 2))
    writer.wait()
    assert only(tmp_path, "index").stat().st_size == 32


def test_the_tiles_of_a_micro_batch(tmp_path: Path) -> None:
    """Text alone, kept, pixels, placeholder."""

    def row(sample: int, **image_inputs: torch.Tensor) -> Encoded:
        return Encoded(tokens(sample).input_ids, tokens(sample).in_loss, {}, dict(image_inputs))

    kept = features(2, 3)
    pixels = torch.zeros(2, 3, 4, 4)
    rows = [row(1), row(2, **{FEATURES: kept}), row(3, pixel_values=pixels), row(4, pixel_values=pixels[:1])]
    owners = [(tmp_path, 1), (tmp_path, 2), (tmp_path, 3)]
    found = vision_rows(rows, owners, kept)
    assert found is not None
    assert found.is_kept == (True, True, True, False, False, False)
    assert found.kept is kept
    (to_keep,) = found.to_keep
    assert (to_keep.folder, to_keep.sample, to_keep.num_tiles) == (tmp_path, 3, 2)
    assert to_keep.tokens.features == {}
    assert vision_rows(rows[:1], owners[:1], None) is None
    moved = found.to("meta")
    assert isinstance(moved, VisionRows)
    assert moved.kept is not None
    assert moved.kept.device.type == "meta"

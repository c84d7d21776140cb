"""Make the index of a folder of WebDataset tars, whoever wrote them."""

from pathlib import Path

from vlmdist.data.index import Corpus, mend_command
from vlmdist.data.index_file import write_index
from vlmdist.data.index_rows import IndexRows
from vlmdist.data.tar import BrokenTar
from vlmdist.data.tar_samples import list_shards, samples_in, shard_facts
from vlmdist.errors import UserError


def build_index(folder: Path, progress: bool = False) -> Corpus:
    """Read every tar of the folder once, write its index, and open it. All broken tars are told in one UserError."""
    from tqdm import tqdm

    folder = Path(folder)
    shards = list_shards(folder)
    rows, facts, problems = IndexRows(), [], []
    num_bytes = sum(p.stat().st_size for p in shards)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="index", disable=not progress) as bar:
        for shard in shards:
            rows.begin_shard(shard.name)
            try:
                for key, members in samples_in(shard):
                    rows.add(key, members)
            except BrokenTar as e:
                problems.append(f"{shard}: {e}; copy or write this shard anew, then: {mend_command(folder)}")
            except OSError as e:
                problems.append(f"{shard}: can't be read: {e.strerror or e}")
            facts.append(shard_facts(shard))
            bar.update(facts[-1]["bytes"])
    if problems:
        raise UserError(problems)
    tables = rows.tables(facts)
    if not tables.num_samples:
        raise UserError(f"{folder}: its tars hold no samples; members must be named KEY.json, KEY.jpg, ...")
    write_index(folder, tables)
    return Corpus.open(folder)

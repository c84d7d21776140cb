"""Fuzz what reads files that anyone wrote, led by the coverage that each input reaches (atheris, libFuzzer).

    python tests/fuzz/fuzz.py tar --runs 40000        the index builder and the reading of its samples
    python tests/fuzz/fuzz.py json --runs 40000       the JSON reader
    python tests/fuzz/fuzz.py image --runs 40000      the image decoder

An input that raises anything but the code's own refusals, takes too long or too much memory is a finding: it is written
to --findings, the stack is printed, and the exit code is not 0. Give such a file as INPUT to see the finding again.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

MEMORY_FOLDER = "/dev/shm"  # indexes are synced to the disk, which would be most of the time
_SECONDS_PER_INPUT = 10
_MAX_INPUT_BYTES = 1 << 14
_MEMORY_MB = 2048
_ADDRESS_SPACE_BYTES = 8 << 30  # of which libraries map much that they never touch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=("tar", "json", "image"))
    parser.add_argument("--runs", type=int, default=40_000, metavar="N", help="inputs to try (default: 40000)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations; the same seed tries the same inputs")
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), metavar="DIR", help="default: ./fuzz-findings"
    )
    parser.add_argument("--input", type=Path, metavar="INPUT", help="try this one file and nothing else")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if find_spec("atheris") is None:
        print("skipped: atheris is not installed; it comes with: pip install '.[fuzz]'")
        return 0
    if options.scratch:
        _fuzz(options)
    options.findings.mkdir(parents=True, exist_ok=True)
    before = set(options.findings.iterdir())
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER if os.path.isdir(MEMORY_FOLDER) else None) as scratch:
        # in a process of its own: libFuzzer ends it without a word to Python
        code = subprocess.run(
            [sys.executable, *sys.argv, "--scratch", scratch], env={**os.environ, "TMPDIR": scratch}, check=False
        ).returncode
    new = sorted(str(path) for path in set(options.findings.iterdir()) - before)
    if code or new:
        print(f"{options.target}: a finding: {', '.join(new) or f'exit code {code}'}")
        return 1
    print(f"{options.target}: {1 if options.input else options.runs} inputs, no finding")
    return 0


def _fuzz(options: argparse.Namespace) -> None:
    import atheris

    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE_BYTES, _ADDRESS_SPACE_BYTES))
    with atheris.instrument_imports(include=["vlmdist", "PIL"], enable_loader_override=False):
        from fuzz_targets import TARGETS
    check, make_seeds, reseal = TARGETS[options.target]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        """libFuzzer's own mutations; in three of four the checksums are put right, so that damage gets past them."""
        mutated = atheris.Mutate(data, max_size)
        return reseal(mutated)[:max_size] if seed % 4 else mutated

    if options.input:
        inputs = [str(options.input)]
    else:
        corpus = options.scratch / "corpus"
        corpus.mkdir()
        for number, data in enumerate(make_seeds()):
            (corpus / f"seed-{number:02d}").write_bytes(data)
        inputs = [str(corpus), f"-runs={options.runs}", f"-seed={options.seed}"]
    limits = [f"-timeout={_SECONDS_PER_INPUT}", f"-rss_limit_mb={_MEMORY_MB}", f"-max_len={_MAX_INPUT_BYTES}"]
    where = [f"-artifact_prefix={options.findings}{os.sep}"]
    atheris.Setup([sys.argv[0], *inputs, *limits, *where], check, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())

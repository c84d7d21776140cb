"""The corpus that an evaluation was made on: evaluation.json names it by fingerprint alone, so it may have moved."""

from collections.abc import Iterable

from vlmdist.data.questions import Questions, open_questions
from vlmdist.data.remote.cache import RemoteAccess
from vlmdist.data.shards.corpus import Corpus
from vlmdist.errors import UserError


def find_evaluated_corpus(
    sources: Iterable[str], fingerprint: str | None, access: RemoteAccess
) -> tuple[Corpus | Questions | None, list[str]]:
    """The first of the sources with this fingerprint (None: any), and why those before it were passed over."""
    passed_over: list[str] = []
    for source in sources:
        try:
            corpus = open_questions(source, access)
        except UserError as e:
            passed_over.append(str(e))
            continue
        if fingerprint in (None, corpus.fingerprint):
            return corpus, passed_over
        passed_over.append(f"{corpus.name}: is another corpus")
    return None, passed_over

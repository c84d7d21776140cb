"""A SentencePiece BPE vocabulary as a fast tokenizer: for published models whose own tokenizer is Python code.

Gives what ``sentencepiece`` gives, with special tokens cut out first, as transformers' slow tokenizers do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmdist.errors import UserError

_BPE, _CONTROL, _BYTE = 2, 3, 6  # sentencepiece_model.proto: TrainerSpec.ModelType, SentencePiece.Type


def load_fast_tokenizer(source: Path, named_tokens: Mapping[str, str]) -> Any:
    """From tokenizer.model and tokenizer_config.json (added tokens, limits) of a published folder. Raises UserError.

    named_tokens: special tokens by the names of attributes under which a processor asks for them.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    proto = _read_proto(source / "tokenizer.model")
    if proto.trainer_spec.model_type != _BPE or proto.normalizer_spec.remove_extra_whitespaces:
        raise UserError(f"{source / 'tokenizer.model'}: is no BPE vocabulary that keeps spaces as they are")
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    never_merged = {piece.piece for piece in proto.pieces if piece.type in (_CONTROL, _BYTE)}
    unknown, begin, end = (proto.pieces[number].piece for number in range(3))
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            generate_merges(vocabulary, scores, never_merged),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    starts_with_space = proto.normalizer_spec.add_dummy_prefix
    prepend = [normalizers.Prepend("▁")] if starts_with_space else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if starts_with_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    specials = [AddedToken(piece, special=True, normalized=False) for piece in (unknown, begin, end)]
    tokenizer.add_special_tokens(specials)
    config = _read_json(source / "tokenizer_config.json")
    _add_tokens(tokenizer, source, config)
    if config.get("add_bos_token", True):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=begin,
        eos_token=_text(config.get("eos_token")) or end,
        pad_token=_text(config.get("pad_token")) or end,
        model_max_length=int(config.get("model_max_length", 8192)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        extra_special_tokens=dict(named_tokens),
    )


def _read_proto(file: Path) -> Any:
    from google.protobuf.message import DecodeError

    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise UserError(
            "converting this tokenizer needs the package sentencepiece: pip install sentencepiece"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        proto.ParseFromString(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; take the whole folder as published") from None
    except (OSError, DecodeError) as e:
        raise UserError(f"{file}: can't be read: {e}") from None
    return proto


def _add_tokens(tokenizer: Any, source: Path, config: Mapping[str, Any]) -> None:
    """Tokens behind the vocabulary, each at the number that the published folder gives it."""
    from tokenizers import AddedToken

    added = {int(number): token for number, token in config.get("added_tokens_decoder", {}).items()}
    for text, number in _read_json(source / "added_tokens.json").items():
        added.setdefault(number, {"content": text, "special": True})
    for number in sorted(n for n in added if n >= tokenizer.get_vocab_size()):
        token = added[number]
        tokenizer.add_special_tokens([AddedToken(token["content"], special=True, normalized=False)])
        if tokenizer.token_to_id(token["content"]) != number:
            raise UserError(f"{source}: token {token['content']!r} would not get its number {number}")


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: can't be read: {e}") from None
    return found if isinstance(found, dict) else {}

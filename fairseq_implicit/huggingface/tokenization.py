"""Fast tokenizers of transformers for the vocabularies of this package, with the same ids.

Equal are the ids of a text as text, which it is with ``split_special_tokens=True``: by default transformers takes the
text ``<s>``, ``<pad>``, ``</s>``, ``<unk>`` and ``<mask>`` for the symbols. What may differ is written down in
:func:`from_sentence_pieces`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fairseq_implicit.text.sentence_pieces import MODEL_FILE, WORD_START
from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from fairseq_implicit.text.vocabulary import BOS, EOS, MASK, PAD, SPECIAL_SYMBOLS, UNKNOWN, Vocabulary

# A score that no path through pieces of the text has: what has it is in the vocabulary and never matches.
_NEVER = -1e4
_APART = "\ufdd0"  # no character, and in no text
# White space other than the plain space, as Python's str.split has it; the regular expressions here know less.
_OTHER_SPACES = Regex("[\t-\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")


def fast_tokenizer(
    vocabulary: Vocabulary, max_length: int | None = None, segments: bool = False
) -> PreTrainedTokenizerFast:
    """A vocabulary as transformers has it: ``<s> a </s>``, of a pair ``<s> a </s> </s> b </s>``.

    Args:
        vocabulary: its rows are the ids; ``<mask>`` is the one after them where they do not hold it.
        max_length: the model's positions.
        segments: give ``token_type_ids``, 1 from the second ``</s>`` of a pair on.

    Raises:
        ValueError: a kind of vocabulary, or a feature of its model, that has no counterpart there.
    """
    symbols = list(vocabulary.symbols)
    symbols += [MASK] * (MASK not in symbols)
    files = tuple(vocabulary.contents)
    if files not in CONVERSIONS:
        raise ValueError(f"there is no fast tokenizer for a {vocabulary.NAME} ({', '.join(files)})")
    tokenizer = CONVERSIONS[files](symbols, *vocabulary.contents.values())
    # The piece in the place of a mask says whether it begins a word, not the space before it.
    special = [AddedToken(symbol, lstrip=symbol == MASK) for symbol in (*SPECIAL_SYMBOLS, MASK)]
    tokenizer.add_special_tokens(special)
    bos, eos = SPECIAL_SYMBOLS[BOS], SPECIAL_SYMBOLS[EOS]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos}:1 $B:1 {eos}:1",
        special_tokens=[(bos, BOS), (eos, EOS)],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        cls_token=bos,
        eos_token=eos,
        sep_token=eos,
        pad_token=SPECIAL_SYMBOLS[PAD],
        unk_token=SPECIAL_SYMBOLS[UNKNOWN],
        mask_token=MASK,
        model_max_length=max_length,
        model_input_names=inputs if segments else inputs[::2],
        clean_up_tokenization_spaces=False,
    )


def from_sentence_pieces(symbols: list[str], model: bytes) -> Tokenizer:
    """A sentencepiece model, unigram or byte-pair, whose pieces have the ids of their places in ``symbols``.

    Unequal ids come from:

    * Ties. Of two segmentations whose scores differ by less than the rounding of a sum (float32 there, float64 here)
      either may be chosen, as in runs of one mark. Of two equal overlapping pairs of a byte-pair model sentencepiece
      merges the left one, and tokenizers the one with the shorter beginning.
    * Normalisation of letters with many marks, see :func:`_replacements`.
    * The text of a special symbol: under a unigram model with bytes that does not know ``<``, and, where nothing else
      stands beside it, under a byte-pair model with user-defined symbols.

    Raises:
        ValueError: a model of words or characters, or with pieces that the symbols lack; other features that have no
            counterpart.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    proto.ParseFromString(model)
    trainer, piece = proto.trainer_spec, proto.pieces[0] if proto.pieces else proto.SentencePiece()
    if trainer.treat_whitespace_as_suffix:
        raise ValueError("its pieces end in the space that follows a word, and a fast tokenizer's begin with one")
    scores = {each.piece: each.score for each in proto.pieces if each.type == piece.NORMAL}
    defined = [each.piece for each in proto.pieces if each.type == piece.USER_DEFINED]
    if any(each.type == piece.UNUSED for each in proto.pieces):
        raise ValueError("some of its pieces are unused, which a fast tokenizer has no word for")
    if trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise ValueError("it is a model of whole words or of characters: a fast tokenizer has unigram and bpe")
    _check(symbols, scores, defined)
    pairs = trainer.model_type == trainer.BPE
    found = Tokenizer((_byte_pairs if pairs else _unigram)(symbols, scores, defined, trainer.byte_fallback))
    spec = proto.normalizer_spec
    found.normalizer = _normalizer(spec)
    names = _unknown_names(symbols, {*scores, *defined})
    if names and not trainer.byte_fallback:
        found.normalizer = normalizers.Sequence([found.normalizer, normalizers.Replace(Regex(names), _APART)])
    for symbol in defined:
        if found.normalizer.normalize_str(symbol) != symbol:
            raise ValueError(f"its user-defined symbol {symbol!r} is not what text becomes by its own normalisation")
    starts = "first" if spec.add_dummy_prefix else "never"
    # Words can be told apart before the model where no piece reaches into the next.
    split = WORD_START in scores and not any(WORD_START in each[1:] for each in (*scores, *defined))
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Metaspace(WORD_START, starts, split)]
    if not trainer.byte_fallback:
        # What unknown white space cuts is unknown to both sides of it; as bytes it is part of the text.
        steps.append(pre_tokenizers.Split(_OTHER_SPACES, "removed"))
    if defined and pairs:
        steps.append(pre_tokenizers.Split(Regex(_alternatives(defined)), "isolated"))
    found.pre_tokenizer = pre_tokenizers.Sequence(steps)
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(WORD_START, starts, split)])
    return found


def _check(symbols: list[str], scores: Iterable[str], defined: Iterable[str]) -> None:
    """ValueError where a piece has no id, or one of its characters no piece."""
    rows, known = set(symbols), {*scores, *defined}
    if missing := sorted(known - rows):
        raise ValueError(f"{len(missing)} of its pieces are not in dict.txt ({missing[0]!r} is the first)")
    characters = {character for each in scores for character in each}
    if missing := sorted(characters - known):
        raise ValueError(f"{missing[0]!r} is part of its pieces and none of them: unknown text would cost otherwise")


def _unigram(symbols: list[str], scores: Mapping[str, float], defined: Iterable[str], byte_fallback: bool):
    # sentencepiece's own rule, by which a user-defined symbol beats whatever text may be cut into.
    best = max(scores.values())
    known = {**scores, **{each: len(each.encode()) * best - 0.1 for each in defined}}
    return models.Unigram([(each, known.get(each, _NEVER)) for each in symbols], UNKNOWN, byte_fallback)


def _byte_pairs(symbols: list[str], scores: Mapping[str, float], defined: list[str], byte_fallback: bool):
    vocabulary = {each: number for number, each in enumerate(symbols)}
    # Whatever two pieces form a third may merge, the one with the better score first.
    merges = [
        (each[:cut], each[cut:])
        for each in sorted(scores, key=lambda each: -scores[each])
        for cut in range(1, len(each))
        if each[:cut] in scores and each[cut:] in scores
    ]
    unknown = SPECIAL_SYMBOLS[UNKNOWN]
    options = dict(unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)
    model = models.BPE(vocabulary, merges, **options)
    if all(len(each) == 1 for each in defined):
        return model
    # No merges lead to a symbol of several characters: it stands apart and is looked up whole, as is every piece then.
    if any(len(model.tokenize(each)) > 1 for each in scores):
        raise ValueError("it has user-defined symbols, and pieces that its own merges do not form")
    return models.BPE(vocabulary, merges, ignore_merges=True, **options)


def _unknown_names(symbols: Iterable[str], known: set[str]) -> str:
    """Where the text of a row that is none has an unknown character, as a regular expression, or nothing.

    Unknown text costs more than any row, so that no score keeps such a text from being the row. With another unknown
    character in that place it is not, and as unknown as before.
    """
    found = []
    for symbol in symbols:
        unknown = [place for place, character in enumerate(symbol) if character not in known]
        if unknown and symbol not in known:
            parts = symbol[: unknown[0]], symbol[unknown[0]], symbol[unknown[0] + 1 :]
            found.append("(?<={}){}(?={})".format(*map(re.escape, parts)))
    return "|".join(found)


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> normalizers.Normalizer:  # type: ignore[name-defined]
    steps = _replacements(spec.precompiled_charsmap) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        # Where there are word starts the first space stays: after <mask> it tells a word from the rest of one.
        if not spec.add_dummy_prefix:
            steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(rf"[ {WORD_START}]+\z"), ""))
    if spec.add_dummy_prefix:
        # What begins like a word already is text like any other, and begins with a word start of its own.
        begins = WORD_START if spec.remove_extra_whitespaces else f" {WORD_START}"
        steps.append(normalizers.Replace(Regex(rf"\A(?=[{begins}])"), " "))
    return normalizers.Sequence(steps)


def _replacements(table: bytes) -> list[normalizers.Normalizer]:
    """sentencepiece's table of replacements, of which it takes the longest that fits.

    tokenizers takes the shortest that fits a short grapheme, drops the rest of it, and goes by code points in a long
    one. Marks are therefore composed with their letters first, at most three, one at a time and in their order (a table
    knows no other, as NFC does), then kept apart from what they did not form a letter with.
    """
    replacements = normalizers.Precompiled(table)
    if replacements.normalize_str("e\u0301") != "\xe9":
        return [replacements]
    together = normalizers.Replace(_APART, "")
    composed = [normalizers.Replace(Regex(r"(?<=\p{M})(?=\p{M})"), _APART), normalizers.NFC(), together]
    apart = normalizers.Replace(Regex(r"(?<=[^\p{M}])(?=[\p{M}\x{200c}\x{200d}])|(?<=\r)(?=\n)"), _APART)
    return [*composed, *composed, *composed, apart, replacements, together, *composed]


def _alternatives(symbols: Iterable[str]) -> str:
    """A regular expression of any of the symbols, the longest that fits."""
    return "|".join(re.escape(each) for each in sorted(symbols, key=len, reverse=True))


def from_byte_pairs(symbols: list[str], encoder: bytes, merges: bytes) -> Tokenizer:
    """GPT-2's byte pairs, whose symbols are their numbers in ``encoder.json``.

    Raises:
        ValueError: a number that the symbols lack.
    """
    rows = {symbol: number for number, symbol in enumerate(symbols)}
    pieces = json.loads(encoder)
    if missing := [piece for piece, number in pieces.items() if str(number) not in rows]:
        raise ValueError(f"{len(missing)} of its pieces are not in dict.txt ({missing[0]!r} is the first)")
    vocabulary = {piece: rows[str(number)] for piece, number in pieces.items()}
    numbers = {str(number) for number in pieces.values()}
    vocabulary |= {symbol: number for symbol, number in rows.items() if symbol not in numbers}
    lines = merges.decode("utf-8").split("\n")[1:-1]  # a line of the version first
    pairs = [(first, second) for first, second in (line.split() for line in lines)]
    found = Tokenizer(models.BPE(vocabulary, pairs, unk_token=SPECIAL_SYMBOLS[UNKNOWN]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    return found


def from_tokenizer_json(symbols: list[str], content: bytes) -> Tokenizer:
    """A tokenizer of ``tokenizer.json`` with its tokens in the order and its special symbols under the names of rows.

    Raises:
        ValueError: a token that the symbols lack.
    """
    own = TokenizerVocabulary(content)
    rows = {symbol: row for row, symbol in enumerate(symbols)}
    if missing := [symbol for symbol in (*own.symbols[len(SPECIAL_SYMBOLS) :], MASK) if symbol not in rows]:
        raise ValueError(f"{len(missing)} of its tokens are not in dict.txt ({missing[0]!r} is the first)")
    described = json.loads(content)
    model = described["model"]
    renamed = {theirs: ours for ours, theirs in own.special.items()}
    if model["type"] == "Unigram":
        scores = {renamed.get(piece, piece): score for piece, score in model["vocab"]}
        model.update(vocab=[[symbol, scores.get(symbol, _NEVER)] for symbol in symbols], unk_id=UNKNOWN)
    else:
        rows = {own.blanks.get(symbol, symbol): row for symbol, row in rows.items()}
        model.update(vocab=rows, unk_token=SPECIAL_SYMBOLS[UNKNOWN])
    added = [token for token in described["added_tokens"] if token["content"] not in renamed]
    described.update(added_tokens=[{**token, "id": rows[token["content"]]} for token in added], post_processor=None)
    described.update(truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(described))


#: How a vocabulary becomes a tokenizer, by the names of its files: symbols and the files' contents.
CONVERSIONS: dict[tuple[str, ...], Callable[..., Tokenizer]] = {
    (MODEL_FILE,): from_sentence_pieces,
    ("encoder.json", "vocab.bpe"): from_byte_pairs,
    tuple(TokenizerVocabulary.published_names()): from_tokenizer_json,
}

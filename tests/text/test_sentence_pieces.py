"""Lines to ids: the result of the text route, and no line encoded twice without need."""

import random

import numpy as np
import pytest
import sentencepiece

from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.vocabulary import EOS, SPECIAL_SYMBOLS, UNKNOWN


@pytest.fixture(scope="module", params=["nmt_nfkc", "identity"])
def vocabulary(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "spm"
    rng = random.Random(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=("".join(rng.choices("かきくけこ東京都語 ab", k=30)) for _ in range(400)),
        model_prefix=str(path),
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name=request.param,
        num_threads=1,
        minloglevel=2,
    )
    return request.param, SentencePieceVocabulary.open(path.with_suffix(".model"))


def test_white_space_inside_unknown_pieces_is_cut_as_in_the_text_route(vocabulary, monkeypatch):
    rule, vocabulary = vocabulary
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.contents["sentencepiece.bpe.model"])
    index = {symbol: number for number, symbol in enumerate(vocabulary.symbols)}
    rng = random.Random(1)
    lines = [
        "".join(rng.choices("か東語 a☃♜\u3000\u00a0\u0085\t\u2581\u2028\x1c\u200b", k=rng.randrange(12)))
        for _ in range(500)
    ]
    ids, lengths = vocabulary.encode_lines([line.encode() for line in lines])
    for line, found in zip(lines, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        pieces = " ".join(processor.encode(line, out_type=str)).split()
        known = [index.get(piece, UNKNOWN) for piece in pieces]
        assert found.tolist() == [n if n >= len(SPECIAL_SYMBOLS) else UNKNOWN for n in known] + [EOS]
        assert found[:-1].tolist() == vocabulary.encode(line).tolist()

    again = []
    monkeypatch.setattr(SentencePieceVocabulary, "split", lambda self, line, glued=False: again.append(line) or [])
    lines = ["\u3000東京☃", "か\u3000☃語"]
    vocabulary.encode_lines([line.encode() for line in lines])
    assert again == ([] if rule == "nmt_nfkc" else lines)
    for line in lines:
        vocabulary.encode(line)
    assert again == ([] if rule == "nmt_nfkc" else 2 * lines)

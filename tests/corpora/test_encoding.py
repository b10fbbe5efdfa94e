"""Lines to ids: the result of the text route, and no line encoded twice without need."""

import random

import numpy as np
import pytest
import sentencepiece

from fairseq_implicit.corpora.encoding import LineEncoder
from fairseq_implicit.corpora.vocabulary import EOS, SPECIAL_SYMBOLS, UNKNOWN, Vocabulary


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
    return request.param, Vocabulary.from_model(path.with_suffix(".model"))


def test_white_space_inside_unknown_pieces_is_cut_as_in_the_text_route(vocabulary, monkeypatch):
    rule, vocabulary = vocabulary
    encoder = LineEncoder(vocabulary)
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.model)
    index = {symbol: number for number, symbol in enumerate(vocabulary.symbols)}
    rng = random.Random(1)
    lines = ["".join(rng.choices("か東語 a☃♜\u3000\u00a0\u0085\t\u2581", k=rng.randrange(12))) for _ in range(500)]
    ids, lengths = encoder.encode([line.encode() for line in lines])
    for line, found in zip(lines, np.split(ids, np.cumsum(lengths)[:-1]), strict=True):
        pieces = " ".join(processor.encode(line, out_type=str)).split()
        known = [index.get(piece, UNKNOWN) for piece in pieces]
        assert found.tolist() == [n if n >= len(SPECIAL_SYMBOLS) else UNKNOWN for n in known] + [EOS]

    again = []
    monkeypatch.setattr(LineEncoder, "_encode_as_text", lambda self, line: again.append(line) or np.zeros(0, ids.dtype))
    encoder.encode(["\u3000東京☃".encode(), "か\u3000☃語".encode()])
    assert len(again) == (0 if rule == "nmt_nfkc" else 2)

"""Fast tokenizers: the ids of the vocabularies that they are made of, for whatever text."""

import io
import json
import random

import pytest
import sentencepiece
from transformers import AutoTokenizer

from fairseq_implicit.corpora.tokenizer_training import PRESETS
from fairseq_implicit.data.byte_pairs import BytePairVocabulary
from fairseq_implicit.huggingface.tokenization import fast_tokenizer
from fairseq_implicit.text.sentence_pieces import SentencePieceVocabulary
from fairseq_implicit.text.tokenizer_json import TokenizerVocabulary
from fairseq_implicit.text.vocabulary import MASK
from tests.huggingface.compare_tokenizers import Comparison
from tests.models.test_public_weights import MERGES, bytes_to_unicode
from tests.text.test_seam import WhiteSpaceWords
from tests.text.test_tokenizer_json import KINDS as KINDS_OF_JSON

WORDS = "The field of a solver is smooth (or not): 12.5 £ – it integrates <unk> tokens; "
WORDS += "東京は 猫である。 がぎぐ naïve Ångström"
KINDS = {
    "unigram": {"model_type": "unigram"},
    "bpe": {"model_type": "bpe"},
    "albert": PRESETS["albert-30k"].options,
    "bytes": PRESETS["bpe-32k"].options,
    "symbols": {"model_type": "bpe", "user_defined_symbols": ["<sep>", "–"]},
    "spaces": {"model_type": "unigram", "remove_extra_whitespaces": False},
    "glued": {"model_type": "unigram", "add_dummy_prefix": False, "split_by_whitespace": False},
}
TEXTS = [
    "",
    " ",
    "The solver  integrates   a field. ",
    "<unk> <s></s>\t<pad> <mask> madeupword0000 <0x41>",
    "東京は\u3000猫である。☃♜ 👩\u200d👧 ❤️",
    "ﾊﾟｶﾞ ① ﬁeld ™ Ａ\u00a0Ｂ",  # NFKC
    "か\u3099き\u3099 nai\u0308ve A\u030angstro\u0308m E\u0323\u0302 N\u0355\u0360e",  # marks of their own
    "\u2581 a\u2581b \u2581",
    "a\x00b\x07\x1cc\u2028d\u0085\u200be",
    "smooth" * 500,
    "–<sep>(–)<sep>",
    "line\none \n",
]


def trained(**options):
    """A vocabulary of some two hundred pieces."""
    rng, model = random.Random(0), io.BytesIO()
    lines = (" ".join(rng.choices(WORDS.split(), k=9)) for _ in range(300))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, num_threads=1, minloglevel=2, hard_vocab_limit=False,
        **{"vocab_size": 420 if options.get("byte_fallback") else 180, **options},
    )  # fmt: skip
    return SentencePieceVocabulary(model.getvalue())


@pytest.fixture(scope="module", params=KINDS)
def comparison(request):
    return Comparison(trained(**KINDS[request.param]))


def test_ids_are_equal(comparison):
    rng = random.Random(1)
    alphabet = [*"aeilnst .,()12–東京猫かが☃\u3099\u0308\t\n\r\u3000\u2581\u200d", "<unk>", "<sep>", "The", "  "]
    lines = [*TEXTS, *("".join(rng.choices(alphabet, k=rng.randrange(1, 15))) for _ in range(300))]
    tokens, unequal = comparison.of(lines)
    assert tokens > 2500
    assert [line for line, reason, _, _ in unequal if reason != "tie"] == [] and len(unequal) < 5


def test_masks_keep_their_neighbours(comparison):
    """What follows a mask without a space goes on with its word, as in the hub's ``masked_ids``."""
    vocabulary, tokenizer = comparison.vocabulary, fast_tokenizer(comparison.vocabulary)
    for left, right in (("The ", " of a solver"), ("", "ly smooth"), ("a field ", ""), ("東", "猫である")):
        inner = [
            *vocabulary.encode(left.rstrip()),
            len(vocabulary.symbols),
            *vocabulary.encode(right, right[:1] != " "),
        ]
        assert tokenizer(left + MASK + right)["input_ids"] == [0, *map(int, inner), 2]


def test_text_comes_back(comparison):
    tokenizer = fast_tokenizer(comparison.vocabulary)
    for text in ("The solver integrates a field.", "東京は 猫である。"):
        back = tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
        assert back == (text if back[0] == text[0] else text.lower())


def test_symbols_pairs_words_and_files(tmp_path):
    vocabulary = trained()
    made = fast_tokenizer(vocabulary, max_length=12)
    made.save_pretrained(tmp_path)
    for tokenizer in (made, AutoTokenizer.from_pretrained(tmp_path)):
        ids = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        assert ids == (0, 1, 2, 3) and tokenizer.mask_token_id == len(vocabulary.symbols) == len(tokenizer) - 1
        assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == [*vocabulary.symbols, MASK]
        one, other = (vocabulary.encode(text).tolist() for text in ("The field", "is smooth"))
        pair = tokenizer("The field", "is smooth")
        assert pair["input_ids"] == [0, *one, 2, 2, *other, 2] and "token_type_ids" not in pair
        batch = tokenizer(["The field", "a"], padding=True)
        assert batch["input_ids"][1][-1] == 1 and batch["attention_mask"][1][-1] == 0
        assert tokenizer.model_max_length == 12
        assert len(tokenizer("smooth field " * 9, truncation=True)["input_ids"]) == 12
        words = tokenizer("The solver integrates").word_ids()
        assert words[0] is words[-1] is None and sorted({*words[1:-1]}) == [0, 1, 2]
    segments = fast_tokenizer(vocabulary, segments=True)("The field", "is smooth")["token_type_ids"]
    assert segments == [0] * (len(one) + 2) + [1] * (len(other) + 2)
    again = AutoTokenizer.from_pretrained(tmp_path)("<s> The").input_ids
    assert again.count(0) == 2, "by default the text of a symbol is the symbol"


def test_the_order_of_dict_txt_is_followed():
    own = trained()
    symbols = [*own.symbols[:4], *reversed(own.symbols[4:]), MASK]
    vocabulary = SentencePieceVocabulary(*own.contents.values(), symbols=symbols)
    comparison = Comparison(vocabulary)
    assert comparison.of(TEXTS[:3])[1] == [] and comparison.tokenizer.mask_token_id == len(symbols) - 1
    assert vocabulary.encode("The field").tolist() != own.encode("The field").tolist()


def test_byte_pairs_of_gpt2():
    pieces = list(bytes_to_unicode().values()) + [merge.replace(" ", "") for merge in MERGES]
    encoder = json.dumps({piece: number for number, piece in enumerate(pieces)}).encode()
    merges = "\n".join(["#version: 0.2", *MERGES, ""]).encode()
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, reversed(range(len(pieces)))), "madeupword0000"]
    vocabulary = BytePairVocabulary(encoder, merges, symbols=symbols)
    tokenizer = fast_tokenizer(vocabulary)
    tokenizer.split_special_tokens = True
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == vocabulary.encode(text).tolist() and tokenizer.decode(ids) == text
    with pytest.raises(ValueError, match="1 of its pieces are not in dict.txt"):
        fast_tokenizer(BytePairVocabulary(encoder, merges, symbols=symbols[:4] + symbols[5:]))


@pytest.mark.parametrize("kind", KINDS_OF_JSON)
def test_tokenizer_json_in_the_order_of_rows(kind):
    vocabulary = TokenizerVocabulary(KINDS_OF_JSON[kind]().to_str().encode())
    symbols = [*vocabulary.symbols, "madeupword0000", MASK]
    vocabulary = TokenizerVocabulary(*vocabulary.contents.values(), symbols=symbols)
    tokenizer = fast_tokenizer(vocabulary)
    names = [vocabulary.blanks.get(symbol, symbol) for symbol in symbols]
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == names
    for text in ("the field is smooth", "unseen ☃ WORDS, zq", "def  f():\n    x     y"):
        ids = vocabulary.encode(text).tolist()
        assert tokenizer(text)["input_ids"] == [0, *ids, 2]
    after = vocabulary.encode("ly smooth", glued=True).tolist()
    assert tokenizer(f"the {MASK}ly smooth")["input_ids"] == [0, *vocabulary.encode("the"), len(symbols) - 1, *after, 2]
    with pytest.raises(ValueError, match="1 of its tokens are not in dict.txt"):
        fast_tokenizer(TokenizerVocabulary(*vocabulary.contents.values(), symbols=symbols[:5] + symbols[6:]))


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"model_type": "word", "vocab_size": 20}, "a model of whole words or of characters"),
        ({"treat_whitespace_as_suffix": True}, "its pieces end in the space"),
        ({"user_defined_symbols": ["①"]}, "its user-defined symbol '①' is not what text becomes"),
    ],
)
def test_what_has_no_counterpart_is_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fast_tokenizer(trained(**options))


def test_other_kinds_and_dictionaries_are_refused():
    with pytest.raises(ValueError, match=r"no fast tokenizer for a list of words \(words.lst\)"):
        fast_tokenizer(WhiteSpaceWords(b"the field"))
    own = trained()
    with pytest.raises(ValueError, match="1 of its pieces are not in dict.txt"):
        fast_tokenizer(SentencePieceVocabulary(*own.contents.values(), symbols=own.symbols[:4] + own.symbols[5:]))

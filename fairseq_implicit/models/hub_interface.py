"""A trained model behind RoBERTa's hub interface, for every kind of vocabulary."""

import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

import torch
from fairseq import checkpoint_utils, hub_utils, utils
from fairseq.models.roberta import RobertaHubInterface
from fairseq.tasks.sentence_prediction import SentencePredictionTask
from torch import LongTensor, Tensor
from torch.nn import functional

from fairseq_implicit.data.byte_pairs import TOKENIZERS
from fairseq_implicit.data.pairs import shorten_segments
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.text.vocabulary import MASK, Vocabulary

#: The files of each ``--bpe`` under the names that models are published with, by fairseq's flag.
FILES = {bpe: kind.FILES for bpe, kind in TOKENIZERS.items()}

#: Where a folder's checkpoint is looked for when none is named, in this order.
CHECKPOINTS = ("checkpoint_best.pt", "model.pt", "checkpoint_last.pt")


class FilledMask(NamedTuple):
    """One candidate for a mask: the whole sentence, its probability, and the piece put in (with its leading space)."""

    sentence: str
    probability: float
    token: str


class ImplicitBertHubInterface(RobertaHubInterface):
    """encode, decode, extract_features, fill_mask, register_classification_head, predict.

    Every method takes one sentence or a batch. Features and predictions are ``(batch, time, dim)`` and
    ``(batch, classes)``; shorter members of a batch are padded.
    """

    def __init__(self, cfg, task, model):
        super().__init__(cfg, task, model)
        kind = TOKENIZERS[cfg.bpe._name]
        self.vocabulary: Vocabulary = kind.open(
            *(cfg.bpe[flag] for flag in kind.FILES), symbols=self.dictionary.symbols
        )

    @property
    def dictionary(self):
        """The fairseq dictionary, ``<mask>`` included."""
        return self.task.source_dictionary

    def ids(self, text: str, glued: bool = False) -> List[int]:
        """Ids of raw text without special symbols; ``glued`` text continues the word before it."""
        return self.vocabulary.encode(text, glued).tolist()

    def room(self, segments: int = 1, no_separator: bool = False) -> int:
        """Tokens of text that fit into the model's positions beside the special symbols of so many segments."""
        return self.model.max_positions() - 2 * segments + (segments - 1 if no_separator else 0)

    def encode(
        self,
        sentence: Union[str, Sequence[str]],
        *addl_sentences: str,
        no_separator: bool = False,
        shorten: bool = False,
    ) -> LongTensor:
        """Ids ``<s> a </s>``, of a pair ``<s> a </s> </s> b </s>``.

        Args:
            sentence: a sentence, or a list of them.
            addl_sentences: further segments of the same input.
            no_separator: one ``</s>`` between segments instead of two.
            shorten: cut segments that together exceed the model's positions, longest first
                (:func:`~fairseq_implicit.data.pairs.shorten_segments`); otherwise the model refuses them.

        Returns:
            ``(time,)``, or ``(batch, time)`` right-padded for a list.
        """
        if not isinstance(sentence, str):
            return self._pad([self.encode(member, shorten=shorten) for member in sentence])
        segments = [self.ids(segment) for segment in (sentence, *addl_sentences)]
        if shorten:
            segments = shorten_segments(segments, self.room(len(segments), no_separator))
        eos = self.dictionary.eos()
        ids = [self.dictionary.bos()]
        for number, segment in enumerate(segments):
            ids += [*([eos] if number and not no_separator else []), *segment, eos]
        return torch.tensor(ids, dtype=torch.long)

    def _pad(self, members: List[Tensor]) -> LongTensor:
        if not members:
            raise ValueError("an empty list of sentences: there is nothing to encode")
        return torch.nn.utils.rnn.pad_sequence(members, batch_first=True, padding_value=self.dictionary.pad())

    def decode(self, tokens: Tensor) -> Union[str, List]:
        """The text of ids ``(time,)``; a list of texts for several segments, and for a batch ``(batch, time)``."""
        if tokens.dim() == 2:
            return [self.decode(row) for row in tokens]
        segments: List[List[int]] = [[]]
        for index in tokens.tolist():
            if index == self.dictionary.eos():
                segments.append([])
            elif index not in (self.dictionary.bos(), self.dictionary.pad()):
                segments[-1].append(index)
        texts = [self.vocabulary.decode(segment) for segment in segments if segment]
        return texts[0] if len(texts) == 1 else texts or ""

    def fill_mask(
        self, masked_input: Union[str, Sequence[str]], topk: int = 5
    ) -> Union[List[FilledMask], List[List[FilledMask]]]:
        """Candidates for the one ``<mask>`` of a sentence, the most probable first; of a list, a list each.

        A fine-tuned model still has the head of pretraining, above features that have moved on since.

        Raises:
            ValueError: a sentence without exactly one ``<mask>``, or more candidates than symbols.
            ArithmeticError: the model's output is not finite.
        """
        if isinstance(masked_input, str):
            return self.fill_mask([masked_input], topk)[0]
        if not 1 <= topk <= len(self.dictionary):
            raise ValueError(f"topk={topk} must lie between 1 and the dictionary's {len(self.dictionary):,} symbols")
        ids = self._pad([self.masked_ids(sentence) for sentence in masked_input])
        masked = ids.eq(self.dictionary.index(MASK)).to(self.device)
        with torch.no_grad(), utils.model_eval(self.model):
            logits, _ = self.model(ids.to(self.device), masked_tokens=masked)
        if not logits.isfinite().all():
            raise ArithmeticError(
                "the model's output is not finite: its weights hold NaN or infinity, or overflow in this precision"
            )
        probabilities, indices = logits.float().softmax(dim=-1).topk(topk, dim=-1)
        return [
            [
                self.filled(sentence, self.dictionary[index], probability)
                for probability, index in zip(row_probabilities, row_indices, strict=True)
            ]
            for sentence, row_probabilities, row_indices in zip(
                masked_input, probabilities.tolist(), indices.tolist(), strict=True
            )
        ]

    @staticmethod
    def _split(sentence: str) -> Tuple[str, str]:
        parts = sentence.split("<mask>")
        if len(parts) != 2:
            raise ValueError(f"{sentence!r} has {len(parts) - 1} <mask> tokens: fill_mask needs exactly one")
        return parts[0], parts[1]

    def masked_ids(self, sentence: str) -> LongTensor:
        """Ids ``(time,)`` of a sentence with one ``<mask>``; what follows the mask without a space stays glued to it.

        Raises:
            ValueError: not exactly one ``<mask>``.
        """
        left, right = self._split(sentence)
        glued = bool(right) and not right[0].isspace()
        ids = [self.dictionary.bos(), *self.ids(left.rstrip()), self.dictionary.index(MASK)]
        return torch.tensor([*ids, *self.ids(right, glued), self.dictionary.eos()], dtype=torch.long)

    def filled(self, sentence: str, piece: str, probability: float) -> FilledMask:
        """A sentence with one ``<mask>`` and a piece of the dictionary in its place.

        The piece itself says whether it starts a word, whatever stood before the mask.
        """
        left, right = self._split(sentence)
        token = self.vocabulary.surface(piece)
        return FilledMask((left.rstrip() + token + right).strip(), probability, token)

    def extract_features(
        self, tokens: Tensor, return_all_hiddens: bool = False, return_lambdas: bool = False
    ) -> Union[Tensor, List[Tensor], Tuple[Union[Tensor, List[Tensor]], List[Tensor]]]:
        """Features ``(batch, time, dim)`` of ids ``(time,)`` or ``(batch, time)``, or the states along the depth.

        With ``return_lambdas`` in a pair with what the lambda layers made of each whole input: content lambdas
        ``(batch, key, value)``, of every block at the state before it, of a continuous depth at the states of its
        trajectory, of an equilibrium there.

        Raises:
            ValueError: the input is longer than the model's positions, or lambdas are asked of a model without.
        """
        if tokens.shape[-1] > self.model.max_positions():
            raise ValueError(
                f"an input of {tokens.shape[-1]} tokens is longer than the model's {self.model.max_positions()} "
                "positions: split the text, or cut it with encode(..., shorten=True)"
            )
        batch = tokens.unsqueeze(0) if tokens.dim() == 1 else tokens
        features, extra = self.model(
            batch.to(self.device),
            features_only=True,
            return_all_hiddens=return_all_hiddens,
            return_lambdas=return_lambdas,
        )
        found = extra["output"].hidden_states if return_all_hiddens else features
        return (found, extra["lambdas"]) if return_lambdas else found

    def predict(self, head: str, tokens: Tensor, return_logits: bool = False) -> Tensor:
        """What a classification head says of ids ``(time,)`` or ``(batch, time)``.

        Returns:
            ``(batch, classes)`` log-probabilities; the plain outputs ``(batch, outputs)`` with ``return_logits``, and
            always for scores, that is for a head of one output and for the head of a checkpoint that was fine-tuned
            with ``--regression-target``.

        Raises:
            ValueError: the model has no such head, or the input is longer than its positions.
        """
        if head not in self.model.classification_heads:
            known = ", ".join(self.model.classification_heads) or "none"
            raise ValueError(f"the model has no classification head {head!r} (it has: {known})")
        outputs = super().predict(head, tokens, return_logits=True)
        if return_logits or outputs.shape[-1] == 1 or self._gives_scores(head):
            return outputs
        return functional.log_softmax(outputs, dim=-1)

    def _gives_scores(self, head: str) -> bool:
        if not isinstance(self.task, SentencePredictionTask):
            return False
        return self.task.cfg.regression_target and self.task.cfg.classification_head_name == head


class VocabularyFiles(NamedTuple):
    """What a checkpoint needs besides its weights."""

    folder: str  # of dict.txt, or of input0/dict.txt
    bpe: str  # fairseq's name of the tokenizer
    files: Dict[str, str]  # its files, by fairseq's flag


def load_hub_interface(
    family: Type[ImplicitBertModel],
    folder: str,
    checkpoint_file: Optional[str],
    data: Optional[str],
    bpe: Optional[str],
    overrides: Dict[str, Any],
) -> ImplicitBertHubInterface:
    """See :meth:`ImplicitBertModel.from_pretrained`."""
    path = find_checkpoint(folder, checkpoint_file)
    flags = {flag for files in FILES.values() for flag in files}
    named = {flag: overrides[flag] for flag in flags.intersection(overrides)}
    vocabulary = find_vocabulary(path, data, bpe, named)
    loaded = hub_utils.from_pretrained(
        os.path.dirname(os.path.abspath(path)),
        os.path.basename(path),
        vocabulary.folder,
        bpe=vocabulary.bpe,
        load_checkpoint_heads=True,
        **{**overrides, **vocabulary.files},
    )
    model = loaded["models"][0]
    if not isinstance(model, family):
        raise ValueError(_other_family(path, type(model)))
    return ImplicitBertHubInterface(loaded["args"], loaded["task"], model).eval()


def _other_family(path: str, found: type) -> str:
    """Why a checkpoint is not opened by the class that was asked, and what opens it."""
    if not issubclass(found, ImplicitBertModel):
        return f"{path} holds fairseq's {found.__name__}: make it an ode_bert with fairseq-implicit convert"
    # A preset is made from its family's class.
    right = next(base for base in found.__mro__ if ImplicitBertModel in base.__bases__)
    return (
        f"{path} holds the model {found.__name__}: open it with {right.__name__}.from_pretrained, or with "
        "ImplicitBertModel.from_pretrained, which opens every family"
    )


def find_checkpoint(folder: str, name: Optional[str] = None) -> str:
    """The checkpoint of a folder: the one named, or the first of :data:`CHECKPOINTS`.

    Raises:
        FileNotFoundError: there is none.
    """
    names = CHECKPOINTS if name is None else (name,)
    found = next((path for path in (os.path.join(folder, name) for name in names) if os.path.isfile(path)), None)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint {' or '.join(names)} in {folder}")
    return found


def find_vocabulary(
    checkpoint: str, data: Optional[str] = None, bpe: Optional[str] = None, named: Optional[Dict[str, str]] = None
) -> VocabularyFiles:
    """The dictionary and the tokenizer of a checkpoint.

    Args:
        checkpoint: its path. They are looked for in ``data``, beside it, then in the data folder that it names.
        data: folder of the dictionary.
        bpe: a name of :data:`FILES`; by default the first whose files are found.
        named: files by fairseq's flags (``sentencepiece_model``, ``hf_tokenizer``, …), which are
            then not looked for.

    Raises:
        FileNotFoundError: one of them is nowhere.
        ValueError: another ``bpe``, or files of another one.
    """
    if bpe is not None and bpe not in FILES:
        raise ValueError(f"bpe={bpe!r} is not supported: choose {' or '.join(FILES)}")
    named = named or {}
    kinds = [kind for kind in ([bpe] if bpe else FILES) if named.keys() <= FILES[kind].keys()]
    if not kinds:
        raise ValueError(f"{', '.join(sorted(named))} are not the files of one tokenizer: {FILES}")
    folders = [os.path.dirname(checkpoint) or os.curdir]
    if data is not None:
        folders.insert(0, data)
    found = _find(folders, kinds, named)
    if not all(found):
        folders += _recorded_data_folders(checkpoint)
        found = _find(folders, kinds, named)
    dictionary, tokenizer = found
    files = " or ".join(" and ".join(FILES[kind].values()) for kind in kinds)
    for what, where in (("dictionary (dict.txt)", dictionary), (f"tokenizer ({files})", tokenizer)):
        if where is None:
            raise FileNotFoundError(
                f"no {what} in {', '.join(folders)}: copy it beside the checkpoint or name its folder as "
                "data_name_or_path"
            )
    return VocabularyFiles(os.path.abspath(dictionary), *tokenizer)


def _find(folders: Sequence[str], kinds: Sequence[str], named: Dict[str, str]):
    """The first folder with a dictionary, and the first kind of tokenizer with its files (one folder has them all)."""
    dictionary = next(
        (
            folder
            for folder in folders
            if any(os.path.isfile(os.path.join(folder, *parts)) for parts in (("dict.txt",), ("input0", "dict.txt")))
        ),
        None,
    )
    for kind in kinds:
        for folder in folders:
            files = {flag: os.path.join(folder, file) for flag, file in FILES[kind].items()}
            files = {flag: os.path.abspath(path) for flag, path in {**files, **named}.items()}
            if all(map(os.path.isfile, files.values())):
                return dictionary, (kind, files)
    return dictionary, None


def _recorded_data_folders(path: str) -> List[str]:
    """The data folders that a checkpoint was trained on."""
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    recorded = (state.get("cfg") or {}).get("task") or {}
    return [folder for folder in str(recorded.get("data") or "").split(os.pathsep) if folder]

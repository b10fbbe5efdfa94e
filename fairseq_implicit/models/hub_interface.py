"""A trained model behind RoBERTa's hub interface, for sentencepiece vocabularies."""

import logging
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import sentencepiece
import torch
from fairseq import checkpoint_utils, hub_utils, utils
from fairseq.models.roberta import RobertaHubInterface
from torch import LongTensor, Tensor

logger = logging.getLogger(__name__)

MODEL_FILE = "sentencepiece.bpe.model"
WORD_START = "\u2581"


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
        self.processor: sentencepiece.SentencePieceProcessor = self.bpe.sp
        self._glued_processor: Optional[sentencepiece.SentencePieceProcessor] = None

    @property
    def dictionary(self):
        """The fairseq dictionary, ``<mask>`` included."""
        return self.task.source_dictionary

    def _ids(self, text: str, glued: bool = False) -> List[int]:
        """Ids of raw text without special symbols; ``glued`` text continues the word before it."""
        processor = self._glued if glued else self.processor
        # fairseq's text format splits at any white space, so a piece such as U+0085 never reached the training data.
        pieces = " ".join(processor.encode(text, out_type=str)).split()
        # Text that merely looks like <s> or <pad> is text.
        found = (self.dictionary.index(piece) for piece in pieces)
        return [index if index >= self.dictionary.nspecial else self.dictionary.unk() for index in found]

    @property
    def _glued(self) -> sentencepiece.SentencePieceProcessor:
        """The same model without the word start that sentencepiece puts before every text."""
        if self._glued_processor is None:
            from sentencepiece import sentencepiece_model_pb2

            proto = sentencepiece_model_pb2.ModelProto()
            proto.ParseFromString(self.processor.serialized_model_proto())
            proto.normalizer_spec.add_dummy_prefix = False
            self._glued_processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        return self._glued_processor

    def encode(
        self, sentence: Union[str, Sequence[str]], *addl_sentences: str, no_separator: bool = False
    ) -> LongTensor:
        """Ids ``<s> a </s>``, of a pair ``<s> a </s> </s> b </s>``.

        Args:
            sentence: a sentence, or a list of them.
            addl_sentences: further segments of the same input.
            no_separator: one ``</s>`` between segments instead of two.

        Returns:
            ``(time,)``, or ``(batch, time)`` right-padded for a list.
        """
        if not isinstance(sentence, str):
            return self._pad([self.encode(member) for member in sentence])
        ids = [self.dictionary.bos(), *self._ids(sentence), self.dictionary.eos()]
        for segment in addl_sentences:
            if not no_separator:
                ids.append(self.dictionary.eos())
            ids += [*self._ids(segment), self.dictionary.eos()]
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
        texts = [
            "".join(self.dictionary[index] for index in segment).replace(WORD_START, " ").strip()
            for segment in segments
            if segment
        ]
        return texts[0] if len(texts) == 1 else texts or ""

    def fill_mask(
        self, masked_input: Union[str, Sequence[str]], topk: int = 5
    ) -> Union[List[FilledMask], List[List[FilledMask]]]:
        """Candidates for the one ``<mask>`` of a sentence, the most probable first; of a list, a list each.

        Raises:
            ValueError: a sentence without exactly one ``<mask>``.
        """
        if isinstance(masked_input, str):
            return self.fill_mask([masked_input], topk)[0]
        spans = [self._split(sentence) for sentence in masked_input]
        ids = self._pad([self._masked_ids(left, right) for left, right in spans])
        masked = ids.eq(self.task.mask_idx).to(self.device)
        with torch.no_grad(), utils.model_eval(self.model):
            logits, _ = self.model(ids.to(self.device), masked_tokens=masked)
        probabilities, indices = logits.float().softmax(dim=-1).topk(topk, dim=-1)
        return [
            [
                self._filled(left, right, self.dictionary[index], probability)
                for probability, index in zip(row_probabilities, row_indices)
            ]
            for (left, right), row_probabilities, row_indices in zip(spans, probabilities.tolist(), indices.tolist())
        ]

    @staticmethod
    def _split(sentence: str) -> Tuple[str, str]:
        parts = sentence.split("<mask>")
        if len(parts) != 2:
            raise ValueError(f"{sentence!r} has {len(parts) - 1} <mask> tokens: fill_mask needs exactly one")
        return parts[0], parts[1]

    def _masked_ids(self, left: str, right: str) -> LongTensor:
        glued = bool(right) and not right[0].isspace()
        ids = [self.dictionary.bos(), *self._ids(left.rstrip()), self.task.mask_idx]
        return torch.tensor([*ids, *self._ids(right, glued), self.dictionary.eos()], dtype=torch.long)

    @staticmethod
    def _filled(left: str, right: str, piece: str, probability: float) -> FilledMask:
        # The piece itself says whether it starts a word, whatever stood before the mask.
        token = piece.replace(WORD_START, " ")
        return FilledMask((left.rstrip() + token + right).strip(), probability, token)


def load_hub_interface(
    folder: str, checkpoint_file: str, data: Optional[str], overrides: Dict[str, Any]
) -> ImplicitBertHubInterface:
    """See :meth:`ImplicitBertModel.from_pretrained`."""
    path = os.path.join(folder, checkpoint_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    candidates = [folder] if data is None else [data, folder]
    if not all(_find(candidates)):
        candidates += _recorded_data_folders(path)
    dictionary_folder, model = _find(candidates)
    for what, found in (("dictionary (dict.txt)", dictionary_folder), (f"sentencepiece model ({MODEL_FILE})", model)):
        if found is None:
            raise FileNotFoundError(
                f"no {what} in {', '.join(candidates)}: copy it beside the checkpoint or name its folder as "
                "data_name_or_path"
            )
    loaded = hub_utils.from_pretrained(
        folder,
        checkpoint_file,
        os.path.abspath(dictionary_folder),
        bpe="sentencepiece",
        sentencepiece_model=os.path.abspath(model),
        load_checkpoint_heads=True,
        **overrides,
    )
    return ImplicitBertHubInterface(loaded["args"], loaded["task"], loaded["models"][0]).eval()


def _find(folders: Sequence[str]) -> Tuple[Optional[str], Optional[str]]:
    """The first folder with a dictionary and the first sentencepiece model."""
    dictionary = next(
        (
            folder
            for folder in folders
            if any(os.path.isfile(os.path.join(folder, *parts)) for parts in (("dict.txt",), ("input0", "dict.txt")))
        ),
        None,
    )
    models = (os.path.join(folder, MODEL_FILE) for folder in folders)
    return dictionary, next((model for model in models if os.path.isfile(model)), None)


def _recorded_data_folders(path: str) -> List[str]:
    """The data folders that a checkpoint was trained on, as far as they still exist."""
    state = checkpoint_utils.load_checkpoint_to_cpu(path)
    recorded = (state.get("cfg") or {}).get("task") or {}
    return [folder for folder in str(recorded.get("data") or "").split(os.pathsep) if os.path.isdir(folder)]

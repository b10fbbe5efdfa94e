"""Pretraining on binarised text, without loss of a token."""

import functools
import hashlib
import logging
import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, List, Optional

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.criterions.masked_lm import MaskedLmLoss
from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from fairseq_implicit.compat.training import ComparesCheckpoints
from fairseq_implicit.criterions.implicit_masked_lm import DEPTH_LOSS, ImplicitMaskedLMCriterion
from fairseq_implicit.data import data_bin
from fairseq_implicit.data.batches import Collater
from fairseq_implicit.data.blocks import BREAK_MODES, Blocks, cut_blocks
from fairseq_implicit.data.datasets import BlockDataset, InferenceDataset
from fairseq_implicit.data.dictionary import VocabularyDictionary
from fairseq_implicit.data.objectives import OBJECTIVES
from fairseq_implicit.data.objectives.objective import MaskRates, Objective
from fairseq_implicit.models.bert import ImplicitBertModel
from fairseq_implicit.tasks.progress import Progress
from fairseq_implicit.text import VOCABULARIES, kind_of_file, vocabulary_beside
from fairseq_implicit.text.vocabulary import MASK

logger = logging.getLogger(__name__)


#: Seed of the masks of every split but training.
EVALUATION_SEED = 1


@dataclass
class ImplicitMaskedLMConfig(FairseqDataclass):
    data: str = field(
        default=MISSING,
        metadata={"help": "data folder, or several joined by ':' of which each epoch takes the next as training set"},
    )
    sample_break_mode: ChoiceEnum(list(BREAK_MODES)) = field(
        default="none",
        metadata={
            "help": "none: full blocks of --tokens-per-sample tokens; complete: whole lines, as many as fit; "
            "complete_doc: the same within one document (blank line = border); eos: one line per block. Lines longer "
            "than a block are cut, never dropped"
        },
    )
    tokens_per_sample: int = field(
        default=512, metadata={"help": "longest sequence, with the <s> before each block of text"}
    )
    objective: Optional[str] = field(
        default=None,
        metadata={
            "help": f"what is to be predicted: {', '.join(OBJECTIVES)} (default: masked-tokens). masked-words selects "
            "whole words (from one sentencepiece '▁' to the next), and spans of 1 to 4 pieces where the text has no "
            "word spaces; masked-spans selects such spans everywhere"
        },
    )
    mask_prob: float = field(default=0.15, metadata={"help": "share of the tokens (or words, or spans) to predict"})
    valid_mask_prob: Optional[float] = field(
        default=None,
        metadata={
            "help": "the same in validation and test (default: --mask-prob). Their masks do not "
            "depend on --seed, so that losses of several seeds compare"
        },
    )
    valid_depths: Optional[List[int]] = field(
        default=None,
        metadata={
            "help": "such as 1,2,4,8: validation also logs the loss at each of these depths, as loss_depth_4: steps of "
            "an ode_bert (through one block of the size --ode-time / --ode-steps, so that more are more time; through "
            "blocks of their own, or where --ode-random-steps trains it, more and smaller ones) or neural_ode_bert, "
            "evaluations of a deq_bert"
        },
    )
    leave_unmasked_prob: float = field(
        default=0.1, metadata={"help": "share of the tokens to predict that stay visible"}
    )
    random_token_prob: float = field(
        default=0.1, metadata={"help": "share of the tokens to predict that become a random token"}
    )
    mask_whole_words: bool = field(default=False, metadata={"help": "the same as --objective masked-words"})
    pad_to_multiple: int = field(
        default=1, metadata={"help": "pad the length of a batch to a multiple of this (8 suits tensor cores)"}
    )
    persistent_workers: bool = field(
        default=False, metadata={"help": "keep the worker processes that load data alive between epochs"}
    )
    peak_tflops: Optional[float] = field(
        default=None,
        metadata={
            "help": "peak of one device in the training's precision, 10^12 operations per second, of which the logged "
            "mfu is the share in percent (default: that of matrix products, measured for a second at the start)"
        },
    )
    seed: int = II("common.seed")


@register_task("implicit_masked_lm", dataclass=ImplicitMaskedLMConfig)
class ImplicitMaskedLMTask(ComparesCheckpoints, FairseqTask):
    """Predicts what an objective hides; reads folders of ``fairseq-preprocess``, and makes them from raw text."""

    cfg: ImplicitMaskedLMConfig

    def __init__(self, cfg: ImplicitMaskedLMConfig, dictionary: Dictionary):
        super().__init__(cfg)
        if cfg.tokens_per_sample < 2:
            raise ValueError(
                f"--tokens-per-sample must be at least 2 (<s> and one token), not {cfg.tokens_per_sample}."
            )
        if cfg.peak_tflops is not None and not 0.0 < cfg.peak_tflops < math.inf:
            raise ValueError(f"--peak-tflops must be a positive number, not {cfg.peak_tflops}.")
        depths = cfg.valid_depths or []
        if any(depth < 1 for depth in depths) or len(set(depths)) < len(depths):
            raise ValueError(f"--valid-depths {_listed(depths)}: give each depth, at least 1, once.")
        self.progress = Progress(cfg.peak_tflops)
        self.dictionary = dictionary
        self.mask_idx = dictionary.add_symbol(MASK)
        rates = MaskRates(cfg.mask_prob, cfg.leave_unmasked_prob, cfg.random_token_prob)
        self.objective = self.evaluation_objective = self._objective(rates)
        if cfg.valid_mask_prob is not None:
            if not 0.0 < cfg.valid_mask_prob < 1.0:
                raise ValueError(f"--valid-mask-prob must lie between 0 and 1, not {cfg.valid_mask_prob}.")
            self.evaluation_objective = self._objective(replace(rates, probability=cfg.valid_mask_prob))

    def _objective(self, rates: MaskRates) -> Objective:
        name = self.cfg.objective or ("masked-words" if self.cfg.mask_whole_words else "masked-tokens")
        if self.cfg.mask_whole_words and name != "masked-words":
            raise ValueError(f"--mask-whole-words is --objective masked-words, not {name}: leave one of them out.")
        if name not in OBJECTIVES:
            raise ValueError(f"--objective {name} is unknown: choose one of {', '.join(OBJECTIVES)}.")
        try:
            return OBJECTIVES[name](self.dictionary.symbols, lambda symbol: self._surface(symbol), rates)
        except ValueError as error:
            raise ValueError(f"{self._objective_flag}: {error}") from None

    @property
    def _objective_flag(self) -> str:
        return f"--objective {self.cfg.objective}" if self.cfg.objective else "--mask-whole-words"

    @functools.cached_property
    def _surface(self) -> Callable[[str], str]:
        """The text that a symbol stands for. Most objectives never ask, so that no tokenizer is opened."""
        return data_bin.surface_of_symbols(data_bin.data_folders(self.cfg.data)[0])

    @classmethod
    def setup_task(cls, cfg: ImplicitMaskedLMConfig, **kwargs) -> "ImplicitMaskedLMTask":
        dictionary = data_bin.load_dictionary(data_bin.data_folders(cfg.data))
        logger.info(f"dictionary: {len(dictionary)} types, and {MASK}")
        return cls(cfg, dictionary)

    @classmethod
    def load_dictionary(cls, filename: str) -> Dictionary:
        """Dictionary of ``fairseq-preprocess --srcdict``: a ``dict.txt``, or what reads raw text.

        Args:
            filename: a sentencepiece ``.model``, a ``tokenizer.json`` or the folder of one, or a ``dict.txt``.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged or holds what ``dict.txt`` cannot.
        """
        try:
            if os.path.isdir(filename):
                vocabulary = vocabulary_beside(filename)
                if vocabulary is None:
                    names = " or ".join(" and ".join(kind.published_names()) for kind in VOCABULARIES.values())
                    raise FileNotFoundError(f"{filename}: the folder holds no {names}.")
                return VocabularyDictionary(vocabulary)
            if kind := kind_of_file(filename):
                return VocabularyDictionary(kind.open(filename))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"--srcdict {error}") from None
        if not os.path.isfile(filename):
            raise FileNotFoundError(
                f"--srcdict {filename}: there is no such dict.txt, sentencepiece .model or tokenizer.json."
            )
        return Dictionary.load(filename)

    @classmethod
    def build_dictionary(cls, filenames, **kwargs) -> Dictionary:
        """Refuses to count words: the vocabulary is the sentencepiece model's.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "--task implicit_masked_lm needs --srcdict: a sentencepiece .model, which then reads raw text, or a "
            "dict.txt for text that is already split into pieces."
        )

    def build_criterion(self, cfg, from_checkpoint: bool = False) -> FairseqCriterion:
        """Refuses criterions whose loss is no loss of a masked token.

        fairseq's default, ``cross_entropy``, divides by all tokens of a batch: the loss looks wonderful.

        Raises:
            ValueError: it does not divide by the number of masked tokens.
        """
        criterion = super().build_criterion(cfg, from_checkpoint)
        if self.cfg.valid_depths and not isinstance(criterion, ImplicitMaskedLMCriterion):
            raise ValueError(
                f"--valid-depths {_listed(self.cfg.valid_depths)} logs nothing with --criterion {cfg._name}: pass "
                "--criterion implicit_masked_lm."
            )
        if not isinstance(criterion, (ImplicitMaskedLMCriterion, MaskedLmLoss)):
            raise ValueError(
                f"--criterion {cfg._name} does not divide by the masked tokens, so that its loss would mean nothing "
                "here: pass --criterion implicit_masked_lm."
            )
        return criterion

    def build_model(self, cfg, from_checkpoint: bool = False):
        """Refuses depths of ``--valid-depths`` that the model cannot have, before it trains.

        Raises:
            ValueError: naming the first one and the flag that stands in its way.
        """
        model = super().build_model(cfg, from_checkpoint)
        for depth in self.cfg.valid_depths or []:
            if not isinstance(model, ImplicitBertModel):
                raise ValueError(f"--valid-depths {depth}: a {type(model).__name__} has one depth only; leave it out.")
            try:
                with model.args.flags.naming():
                    model.encoder.depth.config_at(depth)
            except ValueError as error:
                raise ValueError(f"--valid-depths {depth}: {error}") from None
        return model

    def valid_step(self, sample, model, criterion):
        loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        for depth in self.cfg.valid_depths or []:
            with torch.no_grad(), model.encoder.depth.at(depth):
                logging_output[f"{DEPTH_LOSS}{depth}"] = criterion(model, sample)[2]["loss"]
        return loss, sample_size, logging_output

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> BlockDataset:
        """Loads a split; the training split of epoch ``e`` comes from folder ``(e - 1) mod folders``.

        Raises:
            FileNotFoundError, ValueError: the split is missing, truncated or empty.
        """
        folders = data_bin.data_folders(self.cfg.data)
        folder = folders[(epoch - 1) % len(folders)]
        files = data_bin.open_split(folder, split, combine)
        indices = []
        for file in files:
            index = cut_blocks(file.line_lengths, self.cfg.tokens_per_sample - 1, str(self.cfg.sample_break_mode))
            index.check_conservation(file.prefix)
            indices.append(index)
        if sum(len(index) for index in indices) == 0:
            raise ValueError(f"{files[0].prefix}.bin holds blank lines only: the text that it was made from is empty.")
        training = split.startswith("train")
        blocks = Blocks(files, indices, self.dictionary.symbols)
        objective = self.objective if training else self.evaluation_objective
        for remark in objective.remarks(blocks.drawn()):
            logger.warning(f"{self._objective_flag}: in {files[0].prefix}.bin {remark}")
        self.datasets[split] = BlockDataset(
            blocks,
            objective,
            Collater(self.cfg.pad_to_multiple, self.cfg.tokens_per_sample),
            seed=self.cfg.seed if training else EVALUATION_SEED,
            fixed=not training,
            share_epoch=self.cfg.persistent_workers,
        )
        return self.datasets[split]

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False):
        """Never drops a block: fairseq would skip over-long ones in training with one line in the log.

        Raises:
            ValueError: blocks are longer than the model or ``--max-tokens`` allows.
        """
        kept, dropped = dataset.filter_indices_by_size(indices, max_positions)
        if len(dropped):
            raise ValueError(
                f"{len(dropped):,} of {len(indices):,} blocks are longer than the {max_positions} tokens that the "
                "model's --max-positions or --max-tokens allows: lower --tokens-per-sample "
                f"{self.cfg.tokens_per_sample}."
            )
        return kept

    def build_dataset_for_inference(
        self, src_tokens: List[torch.Tensor], src_lengths: List[int], sort: bool = True, **kwargs
    ) -> InferenceDataset:
        """Sequences with ``</s>`` and without ``<s>``, as the dictionary encodes lines.

        Raises:
            ValueError: one is too long.
        """
        longest = max((len(sequence) + 1 for sequence in src_tokens), default=0)
        if longest > self.cfg.tokens_per_sample:
            raise ValueError(
                f"a sequence has {longest} tokens with <s>, the model was trained with {self.cfg.tokens_per_sample}: "
                "split the text."
            )
        return InferenceDataset(src_tokens, sort=sort)

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary

    def max_positions(self) -> int:
        return self.cfg.tokens_per_sample

    def begin_epoch(self, epoch: int, model) -> None:
        model.set_epoch(epoch)
        self.progress.begin(model)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        if update_num == 0:
            self.progress.tokens = 0
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion: FairseqCriterion) -> None:
        super().reduce_metrics(logging_outputs, criterion)
        if criterion.training:
            self.progress.log(logging_outputs)

    def state_dict(self) -> Dict[str, Any]:
        """What is compared when a checkpoint is opened to validate it or to use it: a digest of the dictionary."""
        return {"dictionary": self._dictionary_digest()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Compares; checkpoints of earlier versions say nothing.

        Raises:
            ValueError: the checkpoint was trained with another dictionary.
        """
        if "dictionary" in state:
            self.set_checkpoint_dict(state)

    def get_checkpoint_dict(self) -> Dict[str, Any]:
        """What a checkpoint says of the data: a digest of the dictionary, and how many tokens it has seen."""
        return {type(self).__name__: {"dictionary": self._dictionary_digest(), "tokens": self.progress.tokens}}

    def set_checkpoint_dict(self, state: Dict[str, Any]) -> None:
        """Compares the dictionary of a checkpoint that training starts from with that of the data, and goes on counting
        tokens.

        Raises:
            ValueError: they differ.
        """
        if state["dictionary"] != self._dictionary_digest():
            raise ValueError(
                f"the checkpoint was trained with another dictionary than {self.cfg.data}/dict.txt: give the folder "
                "that it was trained on, or one that was binarised with the same --srcdict."
            )
        self.progress.tokens = state.get("tokens")  # checkpoints of earlier versions do not say

    def _dictionary_digest(self) -> str:
        return hashlib.sha256("\n".join(self.dictionary.symbols).encode("utf-8")).hexdigest()


def _listed(numbers: List[int]) -> str:
    return ",".join(map(str, numbers))

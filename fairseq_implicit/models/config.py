"""What fairseq adds to the options of every family."""

from dataclasses import dataclass, field

from fairseq.dataclass import FairseqDataclass

from fairseq_implicit.families.bert import BertOptions


@dataclass
class ImplicitBertConfig(BertOptions, FairseqDataclass):
    """The options of a family as flags. Choices are plain strings, checked by ``check``, so that a model pickles."""

    load_checkpoint_heads: bool = field(
        default=False, metadata={"help": "(re-)register and load the classification heads found in checkpoints"}
    )

    compile_blocks: bool = field(
        default=False,
        metadata={
            "help": "train with torch.compile of what each block integrates (of an equilibrium: its cell): for GPUs; "
            "on a CPU it gains nothing (0.97 to 1.08 of the speed) and takes some ten seconds at the start"
        },
    )

    save_on_signal: bool = field(
        default=False,
        metadata={
            "help": "SIGTERM and SIGUSR1 save a checkpoint after the running update and end the training with exit "
            "status 143 and 138; a second signal ends it at once"
        },
    )

"""What a model must beat: the entropy of single tokens in a data folder of fairseq-preprocess, in nats per token.

    fairseq-implicit entropy DATA [--loss-bits VALIDATION_LOSS_AS_FAIRSEQ_LOGS_IT]

* unigram: cross entropy of the validation tokens under the frequencies of the training tokens. A masked-language model
  that ignores the context reaches exactly this loss, and training sits on it for a while before it learns to read.
* bigram: the same when the token before is known (interpolated Kneser-Ney, one discount).

`</s>` is left out, as it is never masked. fairseq logs losses in bits (base 2); one bit is ln 2 = 0.693 nats.
"""

import argparse
import math
import sys

from fairseq_implicit.evaluation.entropies import folder_entropies


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="folder of fairseq-preprocess")
    parser.add_argument("--loss-bits", type=float, metavar="LOSS", help="validation loss in bits, to compare with")


def run(arguments: argparse.Namespace) -> None:
    reference = folder_entropies(arguments.data)
    lines = [
        f"  unigram entropy   {reference.unigram:6.3f} nats per token: what a model without context reaches",
        f"  bigram entropy    {reference.bigram:6.3f} nats per token: with the token before known",
    ]
    if arguments.loss_bits is not None:
        loss = arguments.loss_bits * math.log(2)
        bits = f"fairseq logs {arguments.loss_bits:.3f} bits"
        difference = reference.unigram - loss
        below = "below" if difference > 0 else "ABOVE"
        lines = [
            f"  validation loss   {loss:6.3f} nats per masked token ({bits})",
            *lines,
            f"  the model is {abs(difference):.3f} nats {below} the unigram entropy",
        ]
    sys.stdout.write("\n".join(lines) + "\n")

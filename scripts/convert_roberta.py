"""Convert a fairseq RoBERTa checkpoint to ode_bert: python scripts/convert_roberta.py INPUT OUTPUT

The hub interface and fine-tuning also need the dictionary and the tokenizer beside OUTPUT: dict.txt and, for the public
weights, GPT-2's encoder.json and vocab.bpe (for a sentencepiece vocabulary sentencepiece.bpe.model).
"""

import argparse
import logging
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

logger = logging.getLogger("convert_roberta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="checkpoint of fairseq's roberta")
    parser.add_argument("output", help="file to write; must not exist")
    arguments = parser.parse_args()
    if not os.path.isfile(arguments.input):
        parser.error(f"there is no checkpoint {arguments.input}")
    if os.path.exists(arguments.output):
        parser.error(f"{arguments.output} exists: remove it or choose another name")

    from fairseq import checkpoint_utils

    from fairseq_implicit.models.roberta import checkpoint_from_roberta
    from scripts import validation

    try:
        converted = checkpoint_from_roberta(checkpoint_utils.load_checkpoint_to_cpu(arguments.input))
    except (ValueError, KeyError) as error:
        sys.exit(f"{arguments.input}: {error}")
    try:
        validation.write(converted, arguments.output)
    except OSError as error:
        sys.exit(str(error))
    logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()

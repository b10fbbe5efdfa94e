"""``python -m fairseq_implicit`` writes the folder to pass as ``--user-dir``."""

import os
import sys

import fairseq_implicit

sys.stdout.write(os.path.dirname(os.path.abspath(fairseq_implicit.__file__)) + "\n")

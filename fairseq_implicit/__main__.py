"""``python -m fairseq_implicit NAME …`` is ``fairseq-implicit NAME …``."""

from fairseq_implicit.commands import command_line

if __name__ == "__main__":
    command_line()

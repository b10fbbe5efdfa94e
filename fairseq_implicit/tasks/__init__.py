"""fairseq tasks. Importing this package registers them, and with them the rest of the package."""

import fairseq_implicit
from fairseq_implicit.tasks import implicit_masked_lm  # noqa: F401

fairseq_implicit.register()

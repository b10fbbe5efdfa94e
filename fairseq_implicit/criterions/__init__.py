"""fairseq criterions. Importing this package registers them, and with them the rest of the package."""

import fairseq_implicit
from fairseq_implicit.criterions import depth_losses, implicit_masked_lm  # noqa: F401

depth_losses.register()
fairseq_implicit.register()

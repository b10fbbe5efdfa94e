from tests.models.conftest import task, tokens  # noqa: F401

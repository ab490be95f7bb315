import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def nano():
    """The embedded model, loaded once."""
    import turbo_nb

    return turbo_nb.load_pipeline("nano", device="cpu")

"""The toy model, made once."""

import pytest

from tests.toy import Toy


@pytest.fixture(scope="session")
def toy() -> Toy:
    return Toy()

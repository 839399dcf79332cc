import pytest
from chat_model import nano_with_template
from running_server import running_server


@pytest.fixture(scope="session")
def nano():
    return nano_with_template()


@pytest.fixture(scope="session")
def server(nano):
    with running_server(nano, max_queue=32) as running:
        yield running

"What several files of tests are given."
import pytest


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    "The digits as class folders, written once for all tests of this process; no test changes them."
    from deep_studio_nb.data.digits import write_digits
    return write_digits(tmp_path_factory.mktemp('data')/'digits')

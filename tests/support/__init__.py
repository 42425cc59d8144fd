"""Models, rows, runs and processes that tests of several files share."""

import pytest

pytest.register_assert_rewrite("support.documents", "support.runs", "support.torchrun", "support.waiting")

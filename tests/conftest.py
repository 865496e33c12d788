"""Settings of the whole suite: no network, and one thread, whatever started it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

settings.register_profile(
    "gtflops", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("gtflops")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

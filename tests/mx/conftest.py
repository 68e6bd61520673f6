import pytest
import torch

from harness.models.gamerft import GameRFTConfig, GameRFTCore


@pytest.fixture
def core() -> GameRFTCore:
    """A BF16 GameRFT of three layers with D = 64."""
    torch.manual_seed(0)
    config = GameRFTConfig(n_layers=3, n_heads=2, d_model=64, channels=4, sample_size=2, tokens_per_frame=4, n_frames=8)
    return GameRFTCore(config).to(torch.bfloat16).eval()

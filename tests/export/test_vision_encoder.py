"""Each rewrite of the vision encoder computes what transformers' module computes, within fp32 rounding."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import NO_TORCH

torch = pytest.importorskip("torch", reason=NO_TORCH)
pytest.importorskip("transformers", reason=NO_TORCH)
from transformers.models.florence2.modeling_florence2 import Florence2VisionChannelAttention  # noqa: E402

from export.graphs import vision_encoder  # noqa: E402
from tests import checkpoints  # noqa: E402

CONFIGS = {"tiny": checkpoints.tiny_config, "odd": checkpoints.odd_config}


@pytest.fixture(scope="module", params=list(CONFIGS))
def tower(request: pytest.FixtureRequest) -> Any:
    """The vision tower of a model with random weights, and its image size."""
    config = CONFIGS[request.param]()
    model = checkpoints.build_model(config)
    return model.model.vision_tower, checkpoints.image_size(config)


def stages(tower: Any) -> list[tuple[int, Any, Any, int]]:
    """Index, spatial block, channel block and side of the token grid of every stage."""
    model, side = tower
    sides = [side // 4, side // 8, side // 16, side // 32]
    return [(i, blocks[0].spatial_block, blocks[0].channel_block, sides[i]) for i, blocks in enumerate(model.blocks)]


def assert_close(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def random_tokens(side: int, channels: int) -> Any:
    generator = torch.Generator().manual_seed(side)
    return torch.randn(2, side * side, channels, generator=generator) + 0.3  # LayerNorm's bias shifts real ones too


@torch.inference_mode()
def test_a_depthwise_convolution_takes_its_residual(tower: Any) -> None:
    for _, spatial, _, side in stages(tower):
        grid = random_tokens(side, spatial.conv1.weight.shape[0]).transpose(1, 2).unflatten(2, (side, side))
        before = spatial.conv1.weight.clone()
        assert_close(vision_encoder.with_residual(spatial.conv1)(grid), grid + spatial.conv1(grid))
        assert torch.equal(spatial.conv1.weight, before), "the checkpoint keeps its weights"


@torch.inference_mode()
def test_a_scale_goes_into_weight_and_bias(tower: Any) -> None:
    for _, spatial, _, side in stages(tower):
        linear = spatial.window_attn.proj
        states = random_tokens(side, linear.weight.shape[1])
        assert_close(vision_encoder.with_scale(linear.weight, linear.bias, 0.25)(states), 0.25 * linear(states))


@torch.inference_mode()
def test_windows_are_sorted_while_heads_are_split(tower: Any) -> None:
    for _, spatial, _, side in stages(tower):
        attention = spatial.window_attn
        states = random_tokens(side, attention.proj.weight.shape[0])
        found = vision_encoder.WindowAttention(attention, (side, side))(states)
        assert_close(found, attention(states.unflatten(1, (side, side))).reshape(states.shape))


@pytest.mark.parametrize(
    "form",
    ["ChannelAttention", "DirectChannelAttention", "SharedChannelAttention", "SharedDirectChannelAttention"],
)
@torch.inference_mode()
def test_channel_attention_in_either_form(tower: Any, form: str) -> None:
    for _, _, channel, side in stages(tower):
        attention = channel.channel_attn
        states = random_tokens(side, attention.proj.weight.shape[0])
        assert_close(getattr(vision_encoder, form)(attention, side * side)(states), attention(states))


def test_the_cheaper_form_is_taken(tower: Any) -> None:
    for _, _, channel, _ in stages(tower):
        channels = channel.channel_attn.proj.weight.shape[0]
        few = vision_encoder.channel_attention(channel.channel_attn, channels // 2)
        many = vision_encoder.channel_attention(channel.channel_attn, channels * 4)
        assert isinstance(few, vision_encoder.DirectChannelAttention) and isinstance(
            many, vision_encoder.ChannelAttention
        )


@torch.inference_mode()
def test_sums_over_all_tokens_of_a_full_size_image_fit_into_fp16() -> None:
    """Florence-2-base's first stage has 192 x 192 normalised tokens, whose `x'x` exceeds 65504."""
    torch.manual_seed(0)
    config = checkpoints.full_size_config("base").vision_config
    config._attn_implementation = "eager"
    attention = Florence2VisionChannelAttention(config, 0)
    states = 1.5 * random_tokens(192, 128)[:1]
    assert (states.transpose(1, 2) @ states).max() > 65504
    rewritten = vision_encoder.ChannelAttention(attention, 192**2)
    expected = rewritten(states)
    assert_close(expected, attention(states))
    found = rewritten.half()(states.half()).float()
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()

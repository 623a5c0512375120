"""common/latents.py against the stock pipelines."""

from operator import itemgetter
from types import SimpleNamespace as FrozenConfig

from common.latents import (
    TensorCache,
    decode_images,
    decode_latents,
    encode_images,
    encode_moments,
    image_ids,
    mean_latents,
    pack_latents,
    sample_latents,
    to_image,
    unpack_latents,
)

import pytest
import tiny_backbones
import torch
from accelerate import Accelerator
from diffusers import FluxFillPipeline, FluxPipeline

from train_influxedit import pack_fill_condition
from train_omini import select_tokens


SIZES = [(8, 8), (12, 8), (8, 20)]  # in latents


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_packing_and_ids_are_the_pipelines(height, width):
    latents = torch.randn(3, 16, height, width)
    packed = pack_latents(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 3, 16, height, width))
    assert torch.equal(unpack_latents(packed, height, width), latents)
    assert torch.equal(
        unpack_latents(packed, height, width), FluxPipeline._unpack_latents(packed, 8 * height, 8 * width, 8)
    )
    ids = FluxPipeline._prepare_latent_image_ids(3, height // 2, width // 2, None, torch.float32)
    assert torch.equal(image_ids(height, width), ids)
    assert image_ids(height, width).shape == packed.shape[1:2] + (3,)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_fill_channels_are_the_pipelines(tiny, height, width):
    pipeline = FluxFillPipeline(**tiny.components_but_image())
    image = torch.rand(2, 3, 8 * height, 8 * width) * 2 - 1
    mask = (torch.rand(2, 1, 8 * height, 8 * width) > 0.5).float()
    masked_image = image * (1 - mask)
    with torch.no_grad():
        mask_tokens, image_tokens = pipeline.prepare_mask_latents(
            mask, masked_image, 2, 16, 1, 8 * height, 8 * width, torch.float32, "cpu", torch.Generator().manual_seed(0)
        )
    latents = sample_latents(
        encode_moments(pipeline.vae, masked_image), pipeline.vae.config, torch.Generator().manual_seed(0)
    )
    ours = pack_fill_condition(latents, mask)
    assert ours.shape[-1] == 320  # 64 of the masked image, 256 of the mask; the noisy latents make it 384
    torch.testing.assert_close(ours, torch.cat([image_tokens, mask_tokens], dim=-1), atol=1e-5, rtol=0)


def test_moments_do_not_depend_on_the_batch(tiny):
    images = torch.rand(3, 3, 64, 48) * 2 - 1
    together = encode_moments(tiny.vae, images)
    alone = torch.cat([encode_moments(tiny.vae, image[None]) for image in images])
    assert torch.equal(together, alone)


def test_latents_are_normalised_and_decoded_back(tiny):
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    moments = encode_moments(tiny.vae, images)
    latents = sample_latents(moments, tiny.vae.config, torch.Generator().manual_seed(3))
    again = sample_latents(moments, tiny.vae.config, torch.Generator().manual_seed(3))
    other = sample_latents(moments, tiny.vae.config, torch.Generator().manual_seed(4))
    assert torch.equal(latents, again)
    assert not torch.equal(latents, other)
    with torch.no_grad():
        distribution = tiny.vae.encode(images).latent_dist
        raw = distribution.sample(torch.Generator().manual_seed(3))
        expected = (raw - tiny.vae.config.shift_factor) * tiny.vae.config.scaling_factor
        torch.testing.assert_close(latents, expected)
        torch.testing.assert_close(decode_latents(tiny.vae, latents), tiny.vae.decode(raw).sample)


def test_mean_latents_are_samples_without_variance():
    mean = torch.randn(2, 4, 3, 3)
    config = FrozenConfig(shift_factor=0.1, scaling_factor=0.4)
    moments = torch.cat([mean, torch.full_like(mean, -1e9)], dim=1)
    assert torch.allclose(mean_latents(moments, config), sample_latents(moments, config), atol=1e-5)


def test_selected_tokens_keep_their_order_and_padding_is_marked():
    tokens, ids = torch.arange(8.0).view(2, 4, 1), torch.arange(12.0).view(4, 3)
    keep = torch.tensor([[False, True, True, False], [False, False, True, False]])
    chosen, places, valid = select_tokens(tokens, ids, keep)
    assert chosen[0, :, 0].tolist() == [1, 2]
    assert chosen[1, 0, 0] == 6
    assert torch.equal(places[0], ids[1:3])
    assert valid.tolist() == [[True, True], [True, False]]
    assert select_tokens(tokens, ids, torch.ones(2, 4, dtype=torch.bool))[2] is None


@pytest.mark.parametrize(
    "kind",
    [
        *("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC"),
        *("AutoencoderKLQwenImage", "AutoencoderKLQwenImage21"),
    ],
)
def test_images_become_the_latents_of_each_familys_pipeline(kind):
    pipelines = {"AutoencoderKL": tiny_backbones.sd3, "AutoencoderDC": tiny_backbones.sana}
    pipelines["AutoencoderKLFlux2"] = tiny_backbones.flux2_klein
    pipelines["AutoencoderKLQwenImage21"] = tiny_backbones.qwenimage21
    pipeline = pipelines.get(kind, tiny_backbones.qwenimage)()
    vae = pipeline.vae
    assert type(vae).__name__ == kind
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = encode_images(vae, images)
    seen = []
    original = vae.decode
    vae.decode = lambda latents, *args, **kwargs: seen.append(latents) or original(latents, *args, **kwargs)
    decoded = decode_images(vae, latents)
    opaque = torch.cat([images, torch.ones(2, 1, 64, 64)], dim=1) if kind.endswith("21") else images
    raw = vae.encode(opaque.unsqueeze(2)) if "Qwen" in kind else vae.encode(images)
    raw = raw.latent if "DC" in kind else raw.latent_dist.mode()
    torch.testing.assert_close(seen[0], raw, atol=1e-4, rtol=1e-4)  # what the decoder gets is what the encoder gave
    assert decoded.shape == images.shape
    if "Qwen" in kind:
        if kind == "AutoencoderKLQwenImage":
            pipeline = tiny_backbones.qwenimage(edit=True)
            pipeline.vae = vae
        theirs = pipeline._encode_vae_image(opaque.unsqueeze(2), None)
        torch.testing.assert_close(latents, theirs[:, :, 0], atol=1e-4, rtol=1e-4)
    elif "Flux2" in kind:
        theirs = pipeline._unpatchify_latents(pipeline._encode_vae_image(images, None))
        torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=1e-4)
    else:
        shift = vae.config.shift_factor if kind == "AutoencoderKL" else 0
        torch.testing.assert_close(latents, (raw - shift) * vae.config.scaling_factor, atol=1e-4, rtol=1e-4)


def test_the_tensor_cache_keeps_what_it_has(tmp_path):
    accelerator, calls = Accelerator(cpu=True), []

    def encode(numbers):
        calls.extend(numbers)
        return [{"a": torch.full((2,), float(number)), "b": torch.arange(3)[1:]} for number in numbers]

    cache = TensorCache(tmp_path, ["a model"])
    cache.fill(accelerator, [("picture", 1), ("picture", 2)], itemgetter(1), encode, "Encoding")
    cache.fill(accelerator, [("picture", 2), ("picture", 3)], itemgetter(1), encode, "Encoding")
    assert calls == [1, 2, 3]
    assert torch.equal(TensorCache(tmp_path, ["a model"]).load("picture", 3)["a"], torch.tensor([3.0, 3.0]))
    assert not TensorCache(tmp_path, ["another model"]).path("picture", 3).exists()


def test_a_cache_whose_folder_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file" / "cache", ["a model"])
    with pytest.raises(SystemExit, match=r"cache.*cannot be written \(Not a directory\)"):
        cache.fill(Accelerator(cpu=True), [("picture",)], str, lambda keys: [{"a": torch.ones(2)}], "Encoding")


def test_pixels_to_an_image():
    pixels = torch.tensor([-1.2, -1.0, 0.0, 1.0]).repeat(1, 3, 2, 1)
    assert [to_image(pixels).getpixel((x, 1)) for x in range(4)] == [(v, v, v) for v in (0, 0, 128, 255)]

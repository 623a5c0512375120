"""Pixels to VAE latents to packed tokens and back, position ids, and the cache of what encoders made."""

import hashlib
import json
from pathlib import Path

from common.checkpoints import atomic_write

import numpy as np
import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderDC, AutoencoderKLQwenImage, FluxPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm


PATCH = 16  # pixels per token of FLUX.1


@torch.no_grad()
def encode_moments(vae, pixel_values):
    """The VAE posterior of images [B, 3, H, W] in [-1, 1]: mean and log-variance [B, 2C, H/f, W/f], float32.

    Images go through the VAE one at a time: batched convolutions round differently, and a latent must not depend
    on whether it was cached or on what else was in its batch.
    """
    images = pixel_values.to(vae.device, vae.dtype).split(1)
    return torch.cat([vae.encode(image).latent_dist.parameters for image in images]).float()


def sample_latents(moments, vae_config, generator=None):
    """Latents [B, C, h, w], normalised as the transformer expects them, drawn from posteriors [B, 2C, h, w]."""
    latents = DiagonalGaussianDistribution(moments).sample(generator)
    return (latents - vae_config.shift_factor) * vae_config.scaling_factor


def mean_latents(moments, vae_config):
    """The means [B, C, h, w] of posteriors [B, 2C, h, w], normalised as by `sample_latents`, without its chance."""
    return (moments.chunk(2, dim=1)[0] - vae_config.shift_factor) * vae_config.scaling_factor


def decode_latents(vae, latents):
    """Images [B, 3, H, W] in about [-1, 1] from normalised latents [B, C, h, w]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype)).sample


def latent_statistics(vae):
    """(shift, scale) that normalise a VAE's latents, (latents - shift) * scale: numbers, or tensors [C, 1, 1]."""
    if isinstance(vae, AutoencoderKLQwenImage):
        mean, std = vae.config.latents_mean, vae.config.latents_std
        return tuple(torch.tensor(value, device=vae.device).view(-1, 1, 1) for value in (mean, [1 / s for s in std]))
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


@torch.no_grad()
def encode_images(vae, pixel_values):
    """Normalised latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1]: the mean of the posterior.

    For AutoencoderKL (FLUX.1, SD3), AutoencoderDC (Sana) and AutoencoderKLQwenImage; one image at a time, as above.
    """
    latents = []
    for image in pixel_values.to(vae.device, vae.dtype).split(1):
        if isinstance(vae, AutoencoderKLQwenImage):  # to which an image is a video of one frame
            latents.append(vae.encode(image.unsqueeze(2)).latent_dist.mode().squeeze(2))
        else:
            encoded = vae.encode(image)
            latents.append(encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latent_dist.mode())
    shift, scale = latent_statistics(vae)
    return (torch.cat(latents).float() - shift) * scale


@torch.no_grad()
def decode_images(vae, latents):
    """Images [B, 3, H, W] in about [-1, 1] from what `encode_images` returns."""
    shift, scale = latent_statistics(vae)
    latents = (latents / scale + shift).to(vae.dtype)
    if isinstance(vae, AutoencoderKLQwenImage):
        return vae.decode(latents.unsqueeze(2)).sample.squeeze(2)
    return vae.decode(latents).sample


def pack_latents(latents):
    """[B, C, h, w] to tokens [B, h/2 * w/2, 4C], each a 2 x 2 patch."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack_latents(packed, height, width):
    """Tokens [B, h/2 * w/2, 4C] to [B, C, h, w], where `height` and `width` are h and w in latents."""
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


def image_ids(height, width, device=None):
    """Position ids [h/2 * w/2, 3] of packed latents: (0, row, column)."""
    return FluxPipeline._prepare_latent_image_ids(None, height // 2, width // 2, device, torch.float32)


def to_tensor(image):
    """An RGB picture as [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_image(pixels):
    """A PIL image of pixels [1, 3, H, W] in about [-1, 1]."""
    pixels = ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def cache_moments(accelerator, vae, keys, load_pixels, folder=None):
    """The VAE posterior of every picture of a run: {key: `encode_moments` of load_pixels(key), on the CPU}.

    `load_pixels` returns an image [3, H, W] in [-1, 1]. The processes share the work; each returns all. With `folder`,
    posteriors are kept there for later runs, by the pixels and the VAE they were made of.
    """
    model = fingerprint(vae) if folder else b""

    def moments(key):
        pixels = load_pixels(key)
        key = model + str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes() if folder else b""
        return disk_cached(folder, key, lambda: encode_moments(vae, pixels[None])[0].cpu())

    with accelerator.split_between_processes(list(keys)) as share:
        progress_bar = tqdm(share, desc="Caching latents", unit="image", disable=not accelerator.is_main_process)
        found = [(key, moments(key)) for key in progress_bar]
    return dict(gather_object(found))


def disk_cached(folder, key, compute):
    """The tensor that `compute` returns, kept in `folder` (None: nowhere) under the SHA-256 of `key` (bytes).

    A file is whole or absent, also if the process is killed; one that the disk damaged is written anew. Whatever the
    tensor depends on belongs in the key.
    """
    if folder is None:
        return compute()
    path = Path(folder) / f"{hashlib.sha256(key).hexdigest()}.safetensors"
    if not is_whole(path):
        value = compute().contiguous()
        with atomic_write(path) as partial:
            save_file({"value": value}, partial)
    return load_file(path)["value"]


class TensorCache:
    """What text encoder and VAE made of prompts and pictures: files in a folder, which a later run finds again.

    A file is named by what was encoded, `what` (JSON), and by `about` (JSON), which is all else that goes into it.
    """

    def __init__(self, folder, about):
        self.folder, self.about = Path(folder), about

    def path(self, *what):
        digest = hashlib.sha256(json.dumps([self.about, what]).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"

    def load(self, *what):
        """{name: tensor}."""
        return load_file(self.path(*what))

    def fill(self, accelerator, items, encode, desc):
        """Writes encode(*what), {name: tensor}, of each `what` in `items` that is missing; the processes share it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [what for what in items if not is_whole(self.path(*what))]
        accelerator.wait_for_everyone()
        with accelerator.split_between_processes(missing) as share:
            for what in tqdm(share, desc=desc, disable=not accelerator.is_main_process or not missing):
                tensors = {name: value.cpu().contiguous() for name, value in encode(*what).items()}
                with atomic_write(self.path(*what)) as partial:
                    save_file(tensors, partial)
        accelerator.wait_for_everyone()


def is_whole(path):
    """Whether a safetensors file is there and as long as its header says: a crash of the machine can leave it cut."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def fingerprint(model):
    """Bytes that tell models apart: a hash of names, shapes, dtypes and 256 values of each of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()[:: max(1, tensor.numel() // 256)][:256].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes())
    return digest.digest()

"""Pixels to VAE latents to packed tokens and back, position ids, and the cache of what encoders made."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoints import atomic_write
from common.data import map_ahead
from common.models import gather_objects

import torch
from accelerate import Accelerator
from diffusers import AutoencoderDC, AutoencoderKLQwenImage, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm


PATCH = 16  # pixels per token of FLUX.1

Vae = Any  # an AutoencoderKL unless a function says which others; diffusers' own hints miss what these return


@torch.no_grad()
def encode_moments(vae: Vae, pixel_values: Tensor) -> Tensor:
    """The VAE posterior of images [B, 3, H, W] in [-1, 1]: mean and log-variance [B, 2C, H/f, W/f], float32.

    Images go through the VAE one at a time: batched convolutions round differently, and a latent must not depend
    on whether it was cached or on what else was in its batch.
    """
    images = pixel_values.to(vae.device, vae.dtype).split(1)
    return torch.cat([vae.encode(image).latent_dist.parameters for image in images]).float()


def sample_latents(moments: Tensor, vae_config: Any, generator: torch.Generator | None = None) -> Tensor:
    """Latents [B, C, h, w] sampled from posteriors [B, 2C, h, w], normalised as the transformer expects them."""
    latents = DiagonalGaussianDistribution(moments).sample(generator)
    return (latents - vae_config.shift_factor) * vae_config.scaling_factor


def mean_latents(moments: Tensor, vae_config: Any) -> Tensor:
    """The means [B, C, h, w] of posteriors [B, 2C, h, w], normalised as by `sample_latents`."""
    mean, _ = moments.chunk(2, dim=1)
    return (mean - vae_config.shift_factor) * vae_config.scaling_factor


def decode_latents(vae: Vae, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in about [-1, 1] from normalised latents [B, C, h, w]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype)).sample


def latent_statistics(vae: Vae) -> tuple[float | Tensor, float | Tensor]:
    """(shift, scale) that normalise a VAE's latents, (latents - shift) * scale: numbers, or tensors [C, 1, 1]."""
    if isinstance(vae, AutoencoderKLQwenImage):
        config: Any = vae.config
        shift = torch.tensor(config.latents_mean, device=vae.device)
        scale = torch.tensor([1 / std for std in config.latents_std], device=vae.device)
        return shift.view(-1, 1, 1), scale.view(-1, 1, 1)
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


@torch.no_grad()
def encode_images(vae: Vae, pixel_values: Tensor) -> Tensor:
    """Normalised latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1]: the mean of the posterior.

    For AutoencoderKL (FLUX.1, SD3), AutoencoderDC (Sana) and AutoencoderKLQwenImage; one image at a time, as above.
    """
    encode: Any = vae.encode
    latents = []
    for image in pixel_values.to(vae.device, vae.dtype).split(1):
        if isinstance(vae, AutoencoderKLQwenImage):  # its images are videos [B, 3, 1, H, W] of one frame
            latents.append(encode(image.unsqueeze(2)).latent_dist.mode().squeeze(2))
        elif isinstance(vae, AutoencoderDC):  # deterministic
            latents.append(encode(image).latent)
        else:
            latents.append(encode(image).latent_dist.mode())
    shift, scale = latent_statistics(vae)
    return (torch.cat(latents).float() - shift) * scale


@torch.no_grad()
def decode_images(vae: Vae, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in about [-1, 1] from what `encode_images` returns."""
    shift, scale = latent_statistics(vae)
    latents = (latents / scale + shift).to(vae.dtype)
    decode: Any = vae.decode
    if isinstance(vae, AutoencoderKLQwenImage):
        return decode(latents.unsqueeze(2)).sample.squeeze(2)
    return decode(latents).sample


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h/2 * w/2, 4C], each a 2 x 2 patch."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack_latents(packed: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, h/2 * w/2, 4C] to [B, C, h, w]; `height` and `width` are h and w, in latents and not in pixels."""
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Position ids [h/2 * w/2, 3], float32, of packed latents [B, C, h, w]: (0, row, column)."""
    return FluxPipeline._prepare_latent_image_ids(None, height // 2, width // 2, device, torch.float32)


@functools.cache
def image_processor() -> VaeImageProcessor:
    """diffusers' conversion between PIL images and tensors in [-1, 1], without resizing; data.py crops."""
    return VaeImageProcessor(do_resize=False)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as [3, H, W] in [-1, 1], float32."""
    return image_processor().preprocess(image)[0]


def to_image(pixels: Tensor) -> Image.Image:
    """The PIL image of pixels [1, 3, H, W] in about [-1, 1]."""
    images: Any = image_processor().postprocess(pixels.float(), output_type="pil")
    return images[0]


class TensorCache:
    """What encoders made of prompts and images, in files of a folder where later runs find them.

    An entry is {name: tensor}. Its file is named by a hash of `identity` and the entry's key, so what the tensors
    depend on belongs in one of them: the encoder and its settings in `identity`, what was encoded in the key. Both are
    bytes, or both are values that JSON can hold. Files are written whole or not at all; one that is damaged is
    encoded and written again.
    """

    def __init__(self, folder: Path | str, identity: Any):
        self.folder = Path(folder)
        self.identity = identity

    def path(self, *key: Any) -> Path:
        if isinstance(self.identity, bytes):
            content = self.identity + b"".join(key)
        else:
            content = json.dumps([self.identity, key]).encode()
        return self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"

    def load(self, *key: Any) -> dict[str, Tensor]:
        return load_file(self.path(*key))

    def has(self, *key: Any) -> bool:
        """Whether the entry is there and whole: its file is as long as its header says."""
        try:
            with safe_open(self.path(*key), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def save(self, tensors: Mapping[str, Tensor], *key: Any) -> None:
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        with atomic_write(self.path(*key), durable=False) as partial:
            save_file(tensors, partial)

    def load_or_encode(self, *key: Any, encode: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The entry; if it is absent, `encode()` makes it first."""
        if not self.has(*key):
            self.save(encode(), *key)
        return self.load(*key)

    def fill(
        self,
        accelerator: Accelerator,
        keys: Iterable[tuple],
        read: Callable[[tuple], Any],
        encode: Callable[[list], Sequence[Mapping[str, Tensor]]],
        desc: str,
        batch_size: int = 1,
    ) -> None:
        """Adds the entries of `keys` that are absent: encode([read(key), ...]) returns those of up to `batch_size`.

        The processes share the work, and threads read ahead of the encoder.
        """
        missing = [key for key in keys if not self.has(*key)]
        accelerator.wait_for_everyone()  # every process has listed what is missing
        quiet = not accelerator.is_main_process or not missing
        with (
            accelerator.split_between_processes(missing) as share,
            tqdm(desc=desc, total=len(share), disable=quiet) as progress_bar,
        ):
            inputs = map_ahead(read, share, num_reading_threads())
            for start in range(0, len(share), batch_size):
                batch = share[start : start + batch_size]
                entries = encode(list(itertools.islice(inputs, len(batch))))
                for key, entry in zip(batch, entries, strict=True):
                    self.save(entry, *key)
                progress_bar.update(len(batch))
        accelerator.wait_for_everyone()


def num_reading_threads() -> int:
    """Threads that read ahead in this process: its share of the machine's cores, and no more than their images fit
    into memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, (os.cpu_count() or 1) // processes))


def cache_moments(
    accelerator: Accelerator,
    vae: Vae,
    keys: Iterable[Hashable],
    load_pixels: Callable[[Any], Tensor],
    folder: Path | str | None = None,
    num_threads: int | None = None,
) -> dict[Any, Tensor]:
    """The VAE posterior of every image of a run: {key: `encode_moments` of load_pixels(key)}, on the CPU.

    `load_pixels` returns an image [3, H, W] in [-1, 1]. The processes share the work; each returns all. With `folder`,
    posteriors are kept there for later runs, by the image's pixels and the VAE's weights. `num_threads` read images
    ahead; 1 reads them in the order of `keys`.
    """

    def encode(pixels: Tensor) -> dict[str, Tensor]:
        return {"value": encode_moments(vae, pixels[None])[0].cpu()}

    cache = TensorCache(folder, fingerprint(vae)) if folder else None
    found = []
    with accelerator.split_between_processes(list(keys)) as share:
        images = map_ahead(load_pixels, share, num_threads or num_reading_threads())
        quiet = not accelerator.is_main_process
        for key, pixels in zip(tqdm(share, desc="Caching latents", unit="image", disable=quiet), images, strict=True):
            if cache:
                content = str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()
                entry = cache.load_or_encode(content, encode=lambda: encode(pixels))  # noqa: B023
            else:
                entry = encode(pixels)
            found.append((key, entry["value"]))
    return dict(gather_objects(found))


def fingerprint(model: torch.nn.Module) -> bytes:
    """Bytes that tell models apart: a hash of names, shapes, dtypes and 256 values of each of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        step = max(1, tensor.numel() // 256)
        values = tensor.flatten()[::step][:256].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes())
    return digest.digest()

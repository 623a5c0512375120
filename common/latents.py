"""Pixels to VAE latents to packed tokens and back, position ids, and the cache of what encoders made."""

import argparse
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.arguments import nearest_folder
from common.checkpoints import LostFileError, atomic_write
from common.data import Size, map_ahead
from common.models import (
    disk_group,
    gather_objects,
    hub_commit,
    latent_channels,
    own_items,
    place_on_disk,
    to_device,
    writes_files,
)

import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    Flux2Pipeline,
    FluxPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm


PATCH = 16  # pixels per token of FLUX.1

VIDEO_VAES = (AutoencoderKLQwenImage, AutoencoderKLQwenImage21)  # their images are videos [B, C, 1, H, W] of one frame

Generators = torch.Generator | list[torch.Generator] | None  # one for all, or one for each sample
Vae = Any  # an AutoencoderKL unless a function says which others; diffusers' own hints miss what these return


@torch.no_grad()
def encode_moments(vae: Vae, pixel_values: Tensor, batch_size: int = 1) -> Tensor:
    """The VAE posterior of images [B, 3, H, W] in [-1, 1]: mean and log-variance [B, 2C, H/f, W/f], float32.

    Images go through the VAE `batch_size` at a time: batched convolutions round differently, and a latent must not
    depend on what else was in its batch, nor on a CPU on whether it was cached.
    """
    images = to_device(pixel_values, vae.device).to(vae.dtype).split(batch_size)
    return torch.cat([vae.encode(image).latent_dist.parameters for image in images]).float()


def sample_latents(moments: Tensor, vae_config: Any, generator: Generators = None) -> Tensor:
    """Latents [B, C, h, w] sampled from posteriors [B, 2C, h, w], normalized as the transformer expects them."""
    posterior = DiagonalGaussianDistribution(moments)
    first = generator[0] if isinstance(generator, list) else generator
    where = moments.device if first is None else first.device
    noise = randn_tensor(posterior.mean.shape, generator=generator, device=where, dtype=moments.dtype)
    latents = posterior.mean + posterior.std * to_device(noise, moments.device)
    return (latents - vae_config.shift_factor) * vae_config.scaling_factor


def mean_latents(moments: Tensor, vae_config: Any) -> Tensor:
    """The means [B, C, h, w] of posteriors [B, 2C, h, w], normalized as by `sample_latents`."""
    mean, _ = moments.chunk(2, dim=1)
    return (mean - vae_config.shift_factor) * vae_config.scaling_factor


def flux2_latents(moments: Tensor, vae: Vae) -> Tensor:
    """Latents [B, C, h, w] of posteriors [B, 2C, h, w] of an AutoencoderKLFlux2, normalized as FLUX.2 expects them.

    Not sampled: the mean, whose 2 x 2 patches have 4C numbers that the VAE's running statistics normalise each.
    """
    mean, _ = moments.chunk(2, dim=1)
    patches = Flux2Pipeline._patchify_latents(mean)  # [B, 4C, h/2, w/2]
    shift, std = flux2_statistics(vae, patches)
    return Flux2Pipeline._unpatchify_latents((patches - shift) / std)


def flux2_statistics(vae: Vae, patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [1, 4C, 1, 1] of the patches [B, 4C, h/2, w/2] of an AutoencoderKLFlux2's latents."""
    shift = to_device(vae.bn.running_mean, patches.device).view(1, -1, 1, 1).to(patches)
    var = to_device(vae.bn.running_var, patches.device).view(1, -1, 1, 1).to(patches)
    return shift, torch.sqrt(var + vae.config.batch_norm_eps)


def decode_latents(vae: Vae, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W] in about [-1, 1] from normalized latents [B, C, h, w]."""
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(latents.to(vae.dtype)).sample


def latent_statistics(vae: Vae) -> tuple[float | Tensor, float | Tensor]:
    """(shift, scale) that normalise a VAE's latents, (latents - shift) * scale: numbers, or tensors [C, 1, 1]."""
    if isinstance(vae, VIDEO_VAES):
        config: Any = vae.config
        shift = torch.tensor(config.latents_mean, device=vae.device)
        scale = torch.tensor([1 / std for std in config.latents_std], device=vae.device)
        return shift.view(-1, 1, 1), scale.view(-1, 1, 1)
    return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor


@torch.no_grad()
def encode_images(vae: Vae, pixel_values: Tensor, batch_size: int = 1) -> Tensor:
    """Normalised latents [B, C, h, w], float32, of images [B, 3, H, W] in [-1, 1]: the mean of the posterior.

    For AutoencoderKL (FLUX.1, SD3), AutoencoderKLFlux2, AutoencoderDC (Sana), AutoencoderKLQwenImage and that of
    Qwen-Image-2.1; `batch_size` as above.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        return flux2_latents(encode_moments(vae, pixel_values, batch_size), vae)
    encode: Any = vae.encode
    latents = []
    for image in to_device(pixel_values, vae.device).to(vae.dtype).split(batch_size):
        if isinstance(vae, VIDEO_VAES):
            if isinstance(vae, AutoencoderKLQwenImage21):  # which codes alpha, too: opaque
                image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
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
    if isinstance(vae, AutoencoderKLFlux2):
        patches = Flux2Pipeline._patchify_latents(latents)
        shift, std = flux2_statistics(vae, patches)
        latents = Flux2Pipeline._unpatchify_latents(patches * std + shift)
    else:
        shift, scale = latent_statistics(vae)
        latents = latents / scale + shift
    latents = latents.to(vae.dtype)
    decode: Any = vae.decode
    if isinstance(vae, VIDEO_VAES):
        return decode(latents.unsqueeze(2)).sample[:, :3].squeeze(2)
    return decode(latents).sample


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, h, w] to tokens [B, h/2 * w/2, 4C], each a 2 x 2 patch."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def unpack_latents(packed: Tensor, height: int, width: int) -> Tensor:
    """Tokens [B, h/2 * w/2, 4C] to [B, C, h, w]; `height` and `width` are h and w, in latents and not in pixels."""
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


def image_ids(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Position ids [h/2 * w/2, 3], float32, of packed latents [B, C, h, w]: (0, row, column)."""
    ids = FluxPipeline._prepare_latent_image_ids(None, height // 2, width // 2, None, torch.float32)
    return ids if device is None else to_device(ids, device)


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


NUM_MAPPED = 64
mapped_files: dict[Path, tuple[Any, dict[str, Tensor]]] = {}  # the last NUM_MAPPED, with what they were like


def map_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped. Opening it takes 0.1 ms, so the last ones stay mapped; they outlive its deletion.

    A file that was changed is mapped anew: reading beyond the end of one that was cut would end the process.
    """
    try:
        status = path.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
    except OSError:
        version = None
    if path not in mapped_files or version not in (None, mapped_files[path][0]):
        mapped_files[path] = (version, load_file(path))
    tensors = mapped_files[path][1]
    while len(mapped_files) > NUM_MAPPED:
        mapped_files.pop(next(iter(mapped_files)), None)
    return tensors


class TensorCache:
    """What encoders made of prompts and images, in files of a folder where later runs find them.

    An entry is {name: tensor}. Its file is named by a hash of `identity` and the entry's key, so what the tensors
    depend on belongs in one of them: the encoder and its settings in `identity`, what was encoded in the key. Both are
    bytes, or both are values that JSON can hold. Files are written whole or not at all, by the process that encoded;
    all processes that share the folder map them. One that is damaged is encoded and written again.
    """

    def __init__(self, folder: Path | str, identity: Any):
        self.folder = Path(folder)
        self.identity = identity

    def digest(self, *key: Any) -> bytes:
        """32 bytes that name the entry of a key."""
        if isinstance(self.identity, bytes):
            content = self.identity + b"".join(key)
        else:
            content = json.dumps([self.identity, key]).encode()
        return hashlib.sha256(content).digest()

    def content_digest(self, tensor: Tensor) -> bytes:
        """`digest` of the entry that was encoded from a tensor, see `fill_by_content`."""
        return self.digest(str(tuple(tensor.shape)).encode(), tensor.contiguous().numpy().tobytes())

    def path(self, *key: Any) -> Path:
        return self.path_of(self.digest(*key))

    def path_of(self, digest: bytes) -> Path:
        return self.folder / f"{digest.hex()}.safetensors"

    def load(self, *key: Any) -> dict[str, Tensor]:
        """The tensors of an entry, mapped from its file."""
        return dict(self.load_digest(self.digest(*key)))

    def load_digest(self, digest: bytes) -> dict[str, Tensor]:
        """`load` of an entry that a digest names; nobody may change the tensors.

        Raises LostFileError if its file is gone or damaged.
        """
        path = self.path_of(digest)
        try:
            return map_file(path)
        except (OSError, SafetensorError):
            state = "is damaged" if path.exists() else "was deleted or moved"
            raise LostFileError(
                f"{path}, which this run has encoded, {state}; the same command encodes it again"
            ) from None

    def has(self, *key: Any) -> bool:
        """Whether the entry is there and whole: its file is as long as its header says."""
        return is_whole(self.path(*key))

    def save(self, tensors: Mapping[str, Tensor], *key: Any) -> None:
        self.write(tensors, self.path(*key))

    def write(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
        with atomic_write(path, durable=False) as partial:
            save_file(tensors, partial)

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
        keys = list(dict.fromkeys(keys))
        # all share one list: another run may add entries while they look
        absent = [place for place, key in enumerate(keys) if not self.has(*key)]
        absent = set(gather_objects(absent, disk_group(accelerator)))
        missing = [keys[place] for place in sorted(absent)]
        quiet = not accelerator.is_main_process or not missing
        share = own_items(accelerator, missing)
        with tqdm(desc=desc, total=len(share), disable=quiet) as progress_bar:
            inputs = map_ahead(read, share, num_reading_threads())
            for start in range(0, len(share), batch_size):
                batch = share[start : start + batch_size]
                entries = encode(list(itertools.islice(inputs, len(batch))))
                for key, entry in zip(batch, entries, strict=True):
                    self.save(entry, *key)
                progress_bar.update(len(batch))
        accelerator.wait_for_everyone()
        self.check_shared(accelerator, [self.digest(*key) for key in missing])

    def fill_by_content(
        self,
        accelerator: Accelerator,
        keys: Iterable[Hashable],
        read: Callable[[Any], Tensor],
        encode: Callable[[list[Tensor]], Sequence[Tensor]],
        desc: str,
        batch_size: int = 1,
        num_threads: int | None = None,
    ) -> "CachedTensors":
        """{key: encode([read(key)])[0], float32} of each key, in entries named by the content of what `read` returns.

        encode([tensor, ...]) returns those of up to `batch_size`, and is asked for the ones that are absent. Equal
        contents share an entry. The processes share the work. `num_threads` read ahead; 1 reads in the order of
        `keys`.
        """

        def read_missing(key: Any) -> tuple[bytes, Tensor | None]:
            tensor = read(key)
            digest = self.content_digest(tensor)
            return digest, None if is_whole(self.path_of(digest)) else tensor

        keys = list(keys)
        digests = []
        share = own_items(accelerator, keys)
        with tqdm(desc=desc, total=len(share), disable=not accelerator.is_main_process) as progress_bar:
            inputs = map_ahead(read_missing, share, num_threads or num_reading_threads())
            while batch := list(itertools.islice(inputs, batch_size)):
                missing = {digest: tensor for digest, tensor in batch if tensor is not None}
                for digest, value in zip(missing, encode(list(missing.values())) if missing else [], strict=True):
                    self.write({"value": value}, self.path_of(digest))
                digests += [digest for digest, _ in batch]
                progress_bar.update(len(batch))
        # all files are there once all processes have come here
        digests = gather_objects(digests, disk_group(accelerator))
        self.check_shared(accelerator, digests)
        return CachedTensors(self, dict(zip(keys, digests, strict=True)), torch.float32)

    def check_shared(self, accelerator: Accelerator, digests: Iterable[bytes]) -> None:
        """Ends the run if what the other processes have encoded is not to be seen here."""
        if accelerator.num_processes > 1 and not all(is_whole(self.path_of(digest)) for digest in digests):
            raise SystemExit(
                f"\n{Path(sys.argv[0]).name}: error: {self.folder} lacks what other processes have encoded: it must "
                "lie on a disk that all machines share"
            )


class CachedTensors(Mapping):
    """The tensors of a cache under other keys than its own; each is mapped from its file whenever it is asked for.

    cache    its entries are {"value": tensor}
    digests  {key: `TensorCache.digest` of its entry}
    dtype    of the tensors; without it that of their files
    """

    def __init__(self, cache: TensorCache, digests: Mapping[Any, bytes], dtype: torch.dtype | None = None):
        self.cache = cache
        self.digests = digests
        self.dtype = dtype

    def __getitem__(self, key: Any) -> Tensor:
        value = self.cache.load_digest(self.digests[key])["value"]
        return value if self.dtype is None else value.to(self.dtype)

    def __contains__(self, key: object) -> bool:
        return key in self.digests

    def __iter__(self) -> Iterator:
        return iter(self.digests)

    def __len__(self) -> int:
        return len(self.digests)


# What latents and embeddings do not depend on, of a run's settings. Another setting, also one that is missing here by
# mistake, makes a run load its encoders and read its images again: slower, never wrong.
NOT_ENCODED = frozenset(
    {
        *(
            "the number of processes",
            "gradient_accumulation_steps",
            "train_batch_size",
            "fsdp",
            "hybrid_shard",
            "compile",
        ),
        *("learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power"),
        *("optimizer", "use_8bit_adam", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon"),
        *("adam_weight_decay", "prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction"),
        *("prodigy_safeguard_warmup", "use_ema", "ema_decay", "quantize_base", "guidance_scale"),
        *("rank", "lora_alpha", "use_rslora", "init_lora_weights", "lora_dropout", "lora_layers", "lora_type"),
        *("lokr_factor", "use_dora", "lora_path", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
        *("timestep_sampling", "sigmoid_scale", "discrete_flow_shift"),
    }
)

NUM_COMPARED = 8  # images that are read again to see that an index is still right


class EncodedIndex(TensorCache):
    """Where a run's tensors lie in a folder, so that a later run finds them without its encoders and its images.

    The files of prompts and images are named by the weights of the encoder and by the pixels. An entry of this cache
    has their names, and its own depends only on what a run knows before: `run_settings` and the keys of its images.

    Args:
        folder: that of the tensors.
        args: the flags of the run.
        run: its `run_settings` (checkpoints.py).
    """

    def __init__(self, folder: Path, args: argparse.Namespace, run: Mapping[str, Any]):
        settings = {name: value for name, value in run.items() if name not in NOT_ENCODED}
        settings["the commit on the hub"] = hub_commit(args)
        super().__init__(folder, hashlib.sha256(json.dumps(settings).encode()).hexdigest())
        self.knows_images = all(stamp for _, stamp, _ in run["data"])  # those of a user's class have none

    def add(self, accelerator: Accelerator, tensors: Mapping[str, Tensor], *key: Any) -> None:
        """`save`, by one of the processes on a disk; all call it."""
        if writes_files(accelerator):
            self.save(tensors, *key)
        accelerator.wait_for_everyone()

    def find(
        self, accelerator: Accelerator, label: Any, keys: Sequence[Hashable], read: Callable[[Any], Tensor]
    ) -> CachedTensors | None:
        """What `fill_by_content` returned for these keys in an earlier run, which `record` has noted; None if nothing
        was, files are missing, or images have changed: of NUM_COMPARED of them, what `read` returns is compared."""
        found = None
        if self.knows_images and self.has(label, keys):
            entry = self.load(label, keys)
            digests = [digest.tobytes() for digest in entry["digests"].numpy()]
            cache = TensorCache(self.folder, entry["identity"].numpy().tobytes())
            found = CachedTensors(cache, dict(zip(keys, digests, strict=True)), torch.float32)
            place, number = place_on_disk(accelerator)
            own = digests[place::number]
            compared = keys[:: max(1, len(keys) // NUM_COMPARED)][:NUM_COMPARED]
            is_right = all(is_whole(cache.path_of(digest)) for digest in own)
            if not is_right or any(cache.content_digest(read(key)) != found.digests[key] for key in compared):
                found = None
        return found if all(gather_objects([found is not None])) else None

    def record(
        self,
        accelerator: Accelerator,
        label: Any,
        found: CachedTensors,
        more: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Notes for `find` where the tensors of a run are, and `more` that is needed with them."""
        digests = list(found.digests.values())
        if digests:
            tensors = {"digests": bytes_tensor(b"".join(digests)).view(len(digests), -1)}
            tensors["identity"] = bytes_tensor(found.cache.identity)
            self.add(accelerator, tensors | dict(more or {}), label, list(found))

    def load_vae(self, vae_class: Any, label: Any, keys: Sequence[Hashable]) -> Vae:
        """The VAE that has encoded these images, without weights: its config and buffers normalise latents."""
        entry = self.load(label, keys)
        with torch.device("meta"):
            vae = vae_class.from_config(json.loads(entry["config"].numpy().tobytes()))
        for name, value in entry.items():
            if name.startswith("buffer."):
                module, _, attribute = name.removeprefix("buffer.").rpartition(".")
                vae.get_submodule(module).register_buffer(attribute, value)
        return vae


def bytes_tensor(content: bytes) -> Tensor:
    """Bytes as a tensor, uint8."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def is_whole(path: Path) -> bool:
    """Whether a file of tensors is there and as long as its header says."""
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def num_reading_threads() -> int:
    """Threads that read ahead in this process: its share of the machine's cores, and no more than their images fit
    into memory."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(8, max(1, (os.cpu_count() or 1) // processes))


LARGEST_BATCH = 8  # images that the VAE encodes together while they are cached


def images_per_batch(device: torch.device, size: Size | None = None) -> int:
    """Images of a size that the VAE encodes together while they are cached, on an accelerator as many as have the
    pixels of one of 1024 px; without a size, the most of any.

    One on a CPU, where a latent has the same bits, whether it was cached or not.
    """
    if device.type == "cpu":
        return 1
    if size is None:
        return LARGEST_BATCH
    return min(LARGEST_BATCH, max(1, 1024**2 // (size.height * size.width)))


def encode_by_size(
    encode: Callable[[Tensor, int], Tensor], images: Sequence[Tensor], device: torch.device
) -> list[Tensor]:
    """What encode(images [B, 3, H, W], B) makes of each of some images [3, H, W]; those of a size go together.

    A batch is filled up by its first image: kernels are chosen by the shape of a batch and may round differently, so
    what is encoded does not depend on how many images there are.
    """
    places: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.shape, []).append(place)
    encoded: dict[int, Tensor] = {}
    for shape, same in places.items():
        count = images_per_batch(device, Size(*shape[-2:]))
        for start in range(0, len(same), count):
            batch = same[start : start + count]
            filled = batch + batch[:1] * (count - len(batch))
            values = encode(torch.stack([images[place] for place in filled]), count)
            encoded |= dict(zip(batch, values, strict=False))
    return [encoded[place] for place in range(len(images))]


def cache_moments(
    accelerator: Accelerator,
    vae: Vae,
    keys: Iterable[Hashable],
    load_pixels: Callable[[Any], Tensor],
    index: EncodedIndex,
    label: Any,
    num_threads: int | None = None,
) -> CachedTensors:
    """The VAE posterior [2C, h, w] of every image of a run, {key: `encode_moments` of load_pixels(key)}, on the disk.

    `load_pixels` returns an image [3, H, W] in [-1, 1]; see `fill_by_content` for `num_threads`. Files are named by
    the image's pixels and the VAE's weights. They have the VAE's dtype, in which it computed: nothing is rounded. The
    `index` of their folder finds them in a later run, see `EncodedIndex.find`, under `label`.
    """

    def encode(images: list[Tensor]) -> list[Tensor]:
        moments = encode_by_size(functools.partial(encode_moments, vae), images, vae.device)
        return [each.to(vae.dtype) for each in moments]

    cache = TensorCache(index.folder, fingerprint(vae))
    batch_size = images_per_batch(vae.device)
    found = cache.fill_by_content(
        accelerator, keys, load_pixels, encode, "Caching latents", batch_size=batch_size, num_threads=num_threads
    )
    vae_tensors = {f"buffer.{name}": buffer for name, buffer in vae.named_buffers()}
    vae_tensors["config"] = bytes_tensor(vae.to_json_string().encode())
    index.record(accelerator, label, found, vae_tensors)
    return found


def encoded_folder(output_dir: Path) -> Path:
    """Where a run keeps what it has encoded for itself."""
    return output_dir / "encoded"


def prompts_folder(args: argparse.Namespace) -> Path:
    """Where the embeddings of prompts lie: those for later runs in --disk_cache_dir."""
    if args.cache_text_encoder_outputs_to_disk:
        return args.disk_cache_dir.expanduser()
    return encoded_folder(args.output_dir)


def latents_folder(args: argparse.Namespace) -> Path:
    """Where latents lie: those for later runs in --disk_cache_dir."""
    return args.disk_cache_dir.expanduser() if args.cache_latents_to_disk else encoded_folder(args.output_dir)


def check_disk_cache(args: argparse.Namespace) -> list[str]:
    """Problems of --disk_cache_dir and --precompute_only."""
    problems = []
    if args.cache_latents_to_disk or args.cache_text_encoder_outputs_to_disk:
        folder = args.disk_cache_dir.expanduser().absolute()
        parent = next(path for path in [folder, *folder.parents] if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            problems.append(f"--disk_cache_dir {args.disk_cache_dir}: {parent} is not a writable folder")
    elif args.precompute_only:
        problems.append(
            "--precompute_only writes what later runs read: give --cache_latents_to_disk, "
            "--cache_text_encoder_outputs_to_disk or both, to it and to the training"
        )
    return problems


def check_cache_rooms(args: argparse.Namespace, *, prompts: int, latents: int) -> list[str]:
    """Problems of the disks on which encoded prompts and images lie, which take so many bytes."""
    kept = args.disk_cache_dir.expanduser()
    needed = {encoded_folder(args.output_dir): 0, kept: 0}
    needed[prompts_folder(args)] += prompts
    needed[latents_folder(args)] += latents
    problems = []
    for folder, size in needed.items():
        if size:
            problems += check_room("--disk_cache_dir" if folder == kept else "--output_dir", folder, size)
    return problems


def print_precomputed(accelerator: Accelerator, encoded: Mapping[str, Mapping]) -> None:
    """Says what --precompute_only has left, {what: `CachedTensors`}, and the command that goes on."""
    accelerator.print("Precomputed:")
    for what, tensors in encoded.items():
        if not isinstance(tensors, CachedTensors):  # nothing of this kind, or an encoder in training
            continue
        files = {tensors.cache.path_of(digest) for digest in tensors.digests.values()}
        size = sum(file.stat().st_size for file in files) if accelerator.is_main_process else 0
        accelerator.print(
            f"  {what:15}{len(tensors):,} in {len(files):,} files of {size / 2**20:.1f} MiB in {tensors.cache.folder}"
        )
    accelerator.print("The same command without --precompute_only trains from them.")


def remove_encoded(accelerator: Accelerator, output_dir: Path) -> None:
    """Deletes what a run has encoded for itself alone: it is done. One that was interrupted finds it again."""
    accelerator.wait_for_everyone()
    if writes_files(accelerator):
        shutil.rmtree(encoded_folder(output_dir), ignore_errors=True)


def moments_size(args: argparse.Namespace, sizes: Iterable[Size], dtype: torch.dtype) -> int:
    """Bytes of the posteriors of images of these sizes: of each 8 x 8 pixels a mean and a log-variance a channel."""
    num_pixels = sum(height * width for height, width in sizes)
    return 2 * latent_channels(args) * num_pixels // 64 * dtype.itemsize


def check_room(flag: str, folder: Path, needed: int) -> list[str]:
    """A problem if the disk of a cache's folder has no room for the `needed` bytes; what it holds already counts."""
    present = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = shutil.disk_usage(nearest_folder(folder)).free
    if free + present >= needed:
        return []
    return [
        f"{flag} {folder}: encoded images and prompts take {needed / 2**30:.1f} GiB there, {free / 2**30:.1f} GiB are "
        "free: choose another disk"
    ]


def fingerprint(model: torch.nn.Module) -> bytes:
    """Bytes that tell models apart: a hash of names, shapes, dtypes and 256 values of each of the weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        step = max(1, tensor.numel() // 256)
        values = tensor.flatten()[::step][:256].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes())
    return digest.digest()

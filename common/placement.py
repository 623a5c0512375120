"""Where models lie while images are generated with them: as the free memory of the device allows."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from common.models import quantize_base

import psutil
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AutoencoderKL, ModelMixin
from diffusers.hooks import apply_group_offloading


PLACEMENTS = ("whole", "model_offload", "group_offload", "nf4")

PLACEMENT_HELP = (
    "whole: all models lie on the GPU; model_offload: each while it is used; group_offload: block by block; nf4: a "
    "transformer in 4 bits, the only one that changes images (default: the first that fits into the free memory)"
)

# Needed beside the weights: to decode a pixel in bf16 takes 1.7 KiB, a forward pass of FLUX.1 less
WORKING_BYTES_PER_PIXEL = 2048

# torch rounds pinned allocations up to powers of two: FLUX.1's transformer takes about this times its size
PINNED = 1.5

SMALL = 2**30  # bytes: a smaller model is on the device all the time


def choose_placements(
    sizes: Mapping[str, int], *, free: int, free_ram: int, pixels: int = 1024 * 1024
) -> dict[str, str]:
    """{name: placement} of models {name: bytes} that generate images of `pixels` on a device with `free` bytes.

    whole          it is on the device all the time
    model_offload  it is moved to the device when it is used, and back when the next one is
    group_offload  each of its blocks is copied to the device while the one before it computes
    nf4            it is quantized to 4 bits, a transformer alone

    The first that fits is taken: all but the last compute the same numbers. Offloaded models take CPU memory, of which
    `free_ram` bytes are free: their size, or with group_offload, which pins it, PINNED times that.
    """
    working = WORKING_BYTES_PER_PIXEL * max(pixels, 1024 * 1024)
    if sum(sizes.values()) + working <= free:
        return dict.fromkeys(sizes, "whole")
    placements = {name: "whole" for name, size in sizes.items() if is_resident(name, size)}
    resident = sum(sizes[name] for name in placements)
    offloaded_ram = 0
    for name in [name for name in sizes if name not in placements]:
        if resident + sizes[name] + working <= free:
            placements[name] = "model_offload"
            offloaded_ram += sizes[name]
        else:
            placements[name] = "group_offload"
            offloaded_ram += PINNED * sizes[name]
    if placements.get("transformer", "whole") != "whole" and offloaded_ram > free_ram:
        placements["transformer"] = "nf4"
    return placements


def is_resident(name: str, size: int) -> bool:
    """Whether a model stays on the device: it is small, or a VAE, which is not called by the method that hooks see."""
    return size < SMALL or name == "vae"


def place(
    models: Mapping[str, Any],
    device: torch.device,
    *,
    pixels: int = 1024 * 1024,
    placement: str | None = None,
) -> dict[str, str]:
    """Puts models, such as a pipeline's `components`, where `device` can generate images of `pixels` with them.

    `placement` is one of PLACEMENTS, for all models that are not small; None chooses by the free memory, and on a CPU
    "whole". LoRAs must be in the models already. What is no torch.nn.Module is passed over. Returns {name: placement}.
    """
    modules = {name: model for name, model in models.items() if isinstance(model, torch.nn.Module)}
    sizes = {name: num_bytes(module) for name, module in modules.items()}
    placements = dict.fromkeys(sizes, "whole")
    is_quantized = False
    if device.type != "cpu" or placement:
        memory = {"free": available_memory(device), "free_ram": psutil.virtual_memory().available, "pixels": pixels}
        placements = choose_placements(sizes, **memory)
        if placement and placement != "nf4":
            placements = dict.fromkeys(sizes, placement)
        if "transformer" in modules and (placement == "nf4" or placements["transformer"] == "nf4"):
            is_quantized = True
            transformer = modules["transformer"]
            quantize_base(transformer, next(transformer.parameters()).dtype)
            transformer.to(device)  # which shrinks the weights
            sizes["transformer"] = num_bytes(transformer)
            memory["free"] = available_memory(device) + sizes["transformer"]
            placements = choose_placements(sizes, **memory)
            if placements["transformer"] != "whole":  # hooks of group offloading would not move its quantization
                placements["transformer"] = "model_offload"

    hooks = []
    for name in sorted(modules):  # text_encoder, text_encoder_2, transformer, vae: the order in which they are used
        module = modules[name]
        if placements[name] == "whole" or is_resident(name, sizes[name]):
            placements[name] = "whole"
            module.to(device)
        elif placements[name] == "model_offload":
            _, hook = cpu_offload_with_hook(module, device, hooks[-1] if hooks else None)
            hooks.append(hook)
        else:
            offload_groups(module, device)
            if hooks:
                module.register_forward_pre_hook(lambda *inputs, hook=hooks[-1]: hook.offload())
    if len(hooks) > 1:
        hooks[0].hook.prev_module_hook = hooks[-1]  # the next image begins with the first
    unusual = [f"{name} {how}" for name, how in placements.items() if how != "whole"]
    if is_quantized:
        unusual.append("transformer nf4")
    if unusual and os.environ.get("RANK", "0") == "0":
        print(f"As the memory is not enough for all models at once: {', '.join(unusual)}", file=sys.stderr)
    vae: Any = modules.get("vae")
    if vae is not None and decodes_in_tiles(vae, pixels, device):
        vae.enable_slicing()
        vae.enable_tiling()
    return placements


def offload_groups(module: torch.nn.Module, device: torch.device) -> None:
    """Keeps a model in pinned CPU memory; its blocks, or its layers where diffusers knows no blocks, are copied to the
    device when they compute, the next one meanwhile. Where memory lacks to pin all, one at a time is pinned."""
    has_streams = device.type != "cpu"
    available = psutil.virtual_memory().available
    apply_group_offloading(
        module,
        device,
        offload_type="block_level" if isinstance(module, ModelMixin) else "leaf_level",
        num_blocks_per_group=1,
        use_stream=has_streams,
        record_stream=has_streams,
        low_cpu_mem_usage=PINNED * num_bytes(module) > available,
    )


def num_bytes(module: torch.nn.Module) -> int:
    """The memory of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def available_memory(device: torch.device) -> int:
    """The bytes that this process can allocate on a device; of one that shares the CPU's memory, those free there."""
    module = torch.get_device_module(device)
    is_shared = device.type == "cuda" and torch.cuda.get_device_properties(device).is_integrated
    if is_shared or not hasattr(module, "mem_get_info"):
        return psutil.virtual_memory().available
    free, _ = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)  # what is cached can be used again


def check_placement(placement: str | None) -> list[str]:
    """A problem of --placement."""
    if placement in ("model_offload", "group_offload") and not torch.accelerator.is_available():
        return [f"--placement {placement} needs a GPU: leave it out"]
    return []


def find_device() -> torch.device:
    """This process' accelerator, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def decodes_in_tiles(vae: AutoencoderKL, num_pixels: int, device: torch.device) -> bool:
    """Whether a GPU lacks the memory in which a VAE decodes images of so many pixels together. Tiles differ a little
    from the whole, and so a CPU, which can swap, has none."""
    if device.type == "cpu":
        return False
    bytes_per_pixel = WORKING_BYTES_PER_PIXEL / 2 * vae.dtype.itemsize
    return num_pixels * bytes_per_pixel > available_memory(device)

"""Prompts to embeddings with FLUX.1's CLIP and T5 or FLUX.2's language model.

Each prompt is embedded once, or in every step while an encoder is trained.
"""

import functools
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.arguments import exit_if_unreadable
from common.latents import CachedTensors, EncodedIndex, TensorCache, bytes_tensor, fingerprint, is_whole
from common.lora import layer_shapes
from common.models import (
    EightBitLinear,
    check_names,
    gather_objects,
    load_model,
    place_on_disk,
    prompt_width,
    quantized_layer,
    to_device,
)

import psutil
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.training_utils import free_memory
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


# Linear layers of CLIP that a LoRA is put beside.
CLIP_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")

# Names of the encoders, as in files of embeddings, and the attributes of FluxPipeline that hold them; and the one of
# FLUX.2, a language model.
ENCODER_ATTRIBUTES = {"clip_l": "text_encoder", "t5": "text_encoder_2"}
FLUX2_ENCODER_ATTRIBUTES = {"llm": "text_encoder"}

TEXT_QUANTIZATIONS = ("none", "nf4", "int8")

# Prompts that are encoded together while they are cached: at 512 tokens each, 1 GiB beside the 9 GiB of T5-XXL
PROMPTS_PER_BATCH = 4

# The same while the layers of T5-XXL come to the device one by one: 4 GiB, which take as long as the copies of 9 GiB
PROMPTS_PER_PASS = 16


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of text encoders beside frozen models of `dtype`: bfloat16 for float16, which activations of T5 and of
    language models exceed. transformers keeps T5's `wo` in float32 for that, but autocast computes it in float16."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def prompts_per_batch(device: torch.device, offload: bool) -> int:
    """Prompts that are encoded together while they are cached, with `offload` in each pass over an encoder's layers,
    which are copied to the device for it."""
    return PROMPTS_PER_PASS if offload and device.type != "cpu" else PROMPTS_PER_BATCH


def fill_up(prompts: Sequence[str], count: int = PROMPTS_PER_BATCH) -> list[str]:
    """At most `count` prompts, and the first of them again until there are so many.

    Kernels are chosen by the shape of a batch and may round differently: with one shape for all, an embedding does
    not depend on how many other prompts there are.
    """
    return [*prompts, *list(prompts[:1]) * (count - len(prompts))]


def offload_options(device: torch.device, size: int, available: int) -> dict[str, bool]:
    """Options of diffusers' enable_group_offload for encoders of `size` bytes, with `available` bytes of CPU memory.

    A stream copies the next layer while one computes, and none back. It takes a second, pinned copy of the encoders;
    where memory lacks for that, layers are pinned one by one.
    """
    if device.type == "cpu":
        return {}
    return {"use_stream": True, "record_stream": True, "low_cpu_mem_usage": 2 * size > available}


def place_encoders(pipeline: Any, device: torch.device, *, offload: bool, stay: Collection[str] = ()) -> None:
    """Moves a pipeline's encoders to a device; with `offload` only their layers, one by one, while they compute.

    Quantized ones, and those whose attributes of the pipeline are in `stay`, are on the device as a whole.
    """
    if not offload:
        pipeline.to(device)
        return
    stay = list(stay)
    size = 0
    for name, model in pipeline.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        if is_quantized(model):
            stay.append(name)
        elif name not in stay:
            size += sum(tensor.nbytes for tensor in model.state_dict().values())
    options = offload_options(device, size, psutil.virtual_memory().available)
    pipeline.enable_group_offload(device, offload_type="leaf_level", exclude_modules=stay, **options)


def quantize_text_encoders(pipeline: Any, dtype: torch.dtype, quantization: str) -> None:
    """Quantizes T5 or the language model of a pipeline, see `quantize_language_model`; CLIP's 0.2 GiB stay."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module) and not isinstance(model, CLIPTextModel | CLIPTextModelWithProjection):
            quantize_language_model(model, dtype, quantization)


def quantize_language_model(model: torch.nn.Module, dtype: torch.dtype, quantization: str) -> None:
    """Quantizes the linear layers in a model's blocks, in place, see `quantize_base` of models.py.

    With "none" it does nothing.
    """
    if quantization == "none":
        return
    for name, layer in list(model.named_modules()):
        parent, _, attribute = name.rpartition(".")
        is_in_block = any(part.isdigit() for part in parent.split("."))
        if isinstance(layer, torch.nn.Linear) and is_in_block:
            quantized = quantized_layer(layer, dtype, quantization, storage=dtype)
            setattr(model.get_submodule(parent), attribute, quantized)


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether a model has layers of `quantize_language_model`."""
    for layer in model.modules():
        if isinstance(layer, EightBitLinear) or type(layer).__module__.startswith("bitsandbytes"):
            return True
    return False


def clip_lora_shapes(args: Any, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name in a LoRA file: (out, in)} of the layers of CLIP that get an adapter, from the model's config alone."""
    config = CLIPTextConfig.from_pretrained(
        args.pretrained_model_name_or_path, subfolder="text_encoder", revision=args.revision, cache_dir=args.cache_dir
    )
    with torch.device("meta"):
        return layer_shapes("text_encoder", CLIPTextModel(config), target_modules)


class PromptEncoder:
    """The embeddings of prompts: T5's of every token and CLIP's pooled one; with FLUX.2 its language model's.

    A frozen encoder embeds every prompt once, in `cache_prompts`, and is freed; the embeddings lie on the disk. The
    `trained` encoders (clip_l, t5) run in every step, with gradients, until `freeze`.

    Args:
        pipeline: a FluxPipeline, Flux2Pipeline or Flux2KleinPipeline with text encoders and tokenizers, as
            `load_text_pipeline` returns it. Adapters and new tokens are in it already. The encoders are moved to the
            accelerator's device. Or a function without arguments that loads one: it is called if a prompt is missing
            on the disk.
        dtype: of the embeddings.
        max_sequence_length: tokens of a prompt for T5 or the language model.
        folder: where the embeddings of this run lie, see `encoded_folder`.
        trained: names of the encoders in training.
        offload: keep frozen encoders in CPU memory and move their layers to the device one by one.
        keep_encoders: do not free frozen encoders: prompts will come that were not known to `cache_prompts`.
        disk_cache_dir: folder where the embeddings of encoders that are not trained are kept for later runs instead.
        index: tells the weights of the encoders by what is known before they are loaded; its folder is that of the
            embeddings of encoders that are not trained.
        rewrite_prompt: what is done to a prompt before it is tokenized.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: Any,
        dtype: torch.dtype,
        *,
        max_sequence_length: int,
        folder: Path,
        trained: Collection[str] = (),
        offload: bool = False,
        keep_encoders: bool = False,
        disk_cache_dir: Path | None = None,
        index: EncodedIndex | None = None,
        rewrite_prompt: Callable[[str], str] | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.dtype = dtype
        self.max_sequence_length = max_sequence_length
        self.folder = folder
        self.keep_encoders = keep_encoders
        self.disk_cache_dir = disk_cache_dir
        self.index = index
        self.rewrite_prompt = rewrite_prompt
        self.trained = set(trained)
        self.offload = offload
        self.cached: dict[str, Mapping[str, torch.Tensor]] = {}  # {encoder: {prompt: [1, ...]}}
        self.load_pipeline = None
        if isinstance(pipeline, DiffusionPipeline):
            self._take(pipeline)
        elif keep_encoders:
            self._take(pipeline())
        else:
            self.load_pipeline = pipeline

    def _take(self, pipeline: Any) -> None:
        """Takes the encoders of a pipeline and moves them to the device."""
        self.pipeline = pipeline
        self.attributes = ENCODER_ATTRIBUTES if hasattr(pipeline, "text_encoder_2") else FLUX2_ENCODER_ATTRIBUTES
        self.encoders = {name: getattr(pipeline, attribute) for name, attribute in self.attributes.items()}
        self.never_trained = self.encoders.keys() - self.trained
        self.cached = {name: {} for name in self.encoders}
        self.offloaded = set()
        for name, encoder in self.encoders.items():
            if self.offload and not is_quantized(encoder):
                self.offloaded.add(name)
        place_encoders(
            pipeline,
            self.accelerator.device,
            offload=self.offload,
            stay=[self.attributes[name] for name in self.trained],
        )

    def encode_prompts(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """(prompt_embeds [B, T, D], pooled_prompt_embeds [B, P]) of prompts, on the accelerator's device.

        P is 0 with FLUX.2, which has no pooled embedding.
        """
        if "llm" in self.cached:
            prompt_embeds = self._encode_or_recall("llm", prompts)
            return prompt_embeds, prompt_embeds.new_zeros(len(prompts), 0)
        return self._encode_or_recall("t5", prompts), self._encode_or_recall("clip_l", prompts)

    def encode_with(self, encoder_name: str, prompts: list[str]) -> torch.Tensor:
        """CLIP's pooled embeddings [B, P], or those of T5 or the language model [B, T, D], computed now."""
        if self.rewrite_prompt:
            prompts = [self.rewrite_prompt(prompt) for prompt in prompts]
        autocast = self.accelerator.autocast()
        if self.accelerator.mixed_precision == "fp16":  # see `encoder_dtype`
            autocast = torch.autocast(self.accelerator.device.type, torch.bfloat16)
        with autocast:
            if encoder_name == "clip_l":
                embeds = self.pipeline._get_clip_prompt_embeds(prompts)
            elif encoder_name == "llm":
                embeds, _ = self.pipeline.encode_prompt(prompts, max_sequence_length=self.max_sequence_length)
            else:
                embeds = self.pipeline._get_t5_prompt_embeds(
                    prompts, max_sequence_length=self.max_sequence_length, dtype=self.dtype
                )
        return embeds.to(self.dtype)

    @torch.no_grad()
    def cache_prompts(self, prompts: list[str]) -> None:
        """Embeds prompts with the encoders that are not in training and frees these encoders.

        The processes share the work; afterwards each of them maps all embeddings from the disk.
        """
        if self.load_pipeline is not None:
            if self._find(prompts):
                return
            self._take(self.load_pipeline())
            self.load_pipeline = None
        cached = {}
        for encoder_name in sorted(self.encoders.keys() - self.trained):  # all processes need the same order
            cached[encoder_name] = self._cache_with(encoder_name, prompts)
            if not self.keep_encoders:
                del self.encoders[encoder_name]
                setattr(self.pipeline, self.attributes[encoder_name], None)
        self.cached |= cached
        if self.index is not None and self.never_trained == cached.keys() == self.cached.keys():
            identities = {name: bytes_tensor(embeddings.cache.identity) for name, embeddings in cached.items()}
            self.index.add(self.accelerator, identities, "encoders")
        free_memory()

    def _find(self, prompts: list[str]) -> bool:
        """Whether an earlier run has embedded all prompts: then they are mapped and no encoder is needed."""
        if self.index is None or self.keep_encoders:
            return False
        identities = self.index.load("encoders") if self.index.has("encoders") else {}
        place, number = place_on_disk(self.accelerator)
        own = prompts[place::number]
        is_complete = bool(identities)
        for encoder_name, identity in identities.items():
            cache = TensorCache(self.index.folder, identity.numpy().tobytes())
            digests = {prompt: cache.digest(self._cache_key(prompt)) for prompt in prompts}
            self.cached[encoder_name] = CachedTensors(cache, digests)
            is_complete &= all(is_whole(cache.path_of(digests[prompt])) for prompt in own)
        if not all(gather_objects([is_complete])):
            return False
        self.never_trained = self.cached.keys()
        self.encoders = {}
        self.offloaded = set()
        return True

    def freeze(self, prompts: list[str], *, keep: bool = False) -> None:
        """Ends the training of the encoders: they embed `prompts` as they are now and are freed.

        With `keep` they stay, for weights of an earlier step that may come back, see `forget_trained`.
        """
        self.keep_encoders = self.keep_encoders or keep
        for encoder_name in self.trained:
            for parameter in self.encoders[encoder_name].parameters():
                parameter.requires_grad_(False)
                parameter.grad = None
        self.trained.clear()
        self.cache_prompts(prompts)

    def forget_trained(self) -> None:
        """From here on encoders that were trained, and kept, embed prompts with the weights that they have now."""
        for encoder_name in self.encoders.keys() - self.never_trained:
            self.cached[encoder_name] = {}

    def _encode_or_recall(self, encoder_name: str, prompts: list[str]) -> torch.Tensor:
        if encoder_name in self.trained:
            return self.encode_with(encoder_name, prompts)
        return self._recall(encoder_name, prompts)

    @torch.no_grad()
    def _recall(self, encoder_name: str, prompts: list[str]) -> torch.Tensor:
        """Embeddings from the cache. Prompts that are not in it are encoded one at a time: an embedding must not
        depend on how many others are in its batch, see `fill_up`. Offloaded layers come once for all of them."""
        device = self.accelerator.device
        cached = self.cached[encoder_name]
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in cached))
        count = PROMPTS_PER_BATCH if encoder_name in self.offloaded and device.type != "cpu" else 1
        computed = {}
        for start in range(0, len(missing), count):
            batch = missing[start : start + count]
            embeds = self.encode_with(encoder_name, fill_up(batch, count))
            computed |= dict(zip(batch, embeds.split(1), strict=False))
        return torch.cat([computed[p] if p in computed else to_device(cached[p], device) for p in prompts])

    def _cache_with(self, encoder_name: str, prompts: Sequence[str]) -> CachedTensors:
        """{prompt: embedding [1, ...]}; those that an earlier run left on the disk are not encoded again."""
        cache = self._cache(encoder_name)
        keys = {prompt: (self._cache_key(prompt),) for prompt in prompts}
        prompt_of = {key: prompt for prompt, key in keys.items()}
        batch_size = prompts_per_batch(self.accelerator.device, encoder_name in self.offloaded)

        def encode(batch: list[str]) -> list[dict[str, torch.Tensor]]:
            embeds = self.encode_with(encoder_name, fill_up(batch, batch_size)).cpu()
            return [{"value": embeds[i : i + 1]} for i in range(len(batch))]

        desc = f"Encoding prompts, {encoder_name}"
        cache.fill(self.accelerator, prompt_of, prompt_of.__getitem__, encode, desc, batch_size)
        return CachedTensors(cache, {prompt: cache.digest(*key) for prompt, key in keys.items()})

    def _cache(self, encoder_name: str) -> TensorCache:
        if encoder_name in self.never_trained:
            return TensorCache(self.disk_cache_dir or self.folder, fingerprint(self.encoders[encoder_name]))
        # a fingerprint looks at a part of the weights and may miss what training changed
        (name,) = gather_objects([secrets.token_bytes(32)])[:1]
        return TensorCache(self.folder, name)

    def _cache_key(self, prompt: str) -> bytes:
        text = self.rewrite_prompt(prompt) if self.rewrite_prompt else prompt
        return f"{self.max_sequence_length} {self.dtype} {self.accelerator.mixed_precision} {text}".encode()


def prompts_size(args: Any, num_prompts: int, dtype: torch.dtype) -> int:
    """Bytes of the embeddings of so many prompts, of --max_sequence_length tokens each."""
    return num_prompts * args.max_sequence_length * prompt_width(args) * dtype.itemsize


def load_tokenizer(args: Any, subfolder: str) -> Any:
    """A tokenizer of the pipeline that --pretrained_model_name_or_path names."""
    with exit_if_unreadable(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its {subfolder}"):
        return AutoTokenizer.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=args.revision,
            cache_dir=args.cache_dir,
            trust_remote_code=False,
        )


def longer_than(limit: int, tokenizer: Any, prompts: Mapping[str, str]) -> list[str]:
    """The names of `prompts` {name: text} that have more than `limit` tokens, those that begin and end it included."""
    texts = list(prompts.values())
    lengths = []
    for start in range(0, len(texts), 1000):  # of all at once, the tokens would fill the memory
        lengths += map(len, tokenizer(texts[start : start + 1000], return_attention_mask=False).input_ids)
    return [name for name, length in zip(prompts, lengths, strict=True) if length > limit]


def describe_long_prompts(
    prompts: Mapping[str, str], tokenizer: Any, max_sequence_length: int, clip_tokenizer: Any = None
) -> dict[str, str]:
    """What the header says of captions {name: text} that are not read to their end, {label: text}."""
    long = longer_than(max_sequence_length, tokenizer, prompts)
    if long:
        return {
            "long captions": f"{len(long)} of {len(prompts)} cut at {max_sequence_length} tokens, such as that of "
            f"{Path(long[0]).name}"
        }
    if clip_tokenizer is None:
        return {}
    limit = clip_tokenizer.model_max_length
    long = longer_than(limit, clip_tokenizer, prompts)
    if not long:
        return {}
    return {
        "long captions": f"{len(long)} of {len(prompts)} read by T5 alone after {limit} tokens, such as that of "
        f"{Path(long[0]).name}"
    }


def load_text_pipeline(
    pipeline_class: type[DiffusionPipeline], args: Any, dtype: torch.dtype, **components: Any
) -> DiffusionPipeline:
    """The pipeline of --pretrained_model_name_or_path with frozen text encoders, without transformer and VAE."""
    source = args.pretrained_model_name_or_path
    where = {"revision": args.revision, "cache_dir": args.cache_dir}
    how = {"variant": args.variant, "dtype": dtype, "use_safetensors": True}
    with exit_if_unreadable(f"--pretrained_model_name_or_path {source}: its text encoders"):
        index: Any = pipeline_class.load_config(source, **where)
        for name, value in index.items():
            if name.startswith("text_encoder") and value[0] == "transformers" and name not in components:
                load = functools.partial(
                    getattr(transformers, value[1]).from_pretrained,
                    source,
                    subfolder=name,
                    output_loading_info=True,
                    **where,
                )
                try:
                    encoder, loaded = load(**how)
                except OSError:
                    if args.variant is None:
                        raise
                    encoder, loaded = load(**(how | {"variant": None}))  # as diffusers does for parts without one
                check_names(encoder, loaded["missing_keys"], loaded["unexpected_keys"])
                components[name] = encoder
        pipeline = pipeline_class.from_pretrained(source, transformer=None, vae=None, **where, **how, **components)
    return freeze_models(pipeline)


def load_flux2_text_pipeline(args: Any, dtype: torch.dtype) -> DiffusionPipeline:
    """`load_text_pipeline` of FLUX.2-dev, with the tokenizer alone: its PixtralProcessor would need torchvision."""
    pipeline: Any = load_text_pipeline(Flux2Pipeline, args, dtype, tokenizer=None)
    pipeline.tokenizer = load_tokenizer(args, "tokenizer")
    return pipeline


def flux2_chat(tokenizer: Any, prompt: str) -> str:
    """The text that the language model of FLUX.2-dev reads for a prompt."""
    (messages,) = format_input([prompt], SYSTEM_MESSAGE)
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)


def flux2_klein_chat(tokenizer: Any, prompt: str) -> str:
    """The text that the language model of FLUX.2-klein reads for a prompt."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def load_whole_pipeline(
    pipeline_class: type[DiffusionPipeline], transformer_class: Any, args: Any, dtype: torch.dtype
) -> DiffusionPipeline:
    """The whole pipeline of --pretrained_model_name_or_path, frozen. Ends the run if a part lacks weights, with which
    a pipeline's own from_pretrained would draw random ones."""
    parts = load_text_pipeline(pipeline_class, args, dtype).components
    parts["vae"] = load_model(AutoencoderKL, "vae", args, dtype)
    parts["transformer"] = load_model(transformer_class, "transformer", args, dtype)
    return pipeline_class(**parts)


def freeze_models(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """Switches off gradients and dropout (T5 has some) in all models of a pipeline."""
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.requires_grad_(False).eval()
    return pipeline

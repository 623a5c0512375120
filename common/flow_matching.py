"""Flow matching: noise levels, the noisy sample, the weight of its loss, sampling in few steps, models' velocities.

x_σ = (1 - σ) x_0 + σ ε,   the model predicts v = ε - x_0,   σ in [0, 1], timestep t = 1000 σ
"""

import copy
import functools
import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from safetensors import safe_open
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint as checkpoint_function

from common import reading
from common.latents import PATCH, image_ids, pack_latents, select_tokens, unpack_latents
from common.lora import FLUX_TARGET_MODULES, load_model, load_text_pipeline, shard


TIMESTEP_SAMPLING = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
TIME_MODULES = ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
BESIDE = ("subject", "sr")  # conditions that stand to the left of the image, not upon it
STYLES = {  # of `sample_flow`: where a prediction aims, and what goes with it
    "few": {"stochast_ratio": 1.0, "gaps": (0.001, 0.7), "time_dist_ctrl": (1.0, 1.0, 1.0)},
    "any": {"stochast_ratio": 0.0, "gaps": (0.001, 0.5), "time_dist_ctrl": (1.0, 1.0, 1.0)},
    "mul": {"stochast_ratio": 0.0, "gaps": (0.001, 0.0), "time_dist_ctrl": (1.17, 0.8, 1.1)},
}


def step_generator(seed, step, micro_step=0, process_index=0):
    """The CPU generator that all of one micro-step's randomness comes from: equal arguments, equal draws."""
    entropy = np.random.SeedSequence([seed, step, micro_step, process_index])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


def sample_sigmas(
    batch_size,
    *,
    noise_scheduler,
    image_seq_len,
    generator,
    timestep_sampling="sigma",
    weighting_scheme="none",
    logit_mean=0.0,
    logit_std=1.0,
    mode_scale=1.29,
    sigmoid_scale=1.0,
    discrete_flow_shift=3.0,
):
    """Noise levels σ [batch_size] in (0, 1], float32.

    `timestep_sampling`, with y = sigmoid(sigmoid_scale n), n ~ N(0, 1):
        sigma       the scheduler's own 1000 levels, picked by the density of `weighting_scheme` (arXiv 2403.03206)
        uniform     U(0, 1)
        sigmoid     y
        shift       s y / (1 + (s - 1) y) with s = discrete_flow_shift
        flux_shift  the same with s = exp(μ), μ as FluxPipeline computes it from `image_seq_len` tokens
    """
    if timestep_sampling == "sigma":
        density = compute_density_for_timestep_sampling(
            weighting_scheme, batch_size, logit_mean, logit_std, mode_scale, generator=generator
        )
        num_levels = noise_scheduler.config.num_train_timesteps
        indices = (density * num_levels).long().clamp(0, num_levels - 1)  # a density can reach 1.0
        return noise_scheduler.sigmas[indices]
    if timestep_sampling == "uniform":
        sigmas = 1 - torch.rand(batch_size, generator=generator)  # never 0
    else:
        sigmas = torch.sigmoid(sigmoid_scale * torch.randn(batch_size, generator=generator))
    if timestep_sampling == "shift":
        sigmas = shift_sigmas(sigmas, discrete_flow_shift)
    elif timestep_sampling == "flux_shift":
        sigmas = shift_sigmas(sigmas, math.exp(calculate_shift(image_seq_len)))
    return sigmas


def noise_options(args):
    """What the flags say of noise levels, for `sample_sigmas`."""
    names = ("timestep_sampling", "weighting_scheme", "logit_mean", "logit_std", "mode_scale", "sigmoid_scale")
    return {name: getattr(args, name) for name in (*names, "discrete_flow_shift")}


def shift_sigmas(sigmas, shift):
    """Noise levels moved towards 1 by `shift` > 1, towards 0 by `shift` < 1 (arXiv 2403.03206, eq. 23)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def add_noise(latents, noise, sigmas):
    """x_σ = (1 - σ) x_0 + σ ε, with one σ per sample: sigmas [B], the others [B, ...]."""
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1)).to(latents)
    return (1 - sigmas) * latents + sigmas * noise


def velocity_loss(model_pred, latents, noise, sigmas, weighting_scheme="none", token_weights=None):
    """Weighted squared error [B] of predicted velocities [B, ...] against ε - x_0, mean over all but the batch.

    `token_weights` [B, N], not negative, make it a weighted mean over the tokens of velocities [B, N, C].
    """
    weighting = compute_loss_weighting_for_sd3(weighting_scheme, sigmas=sigmas.to(model_pred.device))
    error = (model_pred.float() - (noise - latents).float()).square()
    if token_weights is None:
        return weighting * error.flatten(1).mean(dim=1)
    total = token_weights.sum(dim=1).clamp(min=1e-6)  # with weight 0, no token may be left
    return weighting * (error.mean(dim=2) * token_weights).sum(dim=1) / total


# ---------------------------------------------------------------------------------------------------------------------
# Sampling in few steps
# ---------------------------------------------------------------------------------------------------------------------


def time_grid(steps, gaps, time_dist_ctrl):
    """Times [steps + 1], float64, from noise to 0: 1 - (1 - (1 - u^a)^b)^c for even u between the gaps at both ends, a
    power of Kumaraswamy's distribution function, then 0."""
    a, b, c = time_dist_ctrl
    u = torch.linspace(gaps[0], 1 - gaps[1], steps + (gaps[1] == 0), dtype=torch.float64)[:steps]
    return torch.cat([1 - (1 - (1 - u**a) ** b) ** c, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def sample_flow(
    predict,
    noise,
    cond,
    uncond=None,
    *,
    steps,
    style="few",
    generators=None,
    cfg_scale=0.0,
    stochast_ratio=None,
    extrapol_ratio=0.0,
    order=1,
    gaps=None,
    time_dist_ctrl=None,
):
    """Samples x [B, ...] from noise [B, ...] in `steps` forward passes (UCGM, arXiv 2505.07447).

    `style` says where each prediction aims: few at 0, any at the next time, mul (multi-step) nowhere beyond the time
    it stands at; unset arguments are STYLES'. A share s = stochast_ratio of the noise is renewed in each step, from
    one generator per image; "SDE" sets s = min(1, 2 t (t - t₊) / t₊²). `extrapol_ratio` goes beyond each prediction
    by its difference from the one before. Order 2 corrects each step by Heun's rule, for which velocities must be
    those at a time: mul only. cfg_scale 0 is no guidance, else F(uncond) + cfg_scale (F(cond) - F(uncond)).
    """
    preset = STYLES[style]
    if stochast_ratio is None:
        stochast_ratio = 0.8 if style == "few" and steps == 1 else preset["stochast_ratio"]
    if order == 2 and (style != "mul" or stochast_ratio):
        raise ValueError("sampling order 2 needs style mul and stochast_ratio 0: only velocities at a time average")
    times = time_grid(-(-steps // order), gaps or preset["gaps"], time_dist_ctrl or preset["time_dist_ctrl"]).tolist()

    def velocity(x, t, target):
        t, target = (torch.full((len(x),), value, device=x.device) for value in (t, target))
        x = x.to(noise.dtype)
        if not cfg_scale:
            return predict(x, t, target, cond).double()
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        twice = [torch.cat([value, value]) for value in (x, t, target)]
        with_prompt, without = predict(*twice, both).double().chunk(2)
        return without + cfg_scale * (with_prompt - without)

    x, before = noise.double(), None
    for t, after in zip(times[:-1], times[1:], strict=True):
        F = velocity(x, t, {"few": 0.0, "any": after, "mul": t}[style])  # noqa: N806
        x_hat, z_hat = x - t * F, x + (1 - t) * F
        predicted = x_hat, z_hat
        if extrapol_ratio and before is not None:
            x_hat, z_hat = (now + extrapol_ratio * (now - old) for now, old in zip(predicted, before, strict=True))
        before = predicted
        s = stochast_ratio
        if s == "SDE":
            s = min(1.0, 2 * t * (t - after) / after**2) if after else 1.0
        if s and after:
            fresh = [torch.randn(noise.shape[1:], generator=generator) for generator in generators]
            z_hat = (1 - s) ** 0.5 * z_hat + s**0.5 * torch.stack(fresh).to(z_hat)
        ahead = (1 - after) * x_hat + after * z_hat
        if order == 2 and after:
            ahead = x - (t - after) * (F + velocity(ahead, after, after)) / 2
        x = ahead
    return x.to(noise.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Velocities of kinds of models
# ---------------------------------------------------------------------------------------------------------------------


class Backbone:
    """What differs between kinds of pipelines. Conditions are named as the arguments of the transformer."""

    defaults = {}  # of flags, {"full" or "lora" or "both": {name: value}}
    uncond_prompt = ""
    multiple, factor = 16, 8  # of the picture's side, pixels per latent
    channels = 16  # of latents
    time_module = "time_text_embed"
    unused_parameters = False  # whether a training step leaves some without a gradient

    def __init__(self, args):
        self.args = args

    def load_text(self, dtype, device, **parts):
        """The pipeline without transformer and VAE."""
        pipeline = load_text_pipeline(getattr(diffusers, self.pipeline), self.args, dtype, **parts)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()  # T5 has dropout
        if self.args.offload:
            pipeline.enable_group_offload(device, offload_type="leaf_level")
            return pipeline
        return pipeline.to(device)

    def load_vae(self, dtype):
        return load_model(getattr(diffusers, self.vae), "vae", self.args, dtype)

    def load_transformer(self, dtype):
        return load_model(getattr(diffusers, self.transformer), "transformer", self.args, dtype)

    def predict(self, transformer, x, time, cond):
        """Velocities [B, C, h, w] of noisy latents; time [B, 2] is (t, t'), or [B] what stands for both."""
        return transformer(hidden_states=x, timestep=1000 * time, **cond, return_dict=False)[0]


class Flux(Backbone):
    pipeline, transformer, vae = "FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL"
    example = "black-forest-labs/FLUX.1-dev"
    targets = (*FLUX_TARGET_MODULES, "proj_mlp", *TIME_MODULES)

    def encode_prompt(self, pipeline, prompt, reference=None):
        """Conditions {name: [T, D] or [D]} of a prompt, without a batch dimension."""
        length = self.args.max_sequence_length
        embeds, pooled, _ = pipeline.encode_prompt(prompt, prompt_2=None, max_sequence_length=length)
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}

    def predict(self, transformer, x, time, cond):
        height, width = x.shape[-2:]
        velocity = transformer(
            hidden_states=pack_latents(x),
            timestep=time,
            guidance=None if self.guidance is None else torch.full((len(x),), self.guidance, device=x.device),
            txt_ids=torch.zeros(cond["encoder_hidden_states"].shape[1], 3, device=x.device),
            img_ids=image_ids(height, width, x.device),
            **cond,
            return_dict=False,
        )[0]
        return unpack_latents(velocity, height, width)

    def load_transformer(self, dtype):
        transformer, args = super().load_transformer(dtype), self.args
        self.guidance = args.guidance_scale if transformer.config.guidance_embeds else None
        return transformer


class StableDiffusion3(Backbone):
    pipeline, transformer, vae = "StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL"
    example = "stabilityai/stable-diffusion-3.5-medium"
    defaults = {"both": {"max_sequence_length": 256}, "full": {"target_time_init": "zero"}}
    uncond_prompt = "Generate an image."
    targets = (*FLUX_TARGET_MODULES, *TIME_MODULES)

    def encode_prompt(self, pipeline, prompt, reference=None):
        embeds, _, pooled, _ = pipeline.encode_prompt(
            *(prompt, None, None), do_classifier_free_guidance=False, max_sequence_length=self.args.max_sequence_length
        )
        return {"encoder_hidden_states": embeds[0], "pooled_projections": pooled[0]}


class Sana(Backbone):
    pipeline, transformer, vae = "SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC"
    example = "Efficient-Large-Model/Sana_1600M_512px_diffusers"
    defaults = {"both": {"max_sequence_length": 300}}
    uncond_prompt = ""
    multiple, factor, channels, time_module = 32, 32, 32, "time_embed.emb"
    targets = ("to_q", "to_k", "to_v", "to_out.0", *TIME_MODULES)

    def encode_prompt(self, pipeline, prompt, reference=None):
        # the instruction that the pipeline itself puts before prompts
        instruction = inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipeline.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=self.args.max_sequence_length,
            complex_human_instruction=None if prompt == self.args.uncond_prompt else instruction,
        )
        return {"encoder_hidden_states": embeds[0], "encoder_attention_mask": mask[0]}


class OpenUni(Sana):
    """InternVL3 reads the prompt and learned queries; what it makes of these, sent through a few layers (connector)
    and one matrix (projector), is the condition. Only Sana is trained."""

    example = Sana.example
    parts = ("connector.", "projector.", "meta_queries", "transformer.")  # of the checkpoint
    uncond_prompt = "Generate an image."
    template = "<|im_start|>user\nGenerate an image: {}<|im_end|>\n<|im_start|>assistant\n<img>"
    uncond_template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<img>"

    def problems(self):
        """What is wrong with --openuni_checkpoint."""
        flag = f"--openuni_checkpoint {self.args.openuni_checkpoint}"
        if not self.args.openuni_checkpoint.is_file():
            return [f"{flag}: no such file"]
        try:
            missing = [prefix for prefix in self.parts if not self.state_dict(prefix)]
        except Exception as error:  # damaged files raise of all kinds
            return [f"{flag}: not a file of weights ({(str(error) or repr(error)).splitlines()[0]})"]
        return [f"{flag}: holds no {prefix}*" for prefix in missing]

    def state_dict(self, prefix):
        """The tensors of --openuni_checkpoint whose names begin with `prefix`."""
        state_dict = torch.load(self.args.openuni_checkpoint, map_location="cpu", weights_only=True, mmap=True)
        state_dict = state_dict.get("state_dict", state_dict)
        return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}

    def load_text(self, dtype, device):
        from transformers import AutoTokenizer, InternVLForConditionalGeneration, SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipEncoder

        with reading(f"--openuni_llm {self.args.openuni_llm}"):
            llm = InternVLForConditionalGeneration.from_pretrained(
                self.args.openuni_llm, cache_dir=self.args.cache_dir, dtype=dtype, use_safetensors=True
            )
        weights = self.state_dict("connector.")
        intermediate, hidden = weights["layers.0.mlp.fc1.weight"].shape
        config = SiglipVisionConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=len({name.split(".")[1] for name in weights}),
            num_attention_heads=hidden // 64,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            attn_implementation="sdpa",
        )
        text = torch.nn.Module()
        text.tokenizer = AutoTokenizer.from_pretrained(
            self.args.openuni_llm, cache_dir=self.args.cache_dir, trust_remote_code=False
        )
        text.language_model, text.connector = llm.model.language_model, SiglipEncoder(config)
        text.connector.load_state_dict(weights)
        weights = self.state_dict("projector.")
        text.projector = torch.nn.Linear(*reversed(weights["weight"].shape))
        text.projector.load_state_dict(weights)
        text.register_buffer("meta_queries", self.state_dict("meta_queries")[""])
        return text.to(device, dtype).requires_grad_(False).eval()

    def encode_prompt(self, text, prompt, reference=None):
        template = self.uncond_template if prompt == self.args.uncond_prompt else self.template
        queries = text.meta_queries[None]
        ids = text.tokenizer(template.format(prompt), return_tensors="pt").input_ids.to(queries.device)
        embeds = torch.cat([text.language_model.get_input_embeddings()(ids), queries], dim=1)
        states = text.language_model(inputs_embeds=embeds).last_hidden_state[:, -queries.shape[1] :]
        embeds = text.projector(text.connector(inputs_embeds=states).last_hidden_state)[0]
        return {"encoder_hidden_states": embeds, "encoder_attention_mask": torch.ones(len(embeds))}

    def load_transformer(self, dtype):
        transformer = super().load_transformer(dtype)
        transformer.load_state_dict(self.state_dict("transformer."))
        return transformer


class QwenImage(Backbone):
    pipeline, transformer, vae = "QwenImagePipeline", "QwenImageTransformer2DModel", "AutoencoderKLQwenImage"
    example = "Qwen/Qwen-Image"
    defaults = {"full": {"learning_rate": 1e-5}}
    uncond_prompt = "Generate an image."
    unused_parameters = True  # the text half of the last block
    targets = (
        *FLUX_TARGET_MODULES[:8],
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        *TIME_MODULES,
    )

    def encode_prompt(self, pipeline, prompt, reference=None):
        embeds, _ = pipeline.encode_prompt(prompt, max_sequence_length=self.args.max_sequence_length)
        mask = torch.ones(embeds.shape[1], dtype=torch.long)
        return {"encoder_hidden_states": embeds[0], "encoder_hidden_states_mask": mask}

    def predict(self, transformer, x, time, cond):
        cond, (height, width) = dict(cond), x.shape[-2:]
        tokens, shapes = pack_latents(x), [(1, height // 2, width // 2)]
        count = tokens.shape[1]
        if "reference" in cond:  # normalised latents of the picture to edit
            reference = cond.pop("reference").to(x)
            tokens = torch.cat([tokens, pack_latents(reference)], dim=1)
            shapes.append((1, reference.shape[-2] // 2, reference.shape[-1] // 2))
        velocity = transformer(
            hidden_states=tokens, timestep=time, img_shapes=[shapes] * len(x), **cond, return_dict=False
        )[0]
        return unpack_latents(velocity[:, :count], height, width)


class QwenImageEdit(QwenImage):
    pipeline, example = "QwenImageEditPlusPipeline", "Qwen/Qwen-Image-Edit-2509"
    uncond_prompt = "Edit this image."

    def load_text(self, dtype, device):
        from transformers import Qwen2VLImageProcessor

        # the whole processor would need torchvision, for the sake of videos
        self.image_processor = Qwen2VLImageProcessor.from_pretrained(
            self.args.pretrained_model_name_or_path,
            subfolder="processor",
            revision=self.args.revision,
            cache_dir=self.args.cache_dir,
        )
        pipeline = super().load_text(dtype, device, processor=None)
        pipeline.processor = functools.partial(self.process, pipeline.tokenizer)
        return pipeline

    def process(self, tokenizer, text, images, **kwargs):
        """What Qwen2VLProcessor makes of a text with a picture: as many places in it as the picture has patches."""
        from transformers import BatchFeature

        pixels = self.image_processor(images=images, return_tensors="pt")
        count = pixels["image_grid_thw"].prod().item() // self.image_processor.merge_size**2
        text = [text[0].replace("<|image_pad|>", "<|image_pad|>" * count)]
        return BatchFeature({**tokenizer(text, return_tensors="pt"), **pixels})

    def encode_prompt(self, pipeline, prompt, reference=None):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock

        width, height = stock.calculate_dimensions(stock.CONDITION_IMAGE_SIZE, reference.width / reference.height)
        embeds, _ = pipeline.encode_prompt(prompt, [pipeline.image_processor.resize(reference, height, width)])
        embeds = embeds[0, : self.args.max_sequence_length]
        mask = torch.ones(len(embeds), dtype=torch.long)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}


BACKBONES = {
    "flux": Flux,
    "sd3": StableDiffusion3,
    "sana": Sana,
    "openuni": OpenUni,
    "qwenimage": QwenImage,
    "qwenimage-edit": QwenImageEdit,
}


def predict_velocity(x, t, target, cond, *, transformer, backbone, dtype, two_times, autocast=nullcontext, seed=None):
    """The model's velocity [B, C, h, w], float32, at x [B, C, h, w] on the way from t to t' [B].

    With one time embedding only, the time it is told is t - t' / 2. Calls with one `seed` drop the same (dropout).
    """
    if seed is not None:
        torch.manual_seed(seed)
    time = torch.stack([t, target], dim=-1) if two_times else t - target / 2
    cond = {name: value.to(dtype) if value.is_floating_point() else value for name, value in cond.items()}
    with autocast():
        return backbone.predict(transformer, x.to(dtype), time, cond).float()


class TwoTimes:
    """For a time embedding to derive from too: one that is also told the target time, emb(t) + (t - t') emb2(t').

    Where t' = t the two agree, so that the model is as it was there; a model that is saved keeps its names for what
    it had before, and a stock pipeline, which knows of one time only, draws with it as before.
    """

    def forward(self, timestep, *args, **kwargs):
        if timestep.ndim == 1:
            return super().forward(timestep, *args, **kwargs)
        t, target = timestep.unbind(-1)
        embedded = super().forward(t, *args, **kwargs)
        second = self.target_timestep_embedder(self.time_proj(target).to(embedded.dtype))
        gap = (t - target) * (self.time_proj.scale / 1000)  # times come in units of 1 or of 1/1000
        return embedded + gap[:, None].to(embedded.dtype) * second


def add_target_time(transformer, time_module, init):
    """Gives the transformer a second time embedding: a copy of the first, one that says nothing yet (zero), or N(0,
    0.02)."""
    module = transformer.get_submodule(time_module)
    second = module.target_timestep_embedder = copy.deepcopy(module.timestep_embedder)
    if init == "zero":
        torch.nn.init.zeros_(second.linear_2.weight)
        torch.nn.init.zeros_(second.linear_2.bias)
    elif init == "normal":
        for parameter in second.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    module.__class__ = type(f"TwoTimes{type(module).__name__}", (TwoTimes, type(module)), {})


def load_two_times(transformer, time_module, folder):
    """Gives a transformer, saved in `folder` with a second time embedding and loaded without, that embedding."""
    prefix = f"{time_module}.target_timestep_embedder."
    saved = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    add_target_time(transformer, time_module, "copy")
    transformer.get_submodule(time_module).target_timestep_embedder.load_state_dict(saved)


# ---------------------------------------------------------------------------------------------------------------------
# Velocity of FLUX.1 beside image conditions (OminiControl)
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One condition: what it shows, its size in pixels, where its tokens stand, the adapter they pass."""

    type: str
    size: tuple[int, int]  # (height, width)
    position_delta: tuple[float, float] = (0, 0)  # (down, right), in tokens of 16 pixels of the image
    position_scale: float = 1.0  # image tokens per condition token in each direction
    adapter: str = "default"


def conditions_of(args, places=()):
    """The conditions of a run in the order of --condition_type; `places` are (delta, scale) that the data brings."""
    types, target, conditions = args.condition_type, args.target_size, []
    each = lambda values, i: None if not values else values[0] if len(values) == 1 else values[i]  # noqa: E731
    for i, kind in enumerate(types):
        size = each(args.condition_size, i) or (tuple(side // 2 for side in target) if kind == "sr" else target)
        delta = each(args.position_delta, i) or ((0, -size[1] // PATCH) if kind in BESIDE else (0, 0))
        scale = each(args.position_scale, i) or (target[0] / size[0] if delta == (0, 0) else 1.0)
        delta, scale = places[i] if places else (delta, scale)
        adapter = (
            (kind if types.count(kind) == 1 else f"{kind}_{i}") if args.adapter_per_condition else "_".join(types)
        )
        conditions.append(Condition(kind, size, delta, scale, adapter))
    return conditions


def adapter_names(conditions):
    return list(dict.fromkeys(condition.adapter for condition in conditions))


@dataclass
class Tokens:
    """Tokens of one condition: packed latents [B, N, 64], their ids [N, 3] or [B, N, 3], the LoRA they pass through.

    `valid` [B, N] is False for padding, which nothing attends to; None if there is no padding.
    """

    hidden_states: torch.Tensor
    ids: torch.Tensor
    adapters: tuple[str, ...] = ("default",)
    valid: torch.Tensor | None = None


@dataclass
class Branch:
    """What all blocks need to know of the tokens of one kind: text, image, condition 1, condition 2, ..."""

    temb: torch.Tensor  # [B, D], of its own noise level and guidance
    rotary: tuple[torch.Tensor, torch.Tensor]  # cos and sin [N, d] or [B, N, d]
    adapters: tuple[str, ...]
    sees: tuple[int, ...]  # the branches whose keys its queries meet
    valid: torch.Tensor | None


def condition_ids(height, width, position_delta=(0, 0), position_scale=1.0, device=None):
    """Position ids [h/2 * w/2, 3] of a condition's latents, h and w being `height` and `width`.

    id = scale (row, column) + (scale - 1) / 2 + delta: a condition's patch covers `position_scale` patches of the
    image in each direction and stands at their middle; `position_delta` (down, right) counts the image's patches of
    16 pixels (arXiv 2503.08280, section 3.2).
    """
    ids = image_ids(height, width, device)
    ids[:, 1:] = position_scale * ids[:, 1:] + (position_scale - 1) / 2 + torch.tensor(position_delta, device=device)
    return ids


def condition_tokens(condition_latents, conditions, hole=None):
    """[Tokens] of the latents [B, C, h, w] of each condition.

    Of token_integration only what lies outside the hole [B, h/2, w/2] becomes tokens (arXiv 2503.08280, section 3.3).
    """
    tokens = []
    for latents, condition in zip(condition_latents, conditions, strict=True):
        place = condition.position_delta, condition.position_scale
        states, ids, valid = pack_latents(latents), condition_ids(*latents.shape[-2:], *place, latents.device), None
        if condition.type == "token_integration":
            states, ids, valid = select_tokens(states, ids, ~hole.flatten(1))
        tokens.append(Tokens(states, ids, (condition.adapter,), valid))
    return tokens


def lora_linear(layer, hidden_states, adapters):
    """A linear layer with the LoRAs named in `adapters`, and not a product of any other."""
    if not hasattr(layer, "base_layer"):
        return layer(hidden_states)
    result = layer.base_layer(hidden_states)
    for name in adapters:
        if name in layer.lora_A:
            inputs = layer.lora_dropout[name](hidden_states.to(layer.lora_A[name].weight.dtype))
            update = layer.lora_B[name](layer.lora_A[name](inputs)) * layer.scaling[name]
            result = result + update.to(result.dtype)
    return result


def modulation(norm, branch, parts):
    """The `parts` vectors [B, 1, D] that an adaptive norm makes of a branch's time and guidance."""
    return lora_linear(norm.linear, norm.silu(branch.temb), branch.adapters)[:, None].chunk(parts, dim=-1)


def rotate(states, rotary):
    """Rotary embedding of queries or keys [B, N, heads, d]; every sample has its own positions if cos is [B, N, d]."""
    if rotary[0].ndim == 2:
        return apply_rotary_emb(states, rotary, sequence_dim=1)
    flat = apply_rotary_emb(states.flatten(0, 1)[None], [part.flatten(0, 1) for part in rotary], sequence_dim=1)
    return flat.view_as(states)


def project(attn, states, branch, *, query=True, context=False):
    """Queries (None without `query`), keys and values [B, N, heads, d] of a branch."""
    if context:
        layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
    else:
        layers, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
    q, k, v = (
        lora_linear(layer, states, branch.adapters).unflatten(-1, (-1, attn.head_dim)) if query or i else None
        for i, layer in enumerate(layers)
    )
    return rotate(norms[0](q), branch.rotary) if query else None, rotate(norms[1](k), branch.rotary), v


def attend(queries, keys, values, branches):
    """Attention of each branch to those it sees: [B, N, heads * d] per branch, None where there is no query.

    Branches that see the same are one call of scaled_dot_product_attention on exactly the keys they see.
    """
    attended, groups = [None] * len(queries), {}
    for i, query in enumerate(queries):
        if query is not None:
            groups.setdefault(branches[i].sees, []).append(i)
    for sees, members in groups.items():
        query = torch.cat([queries[i] for i in members], dim=1)
        key = torch.cat([keys[i] for i in sees], dim=1)
        value = torch.cat([values[i] for i in sees], dim=1)
        mask = None
        if any(branches[i].valid is not None for i in sees):
            valid = [(keys[i].new_ones(keys[i].shape[:2], dtype=bool), branches[i].valid) for i in sees]
            mask = torch.cat([every if some is None else some for every, some in valid], dim=1)[:, None, None]
        out = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
        )
        out = out.transpose(1, 2).flatten(2).split([queries[i].shape[1] for i in members], dim=1)
        for i, part in zip(members, out, strict=True):
            attended[i] = part
    return attended


def double_block(block, states, branches, stored):
    """One block with weights of its own for text. `states` [B, N, D] of each branch, None if `stored` has its keys."""
    norms = [block.norm1_context, *[block.norm1] * (len(states) - 1)]
    queries, keys, values, parts = ([None] * len(states) for _ in range(4))
    for i, (x, branch, norm) in enumerate(zip(states, branches, norms, strict=True)):
        if x is None:
            keys[i], values[i] = stored[i]
            continue
        shift, scale, *parts[i] = modulation(norm, branch, 6)
        normed = norm.norm(x) * (1 + scale) + shift
        queries[i], keys[i], values[i] = project(block.attn, normed, branch, context=i == 0)
    attended = attend(queries, keys, values, branches)
    results = []
    for i, (x, branch) in enumerate(zip(states, branches, strict=True)):
        if x is not None:
            gate, shift_mlp, scale_mlp, gate_mlp = parts[i]
            out = block.attn.to_add_out if i == 0 else block.attn.to_out[0]
            norm2, ff = (block.norm2_context, block.ff_context) if i == 0 else (block.norm2, block.ff)
            x = x + gate * lora_linear(out, attended[i], branch.adapters)
            inner = norm2(x) * (1 + scale_mlp) + shift_mlp
            inner = F.gelu(lora_linear(ff.net[0].proj, inner, branch.adapters), approximate="tanh")
            x = clip_half(x + gate_mlp * lora_linear(ff.net[2], inner, branch.adapters))
        results.append(x)
    return results, list(zip(keys, values, strict=True))


def single_block(block, states, branches, stored, wanted):
    """One block with the same weights for all. Only branches of `wanted` are continued, of the others only the keys
    and values are computed."""
    queries, keys, values, normed, gates = ([None] * len(states) for _ in range(5))
    for i, (x, branch) in enumerate(zip(states, branches, strict=True)):
        if x is None:
            keys[i], values[i] = stored[i]
            continue
        shift, scale, gates[i] = modulation(block.norm, branch, 3)
        normed[i] = block.norm.norm(x) * (1 + scale) + shift
        queries[i], keys[i], values[i] = project(block.attn, normed[i], branch, query=i in wanted)
    attended = attend(queries, keys, values, branches)
    results = [None] * len(states)
    for i in wanted:
        x, adapters = states[i], branches[i].adapters
        if x is not None:
            inner = block.act_mlp(lora_linear(block.proj_mlp, normed[i], adapters))
            inner = torch.cat([attended[i], inner], dim=-1)
            results[i] = clip_half(x + gates[i] * lora_linear(block.proj_out, inner, adapters))
    return results, list(zip(keys, values, strict=True))


def clip_half(states):
    """Keeps float16 finite, as diffusers' blocks do."""
    return states.clip(-65504, 65504) if states.dtype == torch.float16 else states


@functools.cache
def compiled(block_function):
    return torch.compile(block_function)


def omini_forward(
    transformer,
    *,
    hidden_states,
    encoder_hidden_states,
    pooled_projections,
    timestep,
    guidance,
    txt_ids,
    img_ids,
    conditions=(),
    independent_condition=False,
    image_adapters=(),
    image_valid=None,
    cache=None,
    compile_blocks=False,
):
    """A FluxTransformer2DModel's velocity [B, N, 64] of noisy image tokens beside conditions (arXiv 2411.15098).

    Arguments are those of the model's own forward, which this equals without conditions. Besides:
        conditions             list of Tokens; they pass the same weights and their own LoRA, at timestep 0, guidance 1
        independent_condition  a condition's tokens see only themselves; else also text and image (arXiv 2503.08280).
                               Two conditions never see each other.
        image_adapters         LoRAs, such as a style, that text and image pass through; without them these tokens meet
                               the base weights alone
        image_valid            [B, N], False for padding of the image tokens
        cache                  a list: if empty it is filled with the conditions' keys and values, else they are taken
                               from it and the conditions are not computed
    """
    linear = functools.partial(lora_linear, adapters=image_adapters)
    guided = guidance is not None
    time_text = transformer.time_text_embed
    text = linear(transformer.context_embedder, encoder_hidden_states)
    image = linear(transformer.x_embedder, hidden_states)
    scaled = [value.to(image.dtype) * 1000 for value in ((timestep, guidance) if guided else (timestep,))]
    temb = time_text(*scaled, pooled_projections)
    everything = tuple(range(2 + len(conditions)))
    branches = [
        Branch(temb, transformer.pos_embed(txt_ids), image_adapters, everything, None),
        Branch(temb, rotary_embedding(transformer, img_ids), image_adapters, everything, image_valid),
    ]
    states = [text, image]
    if conditions:
        zero = torch.zeros_like(scaled[0])
        condition_temb = time_text(*((zero, zero + 1000) if guided else (zero,)), pooled_projections)
    for i, condition in enumerate(conditions, start=2):
        sees = (i,) if independent_condition else (0, 1, i)
        rotary = rotary_embedding(transformer, condition.ids)
        branches.append(Branch(condition_temb, rotary, condition.adapters, sees, condition.valid))
        states.append(
            None if cache else lora_linear(transformer.x_embedder, condition.hidden_states, condition.adapters)
        )

    blocks = [(double_block, block, ()) for block in transformer.transformer_blocks]
    blocks += [(single_block, block, (everything,)) for block in transformer.single_transformer_blocks]
    if transformer.single_transformer_blocks:
        blocks[-1] = (*blocks[-1][:2], ((1,),))  # only the image leaves the model
    checkpointing = torch.is_grad_enabled() and transformer.gradient_checkpointing
    reuse = bool(cache)
    for i, (function, block, wanted) in enumerate(blocks):
        if compile_blocks and i < len(blocks) - 1:  # the last is unlike all others
            function = compiled(function)
        function = bound(function, block)
        inputs = (states, branches, cache[i] if reuse else None, *wanted)
        if checkpointing:
            states, stored = checkpoint_function(function, *inputs, use_reentrant=False)
        else:
            states, stored = function(*inputs)
        if cache is not None and not reuse:
            cache.append([None, None, *stored[2:]])
    shift_scale = lora_linear(
        transformer.norm_out.linear, transformer.norm_out.silu(temb).to(states[1].dtype), image_adapters
    )
    scale, shift = shift_scale[:, None].chunk(2, dim=-1)
    return linear(transformer.proj_out, transformer.norm_out.norm(states[1]) * (1 + scale) + shift)


def bound(function, module):
    """A module's `function`; that of a sharded one is its method, see `shard_omini`."""
    return getattr(module, "omini_forward", None) or functools.partial(function, module)


def shard_omini(transformer, device, dtype, compile_blocks):
    """`shard`, where `omini_forward` becomes a method of the model and of its blocks, whose calls FSDP2 sees."""
    shard(transformer, device, dtype)
    kinds = {double_block: transformer.transformer_blocks, single_block: transformer.single_transformer_blocks}
    for function, blocks in kinds.items():
        for block in blocks:
            block.omini_forward = functools.partial(compiled(function) if compile_blocks else function, block)
            register_fsdp_forward_method(block, "omini_forward")
    transformer.omini_forward = functools.partial(omini_forward, transformer)
    register_fsdp_forward_method(transformer, "omini_forward")


def rotary_embedding(transformer, ids):
    """cos and sin of ids [N, 3], or [B, N, d] each of ids [B, N, 3]."""
    if ids.ndim == 2:
        return transformer.pos_embed(ids)
    return [part.unflatten(0, ids.shape[:2]) for part in transformer.pos_embed(ids.flatten(0, 1))]

"""Makes the toy models: a small FLUX.1 pipeline and its Fill variant that know drawn scenes, and three others.

    python examples/toy/pretrain.py            # on two cores; continues where it was interrupted
    python examples/toy/pretrain.py --score    # measures what is in examples/toy
    python examples/toy/pretrain.py flux-128   # from flux, for 128 x 128 pixels, with shapes at more places
    python examples/toy/pretrain.py letters    # from flux, for the second world, see letters.py
    python examples/toy/pretrain.py flux2      # FLUX.2-klein in small, with the VAE of flux

The last three train on one core, and --score measures them too. Four stages make flux: the VAE; flow matching,
together with the text encoders; guidance, distilled into the guidance embedding; the Fill transformer. The random
numbers of a step depend on (stage, step, process) alone, so a rerun repeats itself.
"""

import json
import math
import random
import shutil
import string
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import Parser, check_folder
from common.flow_matching import add_noise
from common.latents import image_ids, pack_latents

from examples.toy import letters
from examples.toy.world import (
    COLOR_NAMES,
    COLORS,
    KINDS,
    SIZES,
    SUBJECTS,
    Scene,
    Shape,
    all_right,
    caption,
    draw,
    edge_overlap,
    foreground_mask,
    iou,
    mask_of,
    random_scene,
    random_subject,
    score_scene,
)
from train_influxedit import pack_fill_condition


HERE = Path(__file__).parent
WORDS = """
a an and at background centre image in left of on one outline photo picture right shape style the two with
TOK tok new object thing toy token
"""
WORDS = sorted({*WORDS.split(), *COLORS, *KINDS, *SIZES, *" ".join(SUBJECTS.values()).split()})
# (width, height): share of the steps, images per step and process
CANVASES = {
    (64, 64): (0.6, 64),
    (96, 64): (0.1, 48),
    (64, 96): (0.1, 48),
    (128, 64): (0.05, 40),
    (128, 128): (0.15, 24),
}
ONLY_64 = {(64, 64): (1.0, 64)}
LARGE_CANVASES = {(128, 128): (0.8, 32), (96, 64): (0.1, 64), (64, 96): (0.1, 64)}
WIDE_CANVASES = {(128, 128): (0.5, 32), (96, 64): (0.25, 64), (64, 96): (0.25, 64)}
# flux-128's stages of flow matching: steps, learning rate, centre of the noise levels. Four times the tokens of a
# 64 x 64 picture need twice the noise (arXiv 2403.03206): a centre higher by log 2 than the one of flux
LARGE_STAGES = {
    "large-flow": (6000, 4e-3, 1.0),
    "large-flow-again": (5000, 3e-3, 1.0),
    "large-flow-high-noise": (10000, 3e-3, 1.5),
}
# 96 x 64 had a tenth of the batches so far
WIDE_STAGES = {"large-flow-wide": (6000, 2e-3, 1.3), "large-flow-wide-again": (7500, 3e-3, 1.3)}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FLUX2_STEPS = 1500
TRAINED_LAYERS = (0, 1, 9, 18)  # of Qwen3, which the pipeline reads after 9, 18 and 27 layers


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def new_tokenizers():
    """A CLIP tokenizer whose merges make every word of the world one token, and a T5 one of words and characters."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([word.lower() for word in WORDS], trainer)
    bpe = json.loads(bpe.to_str())["model"]
    vocab = bpe["vocab"]
    for token in [*(f"{character}</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]:
        vocab.setdefault(token, len(vocab))  # the end token last: CLIP pools at the highest id
    clip = CLIPTokenizer(vocab=vocab, merges=[tuple(merge) for merge in bpe["merges"]], model_max_length=77)
    characters = [(character, -8.0) for character in string.printable.strip() if character != ","]
    pieces = [(f"▁{word}", -2.0) for word in WORDS] + [(",", -2.0), ("▁", -3.0)] + characters
    t5 = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces], extra_ids=0, model_max_length=512)
    return clip, t5


def new_vae(channels=(16, 32, 64, 64), groups=8):
    """Eight times smaller latents of 16 channels, as FLUX's."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def new_text_encoders(clip_tokenizer, t5_tokenizer, width=64, layers=2):
    """CLIP and T5, both `width` wide."""
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=0,  # these three as in FLUX.1-dev's own file
        eos_token_id=2,
        pad_token_id=1,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )
    return CLIPTextModel(clip), T5EncoderModel(t5)


def new_transformer(heads=4, layers=2, single_layers=4, text_width=64):
    """FLUX.1-dev in small: guidance embedding, 64 input channels, heads 32 wide; adaLN starts at zero."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("linear.weight") and "norm" in name or name == "proj_out.weight":
            torch.nn.init.zeros_(parameter)
    return transformer


def new_pipeline(pipeline_class=FluxPipeline, **components):
    """A pipeline with FLUX.1-dev's scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return pipeline_class(scheduler=scheduler, **components)


def new_qwen_tokenizer():
    """Qwen's tokenizer, with merges that make every word of the world one token, also after a space."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    words = [*WORDS, "user", "assistant"]
    bpe.train_from_iterator([space + word for word in words for space in ("", " ")], trainer)
    bpe = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=512,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_qwen(tokenizer, layers=28, width=48):
    """Qwen3 in small; its embeddings outweigh what its layers add at first."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    qwen = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(qwen.model.embed_tokens.weight, std=0.5)
    return qwen


def with_all_layers(qwen, tokenizer):
    """A Qwen3 of 28 layers that has the given one's at TRAINED_LAYERS; the others pass on what they get."""
    full = new_qwen(tokenizer)
    full.model.embed_tokens.load_state_dict(qwen.model.embed_tokens.state_dict())
    for parameter in full.model.layers.parameters():
        if parameter.ndim == 2:
            torch.nn.init.zeros_(parameter)
    for place, layer in zip(TRAINED_LAYERS, qwen.model.layers, strict=False):
        full.model.layers[place].load_state_dict(layer.state_dict())
    return full


def new_flux2_transformer(heads=4, layers=2, single_layers=4, text_width=3 * 48):
    """FLUX.2-klein in small: four position axes, no guidance embedding, 64 input channels; adaLN starts at zero."""
    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        guidance_embeds=False,
        axes_dims_rope=(4, 10, 10, 8),
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name or name in ("norm_out.linear.weight", "proj_out.weight"):
            torch.nn.init.zeros_(parameter)
    return transformer


def flux2_vae():
    """The VAE of examples/toy/flux as FLUX.2's class, with statistics of scenes for its shift and scale."""
    trained = AutoencoderKL.from_pretrained(HERE / "flux" / "vae")
    names = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
    names = (*names, "down_block_types", "up_block_types", "use_quant_conv", "use_post_quant_conv")
    vae = AutoencoderKLFlux2(**{name: trained.config[name] for name in names})
    vae.load_state_dict(trained.state_dict(), strict=False)  # all but the statistics
    vae.eval().requires_grad_(False)
    rng = random.Random("normalise")
    means = vae.encode(to_tensor([draw(random_scene(rng)) for _ in range(500)])).latent_dist.mean
    patches = Flux2KleinPipeline._patchify_latents(means)
    vae.bn.running_var, vae.bn.running_mean = torch.var_mean(patches, dim=(0, 2, 3))
    return vae


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def fit(stage, models, loss_of, *, steps, lr, work_dir, hold=0.3, ema_decay=0.999):
    """Trains `models` on `loss_of(progress, rng)` and leaves the moving average of their weights in them.

    Hidden matrices go to Muon, all else to AdamW at half its learning rate; both update float32 copies. The processes
    average their gradients. The state in `work_dir` is written every 200 steps and lets an interrupted run continue.
    """
    rank, state_file = dist.get_rank(), work_dir / f"{stage}.pt"
    named = [pair for model in models for pair in model.named_parameters() if pair[1].requires_grad]
    parameters = [parameter for _, parameter in named]
    is_hidden = [p.ndim in (2, 4) and ("blocks." in name or "mid_block" in name) for name, p in named]
    masters = [p.detach().float().clone() for p in parameters]
    masters = [m.reshape(len(m), -1) if matrix else m for m, matrix in zip(masters, is_hidden, strict=True)]
    masters = [torch.nn.Parameter(master) for master in masters]
    averages = [master.detach().clone() for master in masters]
    muon = torch.optim.Muon(
        [m for m, matrix in zip(masters, is_hidden, strict=True) if matrix],
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [m for m, matrix in zip(masters, is_hidden, strict=True) if not matrix], betas=(0.9, 0.99), weight_decay=0.0
    )
    state = {"step": 0}
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        muon.load_state_dict(state["muon"])
        adamw.load_state_dict(state["adamw"])
        for master, average, pair in zip(masters, averages, state["weights"], strict=True):
            master.data.copy_(pair[0])
            average.copy_(pair[1])
    copy_weights(masters, parameters)
    progress_bar = tqdm(total=steps, initial=state["step"], desc=stage, disable=rank != 0, mininterval=10)
    smooth_loss = None
    for step in range(state["step"], steps):
        progress = step / steps
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (progress - hold) / (1 - hold))))
        rate = lr * min(1.0, (step + 1) / 100) * cosine
        for optimizer, scale in ((muon, 1.0), (adamw, 0.5)):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        rng = random.Random(f"{stage}/{step}/{rank}")
        torch.manual_seed(rng.getrandbits(60))
        loss = loss_of(progress, rng)
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten() for p in parameters])
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        gradient *= min(1.0, 1.0 / gradient.norm().item())
        for parameter, master, part in zip(
            parameters, masters, gradient.split([m.numel() for m in masters]), strict=True
        ):
            parameter.grad, master.grad = None, part.view_as(master)
        muon.step()
        adamw.step()
        copy_weights(masters, parameters)
        torch._foreach_lerp_(averages, [m.data for m in masters], 1 - min(ema_decay, (1 + step) / (10 + step)))
        smooth_loss = loss.item() if smooth_loss is None else 0.98 * smooth_loss + 0.02 * loss.item()
        progress_bar.update()
        progress_bar.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            weights = [(m.data, a) for m, a in zip(masters, averages, strict=True)]
            new = {"step": step + 1, "weights": weights, "muon": muon.state_dict(), "adamw": adamw.state_dict()}
            torch.save(new, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").rename(state_file)
    for model in models:
        model.float()
    copy_weights(averages, parameters)


def copy_weights(sources, parameters):
    """Float32 copies, matrices perhaps flattened, back into the parameters."""
    for source, parameter in zip(sources, parameters, strict=True):
        parameter.data.copy_(source.data.view_as(parameter))


def to_tensor(images):
    """PIL images of one size as [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def train_vae(vae, work_dir):
    """Absolute and squared error, a little KL divergence; first on crops, which are cheaper.

    Then the decoder alone, on collages too: it has to draw what no scene of the pretraining shows.
    """

    def loss_of(progress, rng):
        crop, count = (32, 64) if progress < 0.4 else (64, 32)
        scenes = [random_scene(rng, outline=0.15) for _ in range(count)]
        images = []
        for scene in scenes:
            x, y = rng.randint(0, 64 - crop), rng.randint(0, 64 - crop)
            images.append(draw(scene).crop((x, y, x + crop, y + crop)))
        return reconstruction_loss(vae, to_tensor(images))

    def decoder_loss_of(progress, rng):
        scenes = [random_scene(rng, outline=0.2) if rng.random() < 0.5 else collage(rng) for _ in range(32)]
        return reconstruction_loss(vae, to_tensor([draw(scene) for scene in scenes]))

    fit("vae", [vae], loss_of, steps=500, lr=4e-3, work_dir=work_dir, hold=0.4)
    vae.encoder.requires_grad_(False)
    fit("decoder", [vae.decoder], decoder_loss_of, steps=500, lr=3e-3, work_dir=work_dir)


def reconstruction_loss(vae, images):
    """Of images [B, 3, H, W]; a frozen encoder's divergence is constant."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - images
    divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
    return error.abs().mean() + error.square().mean() + 1e-3 * divergence


def collage(rng):
    """Three shapes of any kind, colour and size anywhere, one over the other."""
    shapes = [
        Shape(rng.choice(KINDS), color, rng.random(), rng.random(), rng.uniform(0.06, 0.32), rng.random() < 0.3)
        for color in rng.sample(COLOR_NAMES, 4)
    ]
    return Scene(shapes.pop().color, tuple(shapes))


def normalise(vae):
    """Narrows the VAE's posterior and measures the shift and scale of its latents."""
    vae.eval().requires_grad_(False)
    vae.encoder.conv_out.bias[16:] -= 2 * math.log(10)  # a tenth of the spread: the decoder does without its noise
    rng = random.Random("normalise")
    means = vae.encode(to_tensor([draw(random_scene(rng)) for _ in range(500)])).latent_dist.mean
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())


@torch.no_grad()
def encode(vae, images):
    """Normalised latents [N, 16, h, w] of images [N, 3, H, W]; FLUX.2's are patches [N, 64, h/2, w/2]."""
    with torch.autocast("cpu", torch.bfloat16):
        means = torch.cat([vae.encode(part).latent_dist.mean.float() for part in images.split(50)])
    if isinstance(vae, AutoencoderKLFlux2):
        shift, var = vae.bn.running_mean.view(1, -1, 1, 1), vae.bn.running_var.view(1, -1, 1, 1)
        return (Flux2KleinPipeline._patchify_latents(means) - shift) / torch.sqrt(var + vae.config.batch_norm_eps)
    return (means - vae.config.shift_factor) * vae.config.scaling_factor


def make_pool(vae, rank, share_of_pool=1.0, masked=False, canvases=CANVASES, new_scene=random_scene, draw=draw):
    """{canvas: (scenes, latents [N, 16, h, w], Fill conditions or None)}: encoded once, met again in other words.

    new_scene(rng, aspect) makes a scene, draw(scene, width, height) its image.
    """
    pool = {}
    for canvas, (share, _) in tqdm(canvases.items(), desc="encoding scenes", disable=rank != 0):
        rng = random.Random(f"pool/{rank}/{canvas}/{masked}")
        count = int((16000 if share > 0.5 else 20000 * share) * share_of_pool)
        scenes = [new_scene(rng, canvas[0] / canvas[1]) for _ in range(count)]
        latents, conditions = [], []
        for i in range(0, count, 50):
            images = to_tensor([draw(scene, *canvas) for scene in scenes[i : i + 50]])
            latents.append(encode(vae, images))
            if masked:
                masks = torch.stack([random_mask(rng, *canvas) for _ in images])
                conditions.append(pack_fill_condition(encode(vae, images * (1 - masks)), masks))
        pool[canvas] = scenes, torch.cat(latents), torch.cat(conditions) if masked else None
    return pool


def random_mask(rng, width, height):
    """[1, height, width], 1 where Fill is to paint: a half, a rectangle or everything."""
    mask, kind = torch.zeros(1, height, width), rng.random()
    if kind < 0.15:
        mask[:] = 1
    elif kind < 0.5:
        axis = rng.choice((1, 2))
        rng.choice(mask.chunk(2, dim=axis)).fill_(1)
    else:
        x, y = sorted(rng.sample(range(0, width + 1, 4), 2)), sorted(rng.sample(range(0, height + 1, 4), 2))
        mask[:, y[0] : y[1], x[0] : x[1]] = 1
    return mask


def draw_batch(pool, rng, length, canvases=CANVASES, caption=caption):
    """Part of a pool for one step: (tokens, conditions, captions, (width, height)); fewer for longer texts.

    Longer texts than 24 tokens come with the first canvas alone.
    """
    shares = [share for share, _ in canvases.values()]
    canvas = rng.choices(list(canvases), shares)[0] if length == 24 else next(iter(canvases))
    scenes, latents, conditions = pool[canvas]
    image_tokens = canvas[0] * canvas[1] // 256
    count = canvases[canvas][1] * (24 + image_tokens) // (length + image_tokens)
    picks = [rng.randrange(len(scenes)) for _ in range(count)]
    captions = [caption(scenes[i], rng, canvas[0] / canvas[1]) for i in picks]
    return pack_latents(latents[picks]), None if conditions is None else conditions[picks], captions, canvas


def predict(models, tokens, captions, timesteps, guidance, canvas, length=24):
    """The velocities of packed latents [B, N, 64], with captions of at most `length` T5 tokens."""
    transformer, clip, t5, clip_tokenizer, t5_tokenizer = models
    clip_ids = clip_tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    end = clip_tokenizer.eos_token_id
    clip_ids = clip_ids[:, : int((clip_ids != end).sum(1).max()) + 1]  # CLIP is causal: the padding changes nothing
    t5_ids = t5_tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    dtype = transformer.dtype
    return transformer(
        hidden_states=tokens.to(dtype),
        encoder_hidden_states=t5(t5_ids.input_ids)[0].to(dtype),
        pooled_projections=clip(clip_ids).pooler_output.to(dtype),
        timestep=timesteps.to(dtype),
        guidance=guidance.to(dtype),
        img_ids=image_ids(canvas[1] // 8, canvas[0] // 8),
        txt_ids=torch.zeros(length, 3),
        return_dict=False,
    )[0].float()


def noise_levels(count, centre=0.8):
    """Noise levels [count] with more weight on high ones, where a scene's layout is decided."""
    return torch.sigmoid(centre + 1.2 * torch.randn(count))


def log_uniform(count, maximum):
    """[count] guidance scales between 1 and `maximum`."""
    return torch.exp(torch.rand(count) * math.log(maximum))


def train_flow(stage, models, pool, work_dir, *, steps, lr, canvases=CANVASES, caption=caption, centre=0.8):
    """Flow matching; the guidance embedding is fed anything and learns to be ignored.

    A Fill transformer is trained alone, another one with those of its text encoders that are not frozen.
    """
    is_fill = models[0].config.in_channels > 64

    def loss_of(progress, rng):
        tokens, conditions, captions, canvas = draw_batch(pool, rng, 24, canvases, caption)
        timesteps, noise = noise_levels(len(tokens), centre), torch.randn_like(tokens)
        guidance = log_uniform(len(tokens), 40)
        noisy = add_noise(tokens, noise, timesteps)
        noisy = torch.cat([noisy, conditions], dim=-1) if is_fill else noisy
        velocity = predict(models, noisy, captions, timesteps, guidance, canvas)
        return (velocity - (noise - tokens)).square().mean()

    fit(stage, models[:1] if is_fill else models[:3], loss_of, steps=steps, lr=lr, work_dir=work_dir)


def predict_flux2(models, tokens, captions, timesteps, length=32):
    """The velocities of packed latents [B, N, 64] of squares, with captions of `length` tokens, template included."""
    transformer, qwen, tokenizer = models
    chats = [[{"role": "user", "content": text}] for text in captions]
    texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    states = qwen(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states
    prompt_embeds = torch.cat(states[2:5], dim=-1)  # of a model that has TRAINED_LAYERS alone, and one more
    dtype, side = transformer.dtype, math.isqrt(tokens.shape[1])
    return transformer(
        hidden_states=tokens.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        timestep=timesteps.to(dtype),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(prompt_embeds),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(tokens.new_empty(len(tokens), 1, side, side)),
        return_dict=False,
    )[0].float()


def train_flux2_flow(models, pool, work_dir):
    """Flow matching at 64 x 64 pixels; no guidance is distilled: the pipeline has a classifier-free one."""
    scenes, latents, _ = pool[64, 64]

    def loss_of(progress, rng):
        picks = [rng.randrange(len(scenes)) for _ in range(64)]
        tokens = latents[picks].flatten(2).transpose(1, 2)
        captions = [caption(scenes[i], rng) for i in picks]
        timesteps, noise = noise_levels(len(tokens)), torch.randn_like(tokens)
        velocity = predict_flux2(models, add_noise(tokens, noise, timesteps), captions, timesteps)
        return (velocity - (noise - tokens)).square().mean()

    fit("flux2-flow", models[:2], loss_of, steps=FLUX2_STEPS, lr=5e-3, work_dir=work_dir, ema_decay=0.995)


def distil_guidance(stage, teacher, models, pool, work_dir, *, steps, canvases=CANVASES, caption=caption, centre=0.8):
    """The guidance embedding learns what classifier-free guidance does, at all text lengths (arXiv 2210.03142)."""
    teacher = (teacher.requires_grad_(False), *models[1:])

    def loss_of(progress, rng):
        length = rng.choices((24, 48, 512), (0.5, 0.2, 0.3))[0]
        tokens, _, captions, canvas = draw_batch(pool, rng, length, canvases, caption)
        timesteps, noise = noise_levels(len(tokens), centre), torch.randn_like(tokens)
        guidance = log_uniform(len(tokens), 6)
        noisy = add_noise(tokens, noise, timesteps)
        with torch.no_grad():
            conditional, unconditional = (
                predict(teacher, noisy, texts, timesteps, torch.ones(len(tokens)), canvas)
                for texts in (captions, [""] * len(tokens))
            )
        target = unconditional + guidance.view(-1, 1, 1) * (conditional - unconditional)
        return (predict(models, noisy, captions, timesteps, guidance, canvas, length) - target).square().mean()

    fit(stage, models[:1], loss_of, steps=steps, lr=2e-3, work_dir=work_dir)


def copy_of(transformer, **config):
    """A float32 copy; a wider input layer gets zeros for its new channels."""
    arguments = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    copied = FluxTransformer2DModel(**arguments | config)
    state = {name.replace("_orig_mod.", ""): value.float() for name, value in transformer.state_dict().items()}
    weight = torch.zeros_like(copied.x_embedder.weight)
    weight[:, : state["x_embedder.weight"].shape[1]] = state["x_embedder.weight"]
    copied.load_state_dict({**state, "x_embedder.weight": weight})
    return copied


def fast(transformer):
    """bfloat16, compiled, and an attention whose backward pass is not slow on a CPU."""
    transformer.to(torch.bfloat16).set_attention_backend("_native_math")
    transformer.compile_repeated_blocks(dynamic=False)
    return transformer


def begin(rank, work_dir, processes):
    """What each training process does first."""
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = 64  # one per canvas, text length and stage
    rendezvous = f"file://{work_dir.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    torch.manual_seed(0)


def load_flux(work_dir):
    """(the pipeline in examples/toy/flux, its text encoders and tokenizers), for the one process of a training."""
    begin(0, work_dir, processes=1)
    pipeline = FluxPipeline.from_pretrained(HERE / "flux")
    pipeline.vae.float()
    return pipeline, (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.tokenizer, pipeline.tokenizer_2)


def save_with(folder, **trained):
    """A copy of examples/toy/flux with these modules in place of its own."""
    shutil.copytree(HERE / "flux", HERE / folder, dirs_exist_ok=True)
    for name, module in trained.items():
        module.save_pretrained(HERE / folder / name)


def worker(rank, work_dir):
    """One of the two training processes; the first one saves the pipelines."""
    begin(rank, work_dir, processes=2)
    vae = new_vae()
    train_vae(vae, work_dir)
    normalise(vae)
    tokenizers = new_tokenizers()
    texts = *new_text_encoders(*tokenizers), *tokenizers
    flow = fast(new_transformer())
    pool = make_pool(vae, rank)
    train_flow("flow", (flow, *texts), pool, work_dir, steps=7000, lr=5e-3)
    for text_encoder in texts[:2]:
        text_encoder.requires_grad_(False)
    guided = fast(copy_of(flow))
    distil_guidance("guidance", fast(copy_of(flow)), (guided, *texts), pool, work_dir, steps=1000)
    fill = fast(copy_of(flow, in_channels=384, out_channels=64))
    fill_pool = make_pool(vae, rank, share_of_pool=0.4, masked=True)
    train_flow("fill", (fill, *texts), fill_pool, work_dir, steps=1500, lr=2e-3)
    if rank == 0:
        vae.half()  # the text encoders stay in float32: transformers would load them in the dtype of their files
        for pipeline_class, transformer, folder in (
            (FluxPipeline, guided, "flux"),
            (FluxFillPipeline, fill, "flux-fill"),
        ):
            pipeline = new_pipeline(
                pipeline_class,
                vae=vae,
                text_encoder=texts[0],
                text_encoder_2=texts[1],
                tokenizer=texts[2],
                tokenizer_2=texts[3],
                transformer=copy_of(transformer).half(),
            )
            pipeline.save_pretrained(HERE / folder)


def large_worker(rank, work_dir):
    """128 x 128 pixels, with shapes at more places; all but the transformer stays as it is."""
    pipeline, texts = load_flux(work_dir)
    for module in (pipeline.vae, *texts[:2]):
        module.requires_grad_(False)
    new_scene = partial(random_scene, places=8)
    flow = pipeline.transformer
    for canvases, stages in ((LARGE_CANVASES, LARGE_STAGES), (WIDE_CANVASES, WIDE_STAGES)):
        pool = make_pool(pipeline.vae, rank, share_of_pool=0.8, canvases=canvases, new_scene=new_scene)
        for stage, (steps, lr, centre) in stages.items():
            flow = fast(copy_of(flow))
            train_flow(stage, (flow, *texts), pool, work_dir, steps=steps, lr=lr, canvases=canvases, centre=centre)
    guided, settings = fast(copy_of(flow)), {"canvases": canvases, "centre": 1.0}
    distil_guidance("large-guidance", fast(copy_of(flow)), (guided, *texts), pool, work_dir, steps=500, **settings)
    save_with("flux-128", transformer=copy_of(guided).half())


def letters_worker(rank, work_dir):
    """The second world, most of whose words the tokenizers spell; of the VAE, the encoder stays as it is."""
    pipeline, texts = load_flux(work_dir)
    vae = pipeline.vae
    vae.encoder.requires_grad_(False)

    def loss_of(progress, rng):
        images = [draw(collage(rng)) for _ in range(8)] + [letters.draw(letters.random_scene(rng)) for _ in range(24)]
        return reconstruction_loss(vae, to_tensor(images))

    fit("letters-decoder", [vae.decoder], loss_of, steps=400, lr=2e-3, work_dir=work_dir)
    vae.eval().requires_grad_(False)
    pool = make_pool(vae, rank, canvases=ONLY_64, new_scene=letters.random_scene, draw=letters.draw)
    settings = {"canvases": ONLY_64, "caption": letters.caption}
    flow = fast(copy_of(pipeline.transformer))
    train_flow("letters-flow", (flow, *texts), pool, work_dir, steps=3500, lr=4e-3, **settings)
    for text_encoder in texts[:2]:
        text_encoder.requires_grad_(False)
    guided = fast(copy_of(flow))
    distil_guidance("letters-guidance", fast(copy_of(flow)), (guided, *texts), pool, work_dir, steps=500, **settings)
    vae.register_to_config(_name_or_path="")  # not this machine's
    modules = {"vae": vae.half(), "text_encoder": texts[0], "text_encoder_2": texts[1]}
    save_with("letters", transformer=copy_of(guided).half(), **modules)


def flux2_worker(rank, work_dir):
    """The one process of FLUX.2's training, which saves the pipeline."""
    begin(rank, work_dir, processes=1)
    vae = flux2_vae()
    tokenizer = new_qwen_tokenizer()
    qwen = new_qwen(tokenizer, layers=len(TRAINED_LAYERS) + 1)  # the last one's output is normalized, and not read
    qwen.model.layers[-1].requires_grad_(False)
    qwen.model.norm.requires_grad_(False)
    transformer = fast(new_flux2_transformer())
    pool = make_pool(vae, rank, share_of_pool=0.4, canvases=ONLY_64)
    train_flux2_flow((transformer, qwen, tokenizer), pool, work_dir)
    state = {name.replace("_orig_mod.", ""): value for name, value in transformer.state_dict().items()}
    trained = new_flux2_transformer()
    trained.load_state_dict(state)
    pipeline = new_pipeline(
        Flux2KleinPipeline,
        vae=vae.half(),
        text_encoder=with_all_layers(qwen, tokenizer),
        tokenizer=tokenizer,
        transformer=trained.half(),
    )
    pipeline.save_pretrained(HERE / "flux2")


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of two arrays of pixels in 0..255."""
    return 10 * math.log10(255**2 / np.square(np.float64(a) - np.float64(b)).mean())


def sample(pipeline, captions, seed, *, size=(64, 64), length=32, guidance=3.5, **inputs):
    """One image per caption in 20 steps, all else as the pipeline does it."""
    images = []
    for i in range(0, len(captions), 64):
        images += pipeline(
            prompt=captions[i : i + 64],
            width=size[0],
            height=size[1],
            num_inference_steps=20,
            guidance_scale=guidance,
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(seed * 1000 + i),
            **{name: values[i : i + 64] for name, values in inputs.items()},
        ).images
    return images


MEASURE = "background / foreground / shape"


def cells(images, scenes, score_scene=score_scene):
    """Mean scores of background, foreground and shape, 0 to 100."""
    scores = [score_scene(image, scene) for image, scene in zip(images, scenes, strict=True)]
    names = MEASURE.split(" / ")
    return " / ".join(f"{100 * np.mean([score[name] for score in scores]):.0f}" for name in names)


def row(*cells):
    """Prints a row of a Markdown table."""
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def load(pipeline_class, folder):
    """A pipeline of examples/toy, quiet."""
    pipeline = pipeline_class.from_pretrained(HERE / folder)
    pipeline.set_progress_bar_config(desc="sampling", leave=False)
    return pipeline


def reconstructed(vae, images):
    """PSNR in dB of what a VAE makes of PIL images of one size."""
    pixels = to_tensor(images)
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    return psnr((decoded + 1) * 127.5, (pixels + 1) * 127.5)


def overlaps(images, scenes, size=(64, 64)):
    """Mean overlap of images with given scenes that their captions do not tell: of the shapes, of all edges."""
    pairs = list(zip(images, scenes, strict=True))
    shapes = np.mean([iou(foreground_mask(image), mask_of(scene, *size)) for image, scene in pairs])
    edges = np.mean([edge_overlap(image, draw(scene, *size)) for image, scene in pairs])
    return f"{shapes:.2f} / {edges:.2f}"


def score(count=256):
    """Measures examples/toy/flux and examples/toy/flux-fill."""
    flux, fill = load(FluxPipeline, "flux"), load(FluxFillPipeline, "flux-fill")
    rng = random.Random("score")

    subjects = [random_subject(rng, name)[0] for name in SUBJECTS for _ in range(64)]
    for name, scenes, bar in (
        ("scenes", [random_scene(rng, outline=0) for _ in range(128)], 32),
        ("outlines", [random_scene(rng, outline=1) for _ in range(128)], 29),
        ("subjects", subjects, 29),
    ):
        images = [draw(scene) for scene in scenes]
        row(f"VAE, PSNR of {name}", f"{reconstructed(flux.vae, images):.1f} dB", f">= {bar}")

    def single_scenes(size=(64, 64)):
        aspect = size[0] / size[1]
        scenes = [random_scene(rng, aspect, pair=0, outline=0) for _ in range(count)]
        return scenes, [caption(scene) for scene in scenes]

    scenes, captions = single_scenes()
    for seed in range(3):
        images = sample(flux, captions, seed, length=512)
        row(f"{MEASURE}, seed {seed}", cells(images, scenes), ">= 99 / 98 / 90")
    images = sample(flux, captions, 0)
    row(f"{MEASURE}, text length 32", cells(images, scenes), "within 5 of length 512")
    row("caption only: mask IoU / edge overlap with the scene", overlaps(images, scenes), "<= .35 / .2")
    for guidance in (1.0, 2.0, 5.0):
        images = sample(flux, captions, 0, guidance=guidance)
        row(f"{MEASURE}, guidance {guidance:g}", cells(images, scenes), "higher guidance, higher score")
    for size in ((128, 128), (96, 64)):
        scenes, captions = single_scenes(size)
        images = sample(flux, captions, 0, size=size)
        row(f"{MEASURE}, {size[0]} x {size[1]}", cells(images, scenes), "shape >= 85")

    pair_rng = random.Random("pairs")  # its own: the rows below keep their scenes
    for size in ((64, 64), (128, 64)):
        pairs = [random_scene(pair_rng, size[0] / size[1], pair=1, outline=0) for _ in range(count)]
        images = sample(flux, [caption(scene) for scene in pairs], 0, size=size)
        drawn = cells([draw(scene, *size) for scene in pairs], pairs)
        row(f"{MEASURE} of two shapes, {size[0]} x {size[1]}", cells(images, pairs), f"as drawn: {drawn}")

    scenes, captions = single_scenes()
    originals = [draw(scene) for scene in scenes]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    seen = [np.asarray(image)[:, :32] for image in originals]
    half_psnr = lambda images: np.mean([psnr(np.asarray(i)[:, :32], s) for i, s in zip(images, seen, strict=True)])  # noqa: E731
    masks = [mask] * count
    filled = half_psnr(sample(fill, captions, 0, image=originals, mask_image=masks))
    wrong = half_psnr(sample(fill, captions, 0, image=originals[1:] + originals[:1], mask_image=masks))
    plain = half_psnr(sample(flux, captions, 0))
    row("Fill, PSNR of the visible half", f"{filled:.1f} dB", f">= {plain + 8:.1f}: text-to-image {plain:.1f} + 8")
    row("Fill, the same with another scene's image", f"{wrong:.1f} dB", "clearly lower")
    shown = [scene for scene in scenes if scene.shapes[0].x <= 0.5]
    images = sample(fill, [""] * len(shown), 0, image=[draw(s) for s in shown], mask_image=masks[: len(shown)])
    row("Fill, all right without a caption, shape at least half visible", f"{all_right(images, shown):.0f}", ">= 60")


def score_large(count=256):
    """Measures examples/toy/flux-128, on shapes at more places."""
    pipeline = load(FluxPipeline, "flux-128")
    rng = random.Random("score")
    scenes = [random_scene(rng, 1.5, pair=0, outline=0, places=8) for _ in range(count)]
    images = sample(pipeline, [caption(scene) for scene in scenes], 0, size=(96, 64))
    row(f"{MEASURE}, 96 x 64", cells(images, scenes), "shape >= 85")
    square = (128, 128)
    scenes = [random_scene(rng, pair=0, outline=0, places=8) for _ in range(count)]
    captions = [caption(scene) for scene in scenes]
    for seed in range(3):
        images = sample(pipeline, captions, seed, size=square)
        row(f"{MEASURE}, 128 x 128, seed {seed}", cells(images, scenes), "shape >= 85")
    row("caption only: mask IoU / edge overlap with the scene", overlaps(images, scenes, square), "<= .35 / .2")
    images = sample(pipeline, captions, 0, size=square, guidance=1.0)
    row(f"{MEASURE}, 128 x 128, guidance 1", cells(images, scenes), "higher guidance, higher score")


def score_letters(count=256):
    """Measures examples/toy/letters."""
    pipeline = load(FluxPipeline, "letters")
    rng = random.Random("score")
    scenes = [letters.random_scene(rng) for _ in range(count)]
    row("VAE, PSNR of letters", f"{reconstructed(pipeline.vae, [letters.draw(scene) for scene in scenes]):.1f} dB", "")
    subjects = [letters.draw(letters.random_subject(rng, "glyph")[0]) for _ in range(64)]
    row("VAE, PSNR of subjects", f"{reconstructed(pipeline.vae, subjects):.1f} dB", "")
    captions = [letters.caption(scene) for scene in scenes]
    for seed in range(3):
        images = sample(pipeline, captions, seed)
        row(f"{MEASURE}, seed {seed}", cells(images, scenes, letters.score_scene), "shape >= 85")
    images = sample(pipeline, captions, 0, guidance=1.0)
    row(f"{MEASURE}, guidance 1", cells(images, scenes, letters.score_scene), "higher guidance, higher score")


def score_flux2(count=256):
    """Measures examples/toy/flux2, with guidance and without."""
    pipeline = load(Flux2KleinPipeline, "flux2")
    rng = random.Random("score")
    scenes = [random_scene(rng, pair=0, outline=0) for _ in range(count)]
    captions = [caption(scene) for scene in scenes]
    for guidance, bar in ((4.0, ">= 95 / 95 / 80"), (1.0, "guidance 4 scores higher")):
        images = sample(pipeline, captions, 0, guidance=guidance)
        row(f"{MEASURE}, guidance {guidance:g}", cells(images, scenes), bar)


# how each model is trained, by how many processes, and how it is measured
MODELS = {
    "flux": (worker, 2, score),
    "flux-128": (large_worker, 1, score_large),
    "letters": (letters_worker, 1, score_letters),
    "flux2": (flux2_worker, 1, score_flux2),
}


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0], takes="[MODEL]")
    parser.add_argument("model", nargs="?", choices=list(MODELS), default="flux", help="what is made or measured")
    parser.add_argument("--work_dir", type=Path, default=Path("toy-pretraining"), help="states of the stages")
    parser.add_argument("--score", action="store_true", help="only measure what is in examples/toy")
    args = parser.parse_args(argv)
    parser.refuse(check_folder("--work_dir", args.work_dir))
    train, processes, measure = MODELS[args.model]
    if not args.score:
        args.work_dir.mkdir(parents=True, exist_ok=True)
        (args.work_dir / "rendezvous").unlink(missing_ok=True)
        torch.multiprocessing.spawn(train, (args.work_dir,), nprocs=processes)
    row("measure", "value", "bar")
    row("---", "---", "---")
    measure()


if __name__ == "__main__":
    main()

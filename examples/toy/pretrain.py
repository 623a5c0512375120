"""Makes the toy world's models from nothing: a small FLUX.1 pipeline and its Fill variant that know drawn scenes.

    python examples/toy/pretrain.py            # about two hours on two cores; continues where it was interrupted
    python examples/toy/pretrain.py --score    # measures what is in examples/toy

Four stages: the VAE; flow matching, together with the text encoders; guidance, distilled into the guidance embedding;
the Fill transformer. Every step draws from (stage, step, process) alone, so a rerun repeats itself.
"""

import argparse
import copy
import json
import math
import random
import string
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from common.flow_matching import add_noise
from common.latents import image_ids, pack_latents
from world import COLORS, KINDS, SIZES, SUBJECTS, caption, draw, random_scene


HERE = Path(__file__).parent
WORDS = (
    "a an and at background centre image in left of on one outline photo picture right shape style the two with "
    "TOK tok new object thing toy token"
).split()
WORDS = sorted({*WORDS, *COLORS, *KINDS, *SIZES, *" ".join(SUBJECTS.values()).split()})
# (width, height): share of the steps, pictures per step and process
CANVASES = {
    (64, 64): (0.6, 64),
    (96, 64): (0.1, 48),
    (64, 96): (0.1, 48),
    (128, 64): (0.05, 40),
    (128, 128): (0.15, 24),
}


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
        for parameter, master, part in zip(parameters, masters, gradient.split([m.numel() for m in masters]), strict=True):
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
    copy_weights(averages, parameters)


def copy_weights(sources, parameters):
    """Float32 copies, matrices perhaps flattened, back into the parameters."""
    for source, parameter in zip(sources, parameters, strict=True):
        parameter.data.copy_(source.data.view_as(parameter))


def to_tensor(images):
    """PIL images of one size as [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def train_vae(work_dir):
    """Absolute and squared error, a little KL divergence; first on crops, which are cheaper."""
    vae = new_vae()

    def loss_of(progress, rng):
        crop, count = (32, 64) if progress < 0.4 else (64, 32)
        scenes = [random_scene(rng, outline=0.15) for _ in range(count)]
        images = []
        for scene in scenes:
            x, y = rng.randint(0, 64 - crop), rng.randint(0, 64 - crop)
            images.append(draw(scene).crop((x, y, x + crop, y + crop)))
        images = to_tensor(images)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).float().mean()
        return error.abs().mean() + error.square().mean() + 1e-3 * divergence

    fit("vae", [vae], loss_of, steps=900, lr=4e-3, work_dir=work_dir, hold=0.4)
    return vae


def encode_pool(vae, work_dir, rank):
    """{canvas: (scenes, normalised latents [N, 16, h, w])}: drawn and encoded once, met again in other words."""
    pool_file = work_dir / f"pool-{rank}.pt"
    scenes = {
        canvas: [
            random_scene(rng, aspect=canvas[0] / canvas[1]) for _ in range(int(20000 * share) if share < 0.5 else 16000)
        ]
        for canvas, (share, _) in CANVASES.items()
        if (rng := random.Random(f"pool/{rank}/{canvas}"))
    }
    if pool_file.exists():
        latents = torch.load(pool_file, weights_only=True)
    else:
        latents = {}
        for canvas, group in tqdm(scenes.items(), desc="encoding scenes", disable=rank != 0):
            batches = [to_tensor([draw(s, *canvas) for s in group[i : i + 50]]) for i in range(0, len(group), 50)]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                latents[canvas] = torch.cat([vae.encode(batch).latent_dist.mean.float() for batch in batches])
        torch.save(latents, pool_file)
    config = vae.config
    return {
        canvas: (scenes[canvas], (latents[canvas] - config.shift_factor) * config.scaling_factor) for canvas in CANVASES
    }


def predict(transformer, clip, t5, tokens, tokenizers, captions, timesteps, guidance, ids, length):
    """The velocities of packed latents [B, N, 64], with captions of at most `length` T5 tokens."""
    clip_tokenizer, t5_tokenizer = tokenizers
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
        img_ids=ids,
        txt_ids=torch.zeros(length, 3),
        return_dict=False,
    )[0].float()


def draw_batch(pool, rng):
    """A canvas' worth of one step: (tokens [B, N, 64], scenes, canvas)."""
    canvas = rng.choices(list(CANVASES), [share for share, _ in CANVASES.values()])[0]
    scenes, latents = pool[canvas]
    picks = [rng.randrange(len(scenes)) for _ in range(CANVASES[canvas][1])]
    return pack_latents(latents[picks]), [scenes[i] for i in picks], canvas


def train_flow(pool, tokenizers, work_dir):
    """Flow matching on captions of the scenes; the guidance embedding is fed anything and learns to ignore it."""
    clip, t5 = new_text_encoders(*tokenizers)
    transformer = fast(new_transformer())

    def loss_of(progress, rng):
        tokens, scenes, (width, height) = draw_batch(pool, rng)
        captions = [caption(scene, rng, width / height) for scene in scenes]
        timesteps = torch.sigmoid(0.8 + 1.2 * torch.randn(len(tokens)))
        noise = torch.randn_like(tokens)
        guidance = torch.exp(torch.rand(len(tokens)) * math.log(40))
        noisy = add_noise(tokens, noise, timesteps)
        ids = image_ids(height // 8, width // 8)
        velocity = predict(transformer, clip, t5, noisy, tokenizers, captions, timesteps, guidance, ids, 24)
        return (velocity - (noise - tokens)).square().mean()

    fit("flow", [transformer, clip, t5], loss_of, steps=10000, lr=6e-3, work_dir=work_dir)
    return transformer, clip, t5


def fast(transformer):
    """bfloat16, compiled, and an attention whose backward pass is not slow on a CPU."""
    transformer.to(torch.bfloat16).set_attention_backend("_native_math")
    transformer.compile_repeated_blocks(dynamic=False)
    return transformer


def worker(rank, args):
    """One of the two training processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{args.work_dir.absolute()}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    vae = train_vae(args.work_dir).eval().requires_grad_(False)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] -= 2 * math.log(10)  # a tenth of the posterior's spread: the decoder needs none
        sample = to_tensor([draw(random_scene(random.Random(i))) for i in range(500)])
        means = vae.encode(sample).latent_dist.mean
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())
    tokenizers = new_tokenizers()
    pool = encode_pool(vae, args.work_dir, rank)
    transformer, clip, t5 = train_flow(pool, tokenizers, args.work_dir)
    if rank == 0:
        transformer = FluxTransformer2DModel.from_config(transformer.config)
        state = torch.load(args.work_dir / "flow.pt", weights_only=True)["weights"]
        for p, (_, average) in zip(transformer.parameters(), state): p.data.copy_(average.view_as(p))
        new_pipeline(vae=vae, text_encoder=clip, tokenizer=tokenizers[0], text_encoder_2=t5, tokenizer_2=tokenizers[1], transformer=transformer).save_pretrained(args.work_dir / "flow-pipeline")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, default=Path("toy-pretraining"), help="states of the stages")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, (args,), nprocs=2)


if __name__ == "__main__":
    main()

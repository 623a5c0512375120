"""Makes the toy world's models from nothing: a small FLUX.1 pipeline and its Fill variant that know drawn scenes.

    python examples/toy/pretrain.py            # about two hours on two cores; continues where it was interrupted
    python examples/toy/pretrain.py --score    # measures what is in examples/toy

Four stages: the VAE, then flow matching together with the text encoders, then guidance distilled into the guidance
embedding, then the Fill transformer. Everything is drawn from (seed, stage, step, process), so a rerun repeats itself.
"""

import json
import string
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer
from world import (
    COLORS,
    KINDS,
    SIZES,
    SUBJECTS,
)


HERE = Path(__file__).parent
WORDS = [
    "a",
    "an",
    "and",
    "at",
    "background",
    "centre",
    "image",
    "in",
    "left",
    "of",
    "on",
    "one",
    "outline",
    "photo",
    "picture",
    "right",
    "shape",
    "style",
    "the",
    "two",
    "with",
    "TOK",
    "tok",
    "new",
    "object",
    "thing",
    "toy",
    "token",
]
WORDS = sorted({*WORDS, *COLORS, *KINDS, *SIZES, *" ".join(SUBJECTS.values()).split()})
CANVASES = {(64, 64): 0.6, (96, 64): 0.1, (64, 96): 0.1, (128, 64): 0.05, (128, 128): 0.15}  # (width, height): share
POOL = 16000  # scenes encoded for the square canvas, in proportion for the others; captions are new at every use


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

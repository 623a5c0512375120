"""Pipelines of the real classes, tiny and with random weights."""

import string

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxFillPipeline,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.siglip.modeling_siglip import SiglipEncoder


PROMPT = {"encoder_hidden_states": (5, 32)}
MASKED = PROMPT | {"encoder_hidden_states_mask": (5,)}
CONDITIONS = {  # of a prompt of five tokens, by train_twinflow.py's model types
    "flux": PROMPT | {"pooled_projections": (32,)},
    "flux2-klein": {"encoder_hidden_states": (5, 48)},
    "sd3": PROMPT | {"pooled_projections": (32,)},
    "sana": PROMPT,
    "openuni": PROMPT,
    "qwenimage": MASKED,
    "qwenimage-edit": MASKED,
    "qwenimage21": MASKED,
    "flux3": {"encoder_hidden_states": (5, 128)},
    "z-image": {"cap_feats": (5, 32), "cap_mask": (5,)},
}


def randomised(transformer):
    """Velocities worth the name, as after pretraining: no output layer starts at zero."""
    for parameter in transformer.parameters():
        parameter.data.normal_(std=0.1)
    return transformer


def flux():
    """FLUX.1 with one block of each kind."""
    from examples.toy import pretrain

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = pretrain.new_tokenizers()
    text_encoder, text_encoder_2 = pretrain.new_text_encoders(clip_tokenizer, t5_tokenizer, width=32, layers=1)
    transformer = randomised(pretrain.new_transformer(heads=2, layers=1, single_layers=1, text_width=32))
    vae = pretrain.new_vae(channels=(8, 8, 16, 16), groups=4)
    vae.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    return pretrain.new_pipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def flux_fill(pipeline):
    """FLUX.1-Fill with the parts of a FluxPipeline: 384 input channels, all of them with weights."""
    from examples.toy import pretrain

    torch.manual_seed(1)
    transformer = pretrain.copy_of(pipeline.transformer, in_channels=384, out_channels=64)
    transformer.x_embedder.weight.data.normal_(std=0.1)
    parts = {name: part for name, part in pipeline.components.items() if name not in ("scheduler", "transformer")}
    parts = {name: part for name, part in parts.items() if part is not None}
    return pretrain.new_pipeline(FluxFillPipeline, transformer=transformer, **parts)


def qwen_tokenizer():
    """Bytes and the special tokens of Qwen2.5-VL and InternVL3."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=[*special, "<img>"])


QWEN3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def flux2_parts(joint_attention_dim, guidance_embeds, latent_channels=4):
    """The parts that FLUX.2-klein and dev share; the VAE's statistics are those of no training, but not 0 and 1."""
    transformer = Flux2Transformer2DModel(
        in_channels=4 * latent_channels,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=joint_attention_dim,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=latent_channels, norm_num_groups=4
    )
    vae.bn.running_mean.normal_(std=0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return {
        "transformer": randomised(transformer),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def flux2_klein(is_distilled=False, latent_channels=4):
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = QWEN3_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=28,  # the pipeline takes what the layers 9, 18 and 27 return
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Flux2KleinPipeline(
        **flux2_parts(joint_attention_dim=3 * 16, guidance_embeds=False, latent_channels=latent_channels),
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
        is_distilled=is_distilled,
    )


PARTS_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)


def qwen3_vl(tokenizer, width, layers):
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    return Qwen3VLForConditionalGeneration(config)


class Flux3:
    """FLUX.3's parts in the folders of its repository; its pipelines are modular."""

    def __init__(self, flow_map=False):
        tokenizer = qwen_tokenizer()
        tokenizer.chat_template = QWEN3_TEMPLATE
        transformer = Flux3Transformer2DModel(
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * 16,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=flow_map,
        )
        self.parts = {
            "transformer": randomised(transformer),
            "vae": flux2_parts(16, guidance_embeds=False, latent_channels=32)["vae"],
            "text_encoder": qwen3_vl(tokenizer, width=16, layers=32),  # of which every fourth layer is read
            "tokenizer": tokenizer,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=6.93),
        }

    def save_pretrained(self, folder):
        for name, part in self.parts.items():
            part.save_pretrained(folder / name)


def qwenimage21():
    """Qwen-Image-2.1 with the part of its processor that reads prompts, under the processor's name."""
    from train_twinflow import TextProcessor

    tokenizer = qwen_tokenizer()
    transformer = QwenImage21Transformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=32, axes_dims_rope=(4, 6, 6)
    )
    vae = AutoencoderKLQwenImage21(base_dim=8, decoder_base_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1)
    processor = type("Qwen3VLProcessor", (TextProcessor,), {"__module__": "transformers"})
    return QwenImage21Pipeline(
        transformer=randomised(transformer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        text_encoder=qwen3_vl(tokenizer, width=32, layers=2),
        processor=processor(tokenizer, PARTS_TEMPLATE),
    )


MISTRAL_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}{% endfor %}"
    "[/{{ message.role }}]{% endfor %}"
)


def flux2_dev():
    """FLUX.2-dev with the tokenizer alone: its PixtralProcessor would need torchvision."""
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = MISTRAL_TEMPLATE
    text_config = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 31,  # the pipeline takes what the layers 10, 20 and 30 return
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    vision_config = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    return Flux2Pipeline(
        **flux2_parts(joint_attention_dim=3 * 16, guidance_embeds=True),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
    )


def new_vae(shift_factor, scaling_factor):
    """An AutoencoderKL in the form of FLUX.1's, Z-Image's and SD3's."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=shift_factor,
        scaling_factor=scaling_factor,
    )


def z_image():
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = QWEN3_TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    return ZImagePipeline(
        transformer=randomised(transformer),
        vae=new_vae(shift_factor=0.1159, scaling_factor=0.3611),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=Qwen3ForCausalLM(config),
        tokenizer=tokenizer,
    )


def sd3(dual_attention_layers=(0,)):
    """SD3.5-medium's form; that of SD3.5-large with no dual attention layers."""
    from examples.toy.pretrain import new_text_encoders, new_tokenizers

    clip_tokenizer, t5_tokenizer = new_tokenizers()
    _, t5 = new_text_encoders(clip_tokenizer, t5_tokenizer, width=32, layers=1)
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=2,
    )
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=32,
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm",
    )
    vae = new_vae(shift_factor=0.0609, scaling_factor=1.5305)
    return StableDiffusion3Pipeline(
        transformer=randomised(transformer),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=clip_tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def sana():
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *string.printable.strip(), "▁"]
    tokenizer = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    config = Gemma2Config(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    transformer = SanaTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=4,
    )
    vae = AutoencoderDC(
        encoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        decoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config),
        vae=vae,
        transformer=randomised(transformer),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def openuni(folder):
    """(checkpoint, InternVL folder) for the Sana above: the released file's names, in small."""
    width = 64
    tokenizer = qwen_tokenizer()
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    vision = InternVLVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    llm = InternVLForConditionalGeneration(InternVLConfig(text_config=text, vision_config=vision))
    llm.save_pretrained(folder / "internvl")
    tokenizer.save_pretrained(folder / "internvl")
    config = SiglipVisionConfig(
        hidden_size=width, intermediate_size=96, num_hidden_layers=6, num_attention_heads=width // 64
    )
    parts = {
        "transformer": sana().transformer,
        "connector": SiglipEncoder(config),
        "projector": torch.nn.Linear(width, 32),
    }
    state_dict = {f"{part}.{name}": value for part, m in parts.items() for name, value in m.state_dict().items()}
    torch.save({**state_dict, "meta_queries": torch.randn(8, width)}, folder / "openuni.pth")
    return folder / "openuni.pth", folder / "internvl"


def qwenimage(edit=False, zero_cond_t=False):
    """Qwen-Image and its Edit-2509; `zero_cond_t` as in Edit-2511, whose images to edit stand at time 0."""
    tokenizer = qwen_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    parts = {
        "transformer": randomised(transformer),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
    }
    return QwenImageEditPlusPipeline(processor=None, **parts) if edit else QwenImagePipeline(**parts)

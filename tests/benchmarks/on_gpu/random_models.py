"""FLUX.1 pipelines of real size and random weights, without files of weights and without a hub."""

import dataclasses
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import init_empty_weights
from diffusers import FluxFillPipeline, FluxPipeline, ModelMixin
from safetensors.torch import save_file
from transformers import PreTrainedModel

from examples.estimate_memory import MODELS
from examples.toy.pretrain import new_pipeline, new_text_encoders, new_tokenizers, new_vae


FAMILIES = {"flux": ("FLUX.1-dev", FluxPipeline), "fill": ("FLUX.1-Fill-dev", FluxFillPipeline)}


def tiny(model):
    """A model of MODELS with two blocks, narrow enough for a CPU."""
    config = {**model.config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    config |= {"attention_head_dim": 16, "axes_dims_rope": (4, 6, 6), "joint_attention_dim": 64}
    config |= {"pooled_projection_dim": 64}
    conditions = {"encoder_hidden_states": (64, 64), "pooled_projections": (64,)}
    return dataclasses.replace(model, config=config, conditions=conditions)


def benchmark_model(name, is_tiny):
    return tiny(MODELS[name]) if is_tiny else MODELS[name]


def save_pipelines(folder: Path, *, is_tiny: bool) -> None:
    """The folders of FAMILIES: configs and tokenizers of pipelines, of which `random_weights` makes the models."""
    clip_tokenizer, t5_tokenizer = new_tokenizers()
    for family, (name, pipeline_class) in FAMILIES.items():
        model = benchmark_model(name, is_tiny)
        with init_empty_weights():
            if is_tiny:
                text_encoder, text_encoder_2 = new_text_encoders(clip_tokenizer, t5_tokenizer)
                vae = new_vae()
            else:
                text_encoder, text_encoder_2 = (create() for create in model.text_encoders)
                vae = model.vae()
            transformer = model.transformer(**model.config)
        pipeline = new_pipeline(
            pipeline_class,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=clip_tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=t5_tokenizer,
            transformer=transformer,
        )
        pipeline.save_config(folder / family)
        for part, component in pipeline.components.items():
            if isinstance(component, ModelMixin):
                component.save_config(folder / family / part)
            elif isinstance(component, PreTrainedModel):
                component.config.save_pretrained(folder / family / part)
            elif component is not None:
                component.save_pretrained(folder / family / part)
            if isinstance(component, torch.nn.Module):  # the trainers look for weights before they load them
                save_file({"none": torch.zeros(1)}, folder / family / part / "model.safetensors")


@contextmanager
def random_weights():
    """A context in which from_pretrained of diffusers and transformers makes models of random weights on the CPU, by
    the config in a folder.

    All weights of a dtype are views of one tensor, so that 24 GB take the RAM of the largest of them, and no time.
    """
    numbers = {}

    def view(parameter, dtype):
        if dtype not in numbers or numbers[dtype].numel() < parameter.numel():
            numbers[dtype] = (0.02 * torch.randn(parameter.numel())).to(dtype)
        weight = numbers[dtype][: parameter.numel()].view(parameter.shape)
        return torch.nn.Parameter(weight, requires_grad=False)

    def from_pretrained(cls, path, subfolder="", dtype=None, torch_dtype=None, output_loading_info=False, **_):
        dtype = dtype or torch_dtype or torch.float32
        folder = Path(path, subfolder)
        with init_empty_weights(include_buffers=False):
            if issubclass(cls, ModelMixin):
                model = cls.from_config(cls.load_config(folder))
            else:
                model = cls(cls.config_class.from_pretrained(folder))
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = view(parameter, dtype)
        if isinstance(model, PreTrainedModel):
            model.tie_weights()
        model.eval()
        return (model, {"missing_keys": [], "unexpected_keys": []}) if output_loading_info else model

    with (
        patch.object(ModelMixin, "from_pretrained", classmethod(from_pretrained)),
        patch.object(PreTrainedModel, "from_pretrained", classmethod(from_pretrained)),
    ):
        yield

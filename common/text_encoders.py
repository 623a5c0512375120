"""Prompts to embeddings."""

from common.arguments import reading
from common.lora import add_lora

import torch
from accelerate.utils import gather_object
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm


CLIP_TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj")


class PromptEncoder:
    """CLIP and T5: the embeddings of prompts; CLIP with a LoRA in training if there is --train_text_encoder.

    One without trained parts embeds every prompt once, in `cache`, and is freed. With `keep`, for prompts that are not
    all known before, it stays and embeds those too.
    """

    def __init__(self, accelerator, pipeline, args, dtype, *, keep=False):
        self.accelerator, self.args, self.dtype, self.keep = accelerator, args, dtype, keep
        self.pipeline = pipeline
        self.encoders = {"clip_l": self.pipeline.text_encoder, "t5": self.pipeline.text_encoder_2}
        for encoder in self.encoders.values():
            encoder.requires_grad_(False).eval()  # T5 has dropout
        self.lora_params, self.trained = [], set()
        self.add_trained_parts()
        if args.offload:
            names = {"clip_l": "text_encoder", "t5": "text_encoder_2"}
            trained = [names[kind] for kind in self.trained]
            self.pipeline.enable_group_offload(accelerator.device, offload_type="leaf_level", exclude_modules=trained)
        else:
            self.pipeline.to(accelerator.device)
        self.cached = {"clip_l": {}, "t5": {}}  # {prompt: embedding on the CPU}

    def add_trained_parts(self):
        args = self.args
        if "train_text_encoder" in args and args.train_text_encoder:
            layers = CLIP_TARGET_MODULES + (("fc1", "fc2") if args.lora_layers == "kohya" else ())
            settings = {"rank": args.rank, "alpha": args.lora_alpha, "dropout": 0.0, "target_modules": layers}
            self.lora_params, self.trained = add_lora(self.encoders["clip_l"], **settings), {"clip_l"}

    def parameters(self):
        return self.lora_params

    def replace(self, prompt):
        """The prompt as the tokenizers get it."""
        return prompt

    def embed(self, kind, prompts):
        """CLIP's pooled embeddings [B, P] or T5's [B, T, D]."""
        prompts = [self.replace(prompt) for prompt in prompts]
        with self.accelerator.autocast():
            if kind == "clip_l":
                embeds = self.pipeline._get_clip_prompt_embeds(prompts)
            else:
                length = self.args.max_sequence_length
                embeds = self.pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=length, dtype=self.dtype)
        return embeds.to(self.dtype)

    def kept_embed(self, kind, prompt):
        """The embedding on the CPU."""
        return self.embed(kind, [prompt]).cpu()

    @torch.no_grad()
    def cache(self, prompts):
        """Embeds the prompts with the encoders that are not in training, which are then freed.

        The processes share the work; each has all.
        """
        for kind in sorted(self.encoders.keys() - self.trained):  # in one order on all processes
            quiet = not self.accelerator.is_main_process
            with self.accelerator.split_between_processes(prompts) as share:
                bar = tqdm(share, desc=f"Encoding prompts, {kind}", unit="prompt", disable=quiet)
                embeds = [(prompt, self.kept_embed(kind, prompt)) for prompt in bar]
            self.cached[kind] = dict(gather_object(embeds))
            if self.keep:
                continue
            del self.encoders[kind]
            if kind == "t5":
                self.pipeline.text_encoder_2 = None
            elif not self.lora_params:  # a LoRA is saved at the end
                self.pipeline.text_encoder = None
        free_memory()

    def __call__(self, prompts):
        """(prompt_embeds [B, T, D], pooled_prompt_embeds [B, P])."""
        return tuple(
            self.embed(kind, prompts) if kind in self.trained else self.recall(kind, prompts)
            for kind in ("t5", "clip_l")
        )

    @torch.no_grad()
    def recall(self, kind, prompts):
        """Embeddings from the cache, of a prompt that is not in it from the encoder: one at a time, so that what else
        is in the batch does not matter."""
        known = self.cached[kind]
        embeds = [known[prompt] if prompt in known else self.embed(kind, [prompt]) for prompt in prompts]
        return torch.cat([embed.to(self.accelerator.device) for embed in embeds])


def load_text_pipeline(pipeline_class, args, dtype, **parts):
    """The pipeline of --pretrained_model_name_or_path without transformer and VAE."""
    with reading(f"--pretrained_model_name_or_path {args.pretrained_model_name_or_path}: its text encoders"):
        return pipeline_class.from_pretrained(
            args.pretrained_model_name_or_path,
            transformer=None,
            vae=None,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=dtype,
            use_safetensors=True,
            **parts,
        )

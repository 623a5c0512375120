"""Prompts are encoded in batches while they are cached: the same bits as one at a time, and nothing twice."""

import copy
from types import SimpleNamespace

from common.text_encoders import PROMPTS_PER_BATCH, PromptEncoder

import pytest
import tiny_backbones
import torch
from accelerate import Accelerator

import train_twinflow as twinflow


PROMPTS = [f"a {'very ' * (i % 4)}red circle number {i}" for i in range(PROMPTS_PER_BATCH + 3)]


@pytest.fixture
def new_encoder(tiny_pipeline, tmp_path):
    """Makes a PromptEncoder with a disk cache, the same one whenever it is called."""

    def make():
        return PromptEncoder(
            Accelerator(cpu=True),
            copy.deepcopy(tiny_pipeline),
            torch.float32,
            max_sequence_length=16,
            folder=tmp_path / "encoded",
            keep_encoders=True,
            disk_cache_dir=tmp_path / "cache",
        )

    return make


@torch.no_grad()
def test_a_batch_has_the_bits_of_single_prompts(new_encoder):
    encoder = new_encoder()
    encoder.cache_prompts(PROMPTS)
    for name in ("clip_l", "t5"):
        for prompt in PROMPTS:
            assert torch.equal(encoder.cached[name][prompt], encoder.encode_with(name, [prompt]))


@torch.no_grad()
def test_interrupted_caching_goes_on_where_it_was(new_encoder, monkeypatch):
    honest = PromptEncoder.encode_with
    encoded = []

    def interrupted(self, name, prompts):
        if name == "t5" and "t5" in encoded:
            raise KeyboardInterrupt
        encoded.append(name)
        return honest(self, name, prompts)

    monkeypatch.setattr(PromptEncoder, "encode_with", interrupted)
    with pytest.raises(KeyboardInterrupt):
        new_encoder().cache_prompts(PROMPTS)
    assert encoded == ["clip_l", "clip_l", "t5"]

    seen = []
    monkeypatch.setattr(
        PromptEncoder, "encode_with", lambda self, *call: seen.append((call[0], {*call[1]})) or honest(self, *call)
    )
    encoder = new_encoder()
    encoder.cache_prompts(PROMPTS)
    assert seen == [("t5", {*PROMPTS[PROMPTS_PER_BATCH:]})]
    for name in ("clip_l", "t5"):
        assert torch.equal(encoder.cached[name][PROMPTS[0]], encoder.encode_with(name, [PROMPTS[0]]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_twinflow_batches_prompts_of_one_length(family, tiny_pipeline):
    pipeline = tiny_pipeline if family == "flux" else tiny_backbones.sd3()
    backbone = twinflow.BACKBONES[family](
        SimpleNamespace(max_sequence_length=16, offload=False, quantize_text_encoders="none")
    )
    prompts = PROMPTS[:3]
    together = backbone.encode_prompts(pipeline, prompts, [None] * len(prompts))
    assert len(together) == len(prompts)
    for prompt, conditions in zip(prompts, together, strict=True):
        for name, value in backbone.encode_prompt(pipeline, prompt).items():
            assert torch.equal(conditions[name], value)
        third = {"prompt_3": None} if family == "sd3" else {}
        prompt_embeds, *others = pipeline.encode_prompt(prompt, None, **third, max_sequence_length=16)
        pooled_prompt_embeds = others[0] if family == "flux" else others[1]
        assert torch.equal(conditions["encoder_hidden_states"], prompt_embeds[0])
        # SD3's CLIP ends in a layer of one row per prompt, which rounds differently alone
        torch.testing.assert_close(conditions["pooled_projections"], pooled_prompt_embeds[0], rtol=1e-5, atol=1e-6)

"""A step does not wait for the device: at most one read per update, in all trainers, by a stand-in on a CPU."""

import importlib
import itertools

from common.optimizers import Prodigy, step_if_finite
from common.tracking import StepReads

import prodigyopt
import pytest
import torch
from device_syncs import count_syncs


SCRIPTS = ["train_dreambooth_flux_advanced", "train_omini", "train_influxedit", "train_twinflow"]
PRODIGY = ["--optimizer", "prodigy", "--learning_rate", 1]
# what takes other paths through a step: [trainer, flags]
PATHS = {
    "cached": ["train_dreambooth_flux_advanced", "--cache_latents", "--gradient_accumulation_steps", 2, "--use_ema"],
    "preserved": ["train_dreambooth_flux_advanced", "--preserve_outputs", 1, "--preserve_prompts", "a dog", *PRODIGY],
    "new tokens": [
        *("train_dreambooth_flux_advanced", "--train_text_encoder_ti", "--train_text_encoder_ti_frac", 1),
        *("--token_abstraction", "circle"),
    ],
    "text encoder": ["train_dreambooth_flux_advanced", "--train_text_encoder", "--gradient_checkpointing"],
    "two conditions": ["train_omini", "--condition_type", "canny", "deblurring", "--cache_latents", *PRODIGY],
    "mask": ["train_influxedit", "--preserve_outputs", 1, "--preserve_prompts", "a dog", "--use_ema", *PRODIGY],
    "tokens left out": ["train_omini", "--condition_type", "token_integration"],
    "full": ["train_twinflow", "--training", "full", "--cache_latents", "--estimate_order", 2],
    "Prodigy": ["train_twinflow", *PRODIGY],
}


@pytest.fixture
def syncs_of_updates(train, short_runs, tmp_path, monkeypatch):
    """syncs_of_updates(trainer, *flags): what held up the program in updates, neither the first nor the last."""

    def run(script, *flags):
        trainer = importlib.import_module(script)
        monkeypatch.setattr(trainer, "fused_adamw", lambda device, has_scaler: True)  # as with a GPU
        honest = trainer.log_step
        updates = []
        with count_syncs(torch.device("cpu")) as syncs:

            def log_step(*args):
                updates.append(list(syncs))
                honest(*args)
                syncs.clear()

            monkeypatch.setattr(trainer, "log_step", log_step)
            train(script, *short_runs[script], "--output_dir", tmp_path / "out", "--max_train_steps", 4, *flags)
        assert len(updates) == 4
        return updates[1:-1]

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_update_does_not_wait_for_the_device(syncs_of_updates, script):
    for syncs in syncs_of_updates(script):
        assert not syncs


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_an_update_of_any_kind_waits_for_the_device_once_at_most(syncs_of_updates, path):
    """Prodigy reads the sum of its numbers; the tokens for a text encoder in training are copied by diffusers."""
    script, *flags = PATHS[path]
    waits = "prodigy" in flags or any("--train_text_encoder" in str(flag) for flag in flags)
    for syncs in syncs_of_updates(script, *flags):
        assert len(syncs) == waits, syncs


SETTINGS = [  # of Prodigy
    {},
    {"use_bias_correction": True, "safeguard_warmup": True, "betas": (0.9, 0.99)},
    {"decouple": False, "beta3": 0.9, "d_coef": 2.0},
    {"slice_p": 3, "growth_rate": 1.02, "betas": (0.0, 0.999)},
]


def trained_by(classes, settings, num_steps=30):
    """(weights, optimizer) after steps of a small model, the rate rising from 0, shared by the classes in turn; each
    takes over what the one before saved. Among the gradients are none and one that is 0."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(7, 5)), torch.nn.Parameter(torch.zeros(5, 9))]
    weights += [torch.nn.Parameter(torch.randn(33))]
    groups = [{"params": weights[:2], "lr": 1.0, "weight_decay": 0.1}, {"params": weights[2:], "lr": 1.0}]
    x = torch.randn(64, 7)
    y = torch.randn(64, 9)
    optimizer = None
    for step, kind in zip(range(num_steps), itertools.cycle(classes), strict=False):
        if not isinstance(optimizer, kind) or type(optimizer) is not kind:
            before = optimizer
            optimizer = kind(groups, **settings)
            if before is not None:
                optimizer.load_state_dict(before.state_dict())
        for group in optimizer.param_groups:
            group["lr"] = min(1.0, step / 3)
        optimizer.zero_grad()
        error = x @ weights[0] @ weights[1] + weights[2][:9] - y
        (error.square().mean() + 0.01 * weights[2].square().sum()).backward()
        if step == 5:
            for weight in weights:
                weight.grad.zero_()
        if step == 7:
            weights[2].grad = None
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("settings", SETTINGS)
def test_prodigy_is_prodigyopts_bit_for_bit_and_takes_over_its_state(settings):
    theirs, their_optimizer = trained_by([prodigyopt.Prodigy], settings)
    for classes in ([Prodigy], [prodigyopt.Prodigy, Prodigy]):
        ours, optimizer = trained_by(classes, settings)
        assert all(torch.equal(our, their) for our, their in zip(ours, theirs, strict=True))
        state = optimizer.state_dict()
        assert state["param_groups"] == their_optimizer.state_dict()["param_groups"]
        for number, values in their_optimizer.state_dict()["state"].items():
            assert values.keys() == state["state"][number].keys()
            for name, value in values.items():
                assert torch.equal(torch.as_tensor(state["state"][number][name]), torch.as_tensor(value))


def test_prodigy_reads_the_device_once_per_step():
    device = torch.device("cpu")
    with count_syncs(device) as syncs:
        weights = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(20)]
        for weight in weights:
            weight.data = weight.data.to(device, non_blocking=True)
        for kind, num_reads in ((prodigyopt.Prodigy, 40), (Prodigy, 1)):
            optimizer = kind(weights)
            for _ in range(2):
                optimizer.zero_grad()
                sum((weight - 1).square().sum() for weight in weights).backward()
                syncs.clear()
                optimizer.step()
            assert len(syncs) == num_reads, syncs


class Unprepared:
    scaler = None


@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW", "Prodigy", "SGD"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_goes_on(kind):
    """Fused AdamW and Prodigy find it out on the device; the others wait for it."""

    def weights_after(finite_steps):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(5))
        if kind == "Prodigy":
            optimizer = Prodigy([weight])
        elif kind == "SGD":
            optimizer = torch.optim.SGD([weight], lr=0.1)
        else:
            optimizer = torch.optim.AdamW([weight], fused=kind == "fused AdamW")
        for is_finite in finite_steps:
            weight.grad = 2 * weight.detach() if is_finite else torch.full((5,), torch.nan)
            step_if_finite(Unprepared, optimizer, torch.tensor(is_finite))
        return weight.detach()

    expected = weights_after([True, True, True])
    assert torch.equal(weights_after([False, True, False, False, True, True]), expected)
    assert expected.isfinite().all()


def test_the_numbers_of_a_step_are_read_after_the_next_one_was_started():
    reads = StepReads(torch.device("cuda"))
    logged = []
    for step in (1, 2, 3):
        reads.put(step, {"loss": torch.tensor(step / 2), "taken": torch.tensor(True)}, {"lr": 0.1})
        logged.append(list(reads.read(wait=step == 3)))
    first, second, third = ({"loss": step / 2, "taken": 1.0, "lr": 0.1} for step in (1, 2, 3))
    assert logged == [[], [(1, first)], [(2, second), (3, third)]]

    reads = StepReads(torch.device("cpu"))  # where nothing waits
    reads.put(1, {"loss": torch.tensor(0.5), "taken": torch.tensor(True)}, {"lr": 0.1})
    assert list(reads.read(wait=False)) == [(1, first)]

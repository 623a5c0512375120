"""A flag that nothing reads in a mode is refused or named when it is given: found by observing what tiny runs read."""

import argparse
import importlib

from common.arguments import LR_SCHEDULERS, Arguments, idle_flags, shared_needs
from common.flow_matching import TIMESTEP_SAMPLING, WEIGHTING_SCHEMES, sample_sigmas

import pytest
import torch
from diffusers.optimization import get_scheduler
from test_wrong_input import TRAINERS, actions_of


DREAMBOOTH, OMINI, INFLUX, TWINFLOW = TRAINERS


class Flags(dict):
    """vars() of `Observed`, which notes the keys that are asked for."""

    def __init__(self, flags, reads):
        super().__init__(flags)
        self.reads = reads

    def __getitem__(self, name):
        self.reads.add(name)
        return super().__getitem__(name)


class Observed(Arguments):
    """A run's flags that notes in `reads` which of them are read."""

    __slots__ = ("reads",)

    def __getattribute__(self, name):
        reads = object.__getattribute__(self, "reads") if name != "reads" else set()
        if name == "__dict__":
            return Flags(object.__getattribute__(self, "__dict__"), reads)
        if not name.startswith("_"):
            reads.add(name)
        return object.__getattribute__(self, name)

    def __copy__(self):
        return observed(self, self.reads)


def observed(args, reads):
    """The same flags, whose names are added to `reads` where they are read."""
    copied = Observed.__new__(Observed)
    copied.reads = reads
    object.__getattribute__(copied, "__dict__").update(vars(args))
    copied.changed = args.changed
    return copied


def observe(module, args):
    """The names of the flags that a run of these reads after they are parsed."""
    reads = set()
    module.main(observed(args, reads))
    return reads


def other_words(action, files):
    """The flag with a value that is not its default."""
    flag = action.option_strings[0]
    if type(action).__name__ in ("OnSwitch", "Switch"):
        return [flag, str(not action.default)]
    if action.choices:
        return [flag, next(choice for choice in action.choices if choice != str(action.default).lower())]
    if action.dest in files:
        return [flag, *map(str, files[action.dest])]
    for value in ("2", "0.5", "0.25", "3", "-1", "1,2", "x"):
        try:
            parsed = (action.type or str)(value)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            continue
        if parsed != action.default:
            count = action.nargs if isinstance(action.nargs, int) else 1
            return [flag, *[value] * count]
    raise AssertionError(f"no value for {flag}")


MODES = {
    DREAMBOOTH: {
        "plain": "",
        "schedule": "--lr_scheduler cosine --lr_warmup_steps 1 --timestep_sampling shift",
        "prodigy": "--optimizer prodigy --learning_rate 1 --validation_prompt x --num_validation_images 1",
        "prior": "--with_prior_preservation --class_prompt x --num_class_images 2 --class_data_dir {class_images}",
        "cached": "--cache_latents_to_disk --cache_text_encoder_outputs_to_disk --disk_cache_dir {cache}",
        "pivotal": "--train_text_encoder_ti --token_abstraction a --cache_latents",
        "tokens alone": "--train_text_encoder_ti --token_abstraction a --train_transformer_frac 0",
        "CLIP": "--train_text_encoder --weighting_scheme logit_normal",
        "stream": "without instance_data_dir --streaming --data_files {stream} --image_column png "
        "--caption_column txt",
    },
    OMINI: {
        "plain": "",
        "prodigy": "--optimizer prodigy --learning_rate 1 --cache_latents --no-cache_prompts",
        "sgd": "--optimizer sgd --learning_rate 0.1 --condition_type fill coloring --adapter_per_condition",
        "validation": "--validation_prompt x --validation_image {image} --num_validation_images 1",
        "stream": "without instance_data_dir --streaming --data_files {stream} --image_column png "
        "--caption_column txt",
    },
    INFLUX: {
        "plain": "",
        "split": "without target_data_dir --mode mask --use_split_mask --cache_latents",
        "prodigy": "--optimizer prodigy --learning_rate 1 --train_text_encoder",
        "prior": "--with_prior_preservation --class_prompt x --num_class_images 2 --class_data_dir {class_images}",
        "validation": "--validation_prompt x --validation_image {image} --validation_width 32 --validation_height 32",
    },
    TWINFLOW: {
        "plain": "",
        "full": "--training full --ema_decay_rate 0.5",
        "prodigy": "--optimizer prodigy --learning_rate 1 --cache_latents --validation_prompt x "
        "--num_validation_images 1",
        "stream": "without train_data_dir --streaming --data_files {stream} --image_column png --caption_column txt",
        "image free": "without train_data_dir --image_free --prompts_file {prompts} --ema_decay_rate 1",
    },
}


def command(script, mode, short_runs, files):
    """The words of a short run in a mode, which may leave out a flag of it."""
    words = [*map(str, short_runs[script]), "--checkpointing_steps", "1"]
    extra = MODES[script][mode].format(**{name: " ".join(map(str, paths)) for name, paths in files.items()}).split()
    if extra[:1] == ["without"]:
        place = words.index(f"--{extra[1]}")
        words = words[:place] + words[place + 2 :]
        extra = extra[2:]
    return [*words, *extra]


@pytest.fixture
def files(tmp_path, pictures, tiny_model):
    """{name: paths} of what the modes and the flags below name."""
    from tarfile import TarFile

    folders = ["class_images", "cache", "some_folder"]
    for name in folders:
        (tmp_path / name).mkdir()
    with TarFile(tmp_path / "00000.tar", "w") as tar:
        for i in range(5):
            tar.add(pictures / f"{i}.png", f"{i}.png")
            tar.add(pictures / f"{i}.txt", f"{i}.txt")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    found = {name: [tmp_path / name] for name in folders}
    return found | {
        "stream": [tmp_path / "00000.tar"],
        "prompts": [tmp_path / "prompts.txt"],
        "image": [pictures / "0.png"],
        "validation_image": [pictures / "0.png"],
        "validation_samplers": ["few:1"],
        "probs": ["e2e=1,mul=1,any=1,adv=2"],
        "class_data_dir": [tmp_path / "some_folder"],
        "disk_cache_dir": [tmp_path / "some_folder"],
        "resolution": ["64"],
        "target_size": ["64"],
        "image_size": ["64"],
        "condition_size": ["64"],
        "aspect_ratio_buckets": ["32,64"],
        "validation_width": ["64"],
        "validation_height": ["64"],
        "time_dist_ctrl": ["1", "2", "1"],
        "enhanced_range": ["0.1", "0.9"],
    }


def remark_of(module, words, capsys):
    """(flags, what is said of them) of a command; None for those of one that is refused."""
    capsys.readouterr()
    try:
        args = module.parse_args(words)
    except SystemExit as stop:
        assert stop.code == 2
        args = None
    return args, capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "mode"),
    [
        pytest.param(script, mode, marks=[] if (script, mode) == (DREAMBOOTH, "plain") else pytest.mark.slow)
        for script in TRAINERS
        for mode in MODES[script]
    ],
)
def test_a_flag_that_nothing_reads_is_named(short_runs, files, tmp_path, monkeypatch, capsys, script, mode):
    module = importlib.import_module(script)
    words = [*command(script, mode, short_runs, files), "--output_dir", str(tmp_path / "run")]
    args, said = remark_of(module, words, capsys)
    assert args is not None, said
    reads = observe(module, args)
    silent = []
    for action in actions_of(script, monkeypatch):
        name = action.dest
        if name == "help" or name in reads or name in args.changed:
            continue
        given = [*words[:-1], str(tmp_path / "other"), *other_words(action, files)]
        changed_args, said = remark_of(module, given, capsys)
        if action.option_strings[0] in said or f"--{name}" in said:
            continue
        if changed_args is None:  # refused beside another flag, which its message names
            continue
        ours = {key: value for key, value in vars(args).items() if key not in (name, "output_dir")}
        theirs = {key: value for key, value in vars(changed_args).items() if key not in (name, "output_dir")}
        if ours == theirs and vars(args)[name] != vars(changed_args)[name]:
            silent.append(name)
    assert silent == []


# ---------------------------------------------------------------------------------------------------------------------
# Flags that are read and passed on: what they change is compared
# ---------------------------------------------------------------------------------------------------------------------


def is_named(module, args, flag):
    args.changed = [flag]
    return bool(idle_flags(args, shared_needs(args), module.needs(args)))


@pytest.mark.parametrize("script", [DREAMBOOTH, OMINI, INFLUX])
def test_noise_flags_that_change_nothing_are_named(short_runs, script):
    module = importlib.import_module(script)
    args = module.parse_args([str(word) for word in short_runs[script]])
    scheduler = module.FlowMatchEulerDiscreteScheduler()
    values = {"logit_mean": 0.5, "logit_std": 2.0, "mode_scale": 0.5, "sigmoid_scale": 2.0, "discrete_flow_shift": 2.0}

    def sigmas(**changes):
        generator = torch.Generator().manual_seed(0)
        names = {"timestep_sampling": args.timestep_sampling, "weighting_scheme": args.weighting_scheme}
        return sample_sigmas(64, noise_scheduler=scheduler, image_seq_len=300, generator=generator, **names, **changes)

    for args.timestep_sampling in TIMESTEP_SAMPLING:
        for args.weighting_scheme in WEIGHTING_SCHEMES:
            if args.timestep_sampling != "sigma" and args.weighting_scheme in ("logit_normal", "mode"):
                continue  # refused
            for flag, value in values.items():
                changes_nothing = torch.equal(sigmas(), sigmas(**{flag: value}))
                assert is_named(module, args, flag) == changes_nothing, (args.timestep_sampling, flag)


@pytest.mark.parametrize("script", TRAINERS)
def test_schedule_and_optimizer_flags_that_change_nothing_are_named(short_runs, script):
    module = importlib.import_module(script)
    args = module.parse_args([str(word) for word in short_runs[script]])

    def trained():
        """A parameter and its learning rates over some steps."""
        parameter = torch.nn.Parameter(torch.ones(1, 300, dtype=torch.float64))  # Prodigy starts at 1e-6
        groups = [{"params": [parameter], "lr": 0.5, "weight_decay": 0.1}]
        optimizer = module.create_optimizer(args, groups)
        schedule = get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=12,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        values = []
        target = 3 * torch.sin(torch.arange(300.0))[None]
        for _ in range(12):
            parameter.grad = parameter.detach() - target
            optimizer.step()
            schedule.step()
            values += [*schedule.get_last_lr(), *parameter.detach().flatten().tolist()]
        return values

    def check(changes):
        before = trained()
        for flag, value in changes.items():
            kept = getattr(args, flag)
            setattr(args, flag, value)
            changes_nothing = trained() == before
            setattr(args, flag, kept)
            assert is_named(module, args, flag) == changes_nothing, (args.lr_scheduler, args.optimizer, flag)

    args.optimizer = "adamw"
    args.lr_warmup_steps = 2
    for args.lr_scheduler in LR_SCHEDULERS:
        check({"lr_power": 2.0, "lr_num_cycles": 3, "lr_warmup_steps": 4})
    args.lr_scheduler = "constant_with_warmup"
    for args.optimizer in ("adamw", "prodigy", "sgd") if script == OMINI else ("adamw", "prodigy"):
        check({"prodigy_decouple": False, "prodigy_use_bias_correction": False, "prodigy_safeguard_warmup": False})
        check({"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 0.1})


@pytest.mark.parametrize("script", TRAINERS)
def test_no_warmup_beside_a_constant_rate_is_what_happens(short_runs, script, capsys):
    module = importlib.import_module(script)
    words = [*map(str, short_runs[script]), "--lr_scheduler", "constant", "--lr_warmup_steps"]
    _, said = remark_of(module, [*words, "0"], capsys)
    assert "lr_warmup_steps" not in said
    _, said = remark_of(module, [*words, "5"], capsys)
    assert "lr_warmup_steps" in said

"""What the four trainers share: mathematics, file formats and crash-safety, one noun a file."""

import logging
import os
import sys
import warnings


# What these libraries remark when they are imported (a missing torchvision, kernels for other CPUs) helps nobody who
# trains; --verbose shows what they say afterwards.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # of Pillow; data.py has a bound of its own
# torch's, where the first step was skipped: `check_steps` tells of it
warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
# PEFT's, where a model gets a second adapter on purpose
warnings.filterwarnings("ignore", message="Already found a `peft_config`")
warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # which diffusers passes to the Hub's client


def without_traceback(kind, error, traceback):
    """Ctrl-C, also during imports, is no error of a program's: the line that it ends with says so."""
    if issubclass(kind, KeyboardInterrupt):
        print("\nInterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def without_remark(unraisable):
    """An interrupt while Python clears up, or ends, is no remark of a library's."""
    if unraisable.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(unraisable)


sys.excepthook = without_traceback
sys.unraisablehook = without_remark
